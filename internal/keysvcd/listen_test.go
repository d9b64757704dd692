package keysvcd

import (
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
)

// The socket is its user's alone, or everybody's, whatever the umask is; and what the process makes meanwhile has the
// mode that it would have without a socket: a folder without x is one that the service cannot use.
func TestListenUnix(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077)) // that of keysvc.service
	dir := t.TempDir()
	stop, made := make(chan struct{}), make(chan error)
	go func() {
		defer close(made)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			folder := filepath.Join(dir, "folder"+strconv.Itoa(i%100))
			if err := os.Mkdir(folder, 0o700); err != nil {
				made <- err
				return
			}
			if info, err := os.Stat(folder); err != nil || info.Mode().Perm() != 0o700 {
				t.Errorf("a folder made beside is %v, %v", info.Mode(), err)
				return
			}
			if err := os.Remove(folder); err != nil {
				made <- err
				return
			}
		}
	}()
	for i := range 400 {
		others := i%2 == 1
		want := os.FileMode(0o600)
		if others {
			want = 0o666
		}
		path := filepath.Join(dir, "s")
		l, err := listenUnix(path, others)
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Fatalf("the socket is %v, %v, want %v", info.Mode(), err, want)
		}
		l.Close()
	}
	close(stop)
	if err := <-made; err != nil {
		t.Error(err)
	}
}
