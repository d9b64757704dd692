// Package memscan finds what a program has left in its memory. It is for tests that secrets are wiped: a test that
// looks at the buffers that it knows of cannot see the copies that it does not know of.
//
// It sees the heap and the frames of calls under way. What it does not see is what nobody can wipe in Go: frames of
// calls that have returned, until others overwrite them. Registers that were saved for a signal it does see: they hold
// 16 bytes each, so that a secret is to be longer.
package memscan

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"syscall"
	"testing"

	"github.com/kmehsm/kmehsm/internal/must"
)

// A Memory is this program's, for the time of a test that runs alone.
type Memory struct{ t testing.TB }

// canary is on the heap, so that a search that sees nothing is not taken for one that finds nothing.
var canary = bytes.Clone([]byte("what every search has to find too"))

// Of turns the garbage collector off until the test ends: memory that is dropped keeps its content, and is found.
func Of(t testing.TB) Memory {
	runtime.GC()
	percent := debug.SetGCPercent(-1)
	t.Cleanup(func() { debug.SetGCPercent(percent) })
	return Memory{t: t}
}

// A Needle is a secret to look for, kept where Find does not look.
type Needle []byte

// Take copies a secret.
func (m Memory) Take(secret []byte) Needle {
	m.t.Helper()
	n := m.outside(-1, len(secret), syscall.MAP_ANON|syscall.MAP_PRIVATE)
	copy(n, secret)
	return n
}

// outside is memory that Go's heap knows nothing of.
func (m Memory) outside(fd, size, flags int) []byte {
	m.t.Helper()
	b := must.Get[[]byte](m.t)(syscall.Mmap(fd, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, flags))
	m.t.Cleanup(func() { syscall.Munmap(b) })
	return b
}

// Find says at how many places each secret stands.
func (m Memory) Find(all []Needle) (places []int) {
	m.t.Helper()
	f := must.Get[*os.File](m.t)(os.Create(filepath.Join(m.t.TempDir(), "heap")))
	defer f.Close()
	debug.WriteHeapDump(f.Fd())
	end := must.Get[int64](m.t)(f.Seek(0, 2))
	dump := m.outside(int(f.Fd()), int(end), syscall.MAP_SHARED)
	if !bytes.Contains(dump, canary) {
		m.t.Fatal("what is in memory is not found there")
	}
	for _, n := range all {
		places = append(places, bytes.Count(dump, n))
	}
	return places
}
