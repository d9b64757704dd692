// Package memscan finds what a program has left in its memory. It is for tests that secrets are wiped: a test that looks at the buffers
// it knows of cannot see the copies that it does not know of.
package memscan

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"unsafe"
)

const chunk = 1 << 20

// canary is on the heap, so that a search that sees nothing is not taken for one that finds nothing.
var canary = bytes.Clone([]byte("what every search has to find too"))

// A Needle is a secret to look for, kept where Find does not look; and masked but for the first bytes: a signal leaves the contents of the registers in
// memory, so that no register may have the whole of it.
type Needle []byte

const (
	open = 4
	mask = 0x5a
)

// outside is memory that Go's heap knows nothing of.
func outside(t testing.TB, size int) []byte {
	t.Helper()
	b, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Munmap(b) })
	return b
}

// Take moves a secret out of b, which it wipes.
func Take(t testing.TB, b []byte) Needle {
	t.Helper()
	n := outside(t, len(b))
	for i := range n {
		n[i] = b[i]
		if i >= open {
			n[i] ^= mask
		}
	}
	clear(b)
	return n
}

// Find says at how many places of Go's heap, stacks of goroutines among them, a secret stands, in use or left behind. It looks at no C memory: a
// token that is a library has its secrets there.
func Find(t testing.TB, n Needle) (places int) {
	t.Helper()
	scrub := outside(t, 512)
	copy(scrub[256:], scrub[:256]) // zeros, through all registers that copies go through (runtime/memmove_amd64.s)
	mark, seen := Take(t, bytes.Clone(canary)), 0
	buffer := outside(t, chunk+len(n)+len(mark))
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	for _, part := range heap(t) {
		from, to := part[0], part[1]
		for at := from; at < to; at += chunk {
			// Longer than a chunk, for what stands across its end; counted by where it begins.
			text := buffer[:min(uint64(len(buffer)), to-at)]
			if _, err := mem.ReadAt(text, int64(at)); err != nil {
				t.Fatal(err)
			}
			places += count(text, n)
			seen += count(text, mark)
		}
	}
	if seen == 0 {
		t.Fatal("what is in memory is not found there")
	}
	return places
}

// heap is what can be read of Go's heap: the mapping that holds a thing on it, and those beside it without a gap. Where it begins differs by run.
func heap(t testing.TB) (parts [][2]uint64) {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	known := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(canary))))
	var last uint64
	found := false
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil {
			t.Fatal(err)
		}
		if from != last {
			if found {
				break
			}
			parts = nil
		}
		if last = to; mode[:2] == "rw" {
			parts = append(parts, [2]uint64{from, to})
		}
		found = found || from <= known && known < to
	}
	return parts
}

func count(in []byte, n Needle) (places int) {
	for at := 0; ; at++ {
		i := bytes.Index(in[at:], n[:open])
		if at += i; i < 0 || at >= chunk || len(in)-at < len(n) {
			return places
		}
		j := open
		for j < len(n) && in[at+j]^mask == n[j] {
			j++
		}
		if j == len(n) {
			places++
		}
	}
}
