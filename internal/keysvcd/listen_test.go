package keysvcd

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// The socket is for its own user alone, or for all, whatever the umask; and what others make in the same process at
// that moment has the mode that they want.
func TestListenUnix(t *testing.T) {
	dir, err := os.MkdirTemp("", "") // t.TempDir may be too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "socket")
	listened := make(chan struct{})
	var making sync.WaitGroup
	making.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-listened:
				return
			default:
			}
			made := filepath.Join(dir, fmt.Sprint(i))
			if err := os.Mkdir(made, 0o700); err != nil {
				t.Error(err)
				return
			}
			if info, err := os.Stat(made); err != nil || info.Mode().Perm() != 0o700 {
				t.Errorf("a folder that was made meanwhile: %v %v", info.Mode(), err)
				return
			}
			if err := os.Remove(made); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for i := range 500 {
		others := i%2 == 1
		l, err := listenUnix(path, others)
		if err != nil {
			t.Fatal(err)
		}
		want := map[bool]os.FileMode{false: 0o600, true: 0o666}[others]
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Fatalf("the socket: %v %v, not %v", info.Mode(), err, want)
		}
		l.Close()
	}
	close(listened)
	making.Wait()
}
