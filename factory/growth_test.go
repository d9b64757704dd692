package factory

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/directory/filestore"
	"github.com/kmehsm/kmehsm/factory/inspect"
	"github.com/kmehsm/kmehsm/factory/memory"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/internal/weakkey"
	"github.com/kmehsm/kmehsm/kme"
)

// counted counts the calls of each kind.
type counted struct {
	directory.Store
	dir   string
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
	store = &counted{Store: must(filestore.Open(dir)), dir: dir, calls: map[string]int{}}
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
				v, err := inspect.Lot(t.Context(), line.store, line.verifier, lot, out, nil)
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

// manyListed is a directory that lists more lots than it has.
type manyListed struct {
	directory.Store
	names []string
}

func (m *manyListed) List(ctx context.Context, path string) ([]string, error) {
	if path == "lots" {
		return m.names, nil
	}
	return m.Store.List(ctx, path)
}

// manyLots are so many that the line has verified, with random numbers in the place of moduli.
func manyLots(t testing.TB, line *Line, n int) {
	t.Helper()
	manifests, listed := make([]*directory.Manifest, n), &manyListed{Store: line.store}
	for i := range manifests {
		tac, err := kme.ParseTAC(fmt.Sprintf("35%06d", i))
		if err != nil {
			t.Fatal(err)
		}
		modulus := make([]byte, 384)
		rand.Read(modulus)
		modulus[0], modulus[383] = modulus[0]|0x80, modulus[383]|1
		manifests[i] = &directory.Manifest{Lot: fmt.Sprintf("M%06d", i), N: modulus,
			Ranges: []directory.Range{{TAC: tac, First: 0, Count: 100_000}}}
		listed.names = append(listed.names, manifests[i].Lot)
	}
	known := must(memory.Open(t.Context(), line.state.Dir, line.Manufacturer()))
	if err := errors.Join(known.Add(t.Context(), manifests), known.Close()); err != nil {
		t.Fatal(err)
	}
	line.store = listed
	line.reader = directory.NewReader(line.store, line.verifier, directory.ReaderOptions{})
}

// A manifest is read once, and what it takes is checked each time; also by another process.
func TestPublishedLots(t *testing.T) {
	line, store := counting(t)
	for i := range 5 {
		n := make([]byte, 256)
		n[0], n[255] = 0x80, byte(2*i+1)
		s := spec(t, fmt.Sprint("L", i), 100*i, 10)
		m := s.manifest(line.Manufacturer())
		m.N, m.Mechanism = n, "none"
		err := directory.Publish(t.Context(), store, directory.ManifestPath(m.Lot), line.signer,
			directory.TypeManifest, m)
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"unpublished", "L1~"} { // somebody's copy of a lot has no name of a lot
		if err := os.MkdirAll(filepath.Join(store.dir, "lots", name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	store.take()
	look := func(want int) (all []memory.Lot) {
		t.Helper()
		all = must(line.publishedLots(t.Context()))
		if calls := store.take(); calls["read"] != want+1 || calls["list"] != 1 { // and of the unpublished one
			t.Errorf("%v, and not %d manifests read", calls, want+1)
		}
		return all
	}
	first := look(5)
	line = must(NewLine(line.token, store, line.state))
	if second := look(0); len(first) != 5 || !reflect.DeepEqual(first, second) {
		t.Errorf("%v, and from memory %v", first, second)
	}
	overlapping := spec(t, "L9", 205, 10)
	if _, err := line.CreateLot(t.Context(), overlapping); err == nil || !strings.Contains(err.Error(), "in lot L2") {
		t.Errorf("a lot that overlaps one from memory: %v", err)
	}
	if _, err := line.CreateLot(t.Context(), spec(t, "L8", 900, 10)); err != nil {
		t.Fatal(err)
	}
	store.take()
	if all := look(0); len(all) != 6 {
		t.Errorf("%v", all)
	}
	// The memory of another manufacturer's lots is none.
	line.signer = must(directory.NewSigner(must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))))
	if _, err := line.publishedLots(t.Context()); err != nil {
		t.Fatal(err)
	}
	if calls := store.take(); calls["read"] != 6+1 {
		t.Errorf("another manufacturer's line: %v", calls)
	}
}

// What lot create does with the lots that there are, KMEHSM_LOTS or 1,000, beside the token's work: it reads what it
// knows of them, and looks for overlaps and common factors.
func BenchmarkCompareWithLots(b *testing.B) {
	n, err := strconv.Atoi(cmp.Or(os.Getenv("KMEHSM_LOTS"), "1000"))
	if err != nil {
		b.Fatal(err)
	}
	signer := must(directory.NewSigner(must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))))
	line := &Line{signer: signer, verifier: directory.NewVerifier(signer.Public()), state: State{Dir: b.TempDir()},
		store: must(filestore.Open(b.TempDir()))}
	manyLots(b, line, n)
	tac := must(kme.ParseTAC("36000000"))
	m := &directory.Manifest{Ranges: []directory.Range{{TAC: tac, First: 0, Count: 10}}}
	modulus := new(big.Int).Mul(must(rand.Prime(rand.Reader, 1536)), must(rand.Prime(rand.Reader, 1536)))
	defer testproc.ReportCPU(b)()
	for b.Loop() {
		all := must(line.publishedLots(b.Context()))
		for _, other := range all {
			if m.Overlap(&directory.Manifest{Ranges: other.Ranges}) != nil {
				b.Fatal("an overlap")
			}
		}
		err := weakkey.CommonFactors(modulus, moduli(all))
		if err != nil || len(all) != n {
			b.Fatal(len(all), err)
		}
	}
}
