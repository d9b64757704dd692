package factory

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/directory/filestore"
)

// counted counts the calls of each kind.
type counted struct {
	directory.Store
	mu    sync.Mutex
	calls map[string]int // guarded by mu
}

func (c *counted) count(kind string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls[kind]++
}

func (c *counted) take() (calls map[string]int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	calls, c.calls = c.calls, map[string]int{}
	return calls
}

func (c *counted) Create(ctx context.Context, path string, data []byte) error {
	c.count("create")
	return c.Store.Create(ctx, path, data)
}

func (c *counted) Read(ctx context.Context, path string) ([]byte, string, error) {
	c.count("read")
	return c.Store.Read(ctx, path)
}

func (c *counted) Update(ctx context.Context, path string, data []byte, version string) error {
	c.count("update")
	return c.Store.Update(ctx, path, data, version)
}

func (c *counted) List(ctx context.Context, path string) ([]string, error) {
	c.count("list")
	return c.Store.List(ctx, path)
}

// counting is a line whose directory's calls are counted.
func counting(t *testing.T) (line *Line, store *counted) {
	line, dir, token := newLine(t)
	store = &counted{Store: must(filestore.Open(dir)), calls: map[string]int{}}
	return must(NewLine(token, store, line.state)), store
}

// filesRead is how often this process has read from files so far (proc(5), /proc/pid/io): directory, packages, journal.
func filesRead(t *testing.T) (n int) {
	t.Helper()
	var rchar, wchar int
	text := must(os.ReadFile("/proc/self/io"))
	if _, err := fmt.Sscanf(string(text), "rchar: %d\nwchar: %d\nsyscr: %d", &rchar, &wchar, &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// The work on a lot grows as the lot does: twice as many shards more are twice as many calls of the directory more, of
// each kind, and about twice as many reads of files. The directory is listed as often as before.
func TestLinear(t *testing.T) {
	line, store := counting(t)
	out := t.TempDir()
	line = keeping(line, out)
	type work struct {
		calls map[string]int
		files int
	}
	done := map[string][]work{}
	sizes := []int{8, 16, 32}
	for i, shards := range sizes {
		lot := fmt.Sprint("L", shards)
		s := spec(t, lot, 100*i, shards)
		s.ShardSize = 1
		if _, err := line.CreateLot(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			name string
			do   func() error
		}{
			{"provision", func() error {
				_, err := line.Provision(t.Context(), lot, options(out, 2))
				return err
			}},
			{"provision again", func() error {
				_, err := line.Provision(t.Context(), lot, options(out, 2))
				return err
			}},
			{"reconcile", func() error {
				r, err := line.Reconcile(t.Context(), lot, out, false)
				if err == nil && r.Agreed != shards {
					err = fmt.Errorf("%+v", r)
				}
				return err
			}},
			{"repair", func() error {
				if err := os.Remove(filepath.Join(line.state.Dir, "journal.db")); err != nil {
					return err
				}
				r, err := line.Reconcile(t.Context(), lot, out, true)
				if err == nil && (len(r.Differences) != shards || r.Open() > 0) {
					err = fmt.Errorf("%+v", r)
				}
				return err
			}},
			{"verify", func() error {
				v, err := VerifyLot(t.Context(), line.store, line.verifier, lot, out, nil)
				if err == nil && (!v.OK() || v.Devices != shards || v.Packages != shards) {
					err = fmt.Errorf("%+v", v)
				}
				return err
			}},
		} {
			store.take()
			before := filesRead(t)
			if err := c.do(); err != nil {
				t.Fatalf("%s of %d shards: %v", c.name, shards, err)
			}
			done[c.name] = append(done[c.name], work{store.take(), filesRead(t) - before})
		}
	}
	for name, w := range done {
		t.Logf("%s of %v shards: %v", name, sizes, w)
		for _, kind := range []string{"create", "read", "update", "list"} {
			few, many := w[1].calls[kind]-w[0].calls[kind], w[2].calls[kind]-w[1].calls[kind]
			if many != 2*few || kind == "list" && many != 0 {
				t.Errorf("%s: %d, %d and %d calls of %s", name, w[0].calls[kind], w[1].calls[kind], w[2].calls[kind],
					kind)
			}
		}
		if w[2].files > 5*w[0].files {
			t.Errorf("%s: files were read %d, %d and %d times", name, w[0].files, w[1].files, w[2].files)
		}
	}
}
