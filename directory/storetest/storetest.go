// Package storetest holds every directory.Store to its contract.
package storetest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/must"
)

// Run runs the suite. newStore gives an empty store each time, as two processes see it: both values are the same store,
// opened twice if that can be.
func Run(t *testing.T, newStore func(t *testing.T) (one, two directory.Store)) {
	ctx := context.Background()
	path := directory.ManifestPath("L1")
	create := func(t *testing.T, s directory.Store, path, data string) {
		t.Helper()
		must.Do(t, s.Create(ctx, path, []byte(data)))
	}
	read := func(t *testing.T, s directory.Store, path string) (string, string) {
		t.Helper()
		data, version, err := s.Read(ctx, path)
		if err != nil {
			t.Fatal(err)
		}
		return string(data), version
	}

	t.Run("create and read", func(t *testing.T) {
		one, two := newStore(t)
		if _, _, err := one.Read(ctx, path); !errors.Is(err, directory.ErrNotFound) {
			t.Errorf("before: %v", err)
		}
		// The objects are JWS, so text; a shard may be large.
		large := string(bytes.Repeat([]byte("eyJ."), 100_000))
		for p, data := range map[string]string{path: "a.b.c", directory.ShardPath("L1", 0): "x",
			directory.ShardPath("L1", 999_999): large, directory.ManifestPath("L2"): "z"} {
			create(t, one, p, data)
			for _, s := range []directory.Store{one, two} {
				if got, version := read(t, s, p); got != data || version == "" {
					t.Errorf("%s: %d bytes, version %q", p, len(got), version)
				}
			}
		}
	})
	t.Run("create again", func(t *testing.T) {
		one, two := newStore(t)
		create(t, one, path, "first")
		_, version := read(t, one, path)
		for _, s := range []directory.Store{one, two} {
			create(t, s, path, "first")
			err := s.Create(ctx, path, []byte("second"))
			var conflict *directory.ConflictError
			if !errors.As(err, &conflict) {
				t.Fatalf("other bytes: %v", err)
			}
			if conflict.Path != path || conflict.Have != sha256.Sum256([]byte("first")) ||
				conflict.Want != sha256.Sum256([]byte("second")) {
				t.Errorf("%+v", conflict)
			}
		}
		if got, now := read(t, two, path); got != "first" || now != version {
			t.Errorf("%q, version %q, was %q", got, now, version)
		}
	})
	t.Run("update", func(t *testing.T) {
		one, two := newStore(t)
		path := directory.RevocationsPath("L1")
		if err := one.Update(ctx, path, []byte("1"), "7"); !errors.Is(err, directory.ErrChanged) {
			t.Errorf("a version of what is not there: %v", err)
		}
		must.Do(t, one.Update(ctx, path, []byte("1"), ""))
		if err := two.Update(ctx, path, []byte("2"), ""); !errors.Is(err, directory.ErrChanged) {
			t.Errorf("as new, where there is one: %v", err)
		}
		_, first := read(t, two, path)
		must.Do(t, two.Update(ctx, path, []byte("2"), first))
		if err := one.Update(ctx, path, []byte("3"), first); !errors.Is(err, directory.ErrChanged) {
			t.Errorf("a version of before: %v", err)
		}
		if got, now := read(t, one, path); got != "2" || now == first {
			t.Errorf("%q, version %q after %q", got, now, first)
		}
	})
	t.Run("the largest object", func(t *testing.T) {
		one, two := newStore(t)
		path := directory.RevocationsPath("L1")
		large := string(bytes.Repeat([]byte("e"), directory.MaxObject))
		for what, err := range map[string]error{"create": one.Create(ctx, path, []byte(large+"e")),
			"update": one.Update(ctx, path, []byte(large+"e"), "")} {
			if err == nil || errors.Is(err, directory.ErrUnavailable) || !strings.Contains(err.Error(), "at most") {
				t.Errorf("%s of a larger one: %v", what, err)
			}
		}
		if _, _, err := two.Read(ctx, path); !errors.Is(err, directory.ErrNotFound) {
			t.Errorf("something was written: %v", err)
		}
		create(t, one, directory.ManifestPath("L1"), large)
		if err := one.Update(ctx, path, []byte(large), ""); err != nil {
			t.Error(err)
		}
		for _, p := range []string{path, directory.ManifestPath("L1")} {
			if got, _ := read(t, two, p); got != large {
				t.Errorf("%s: %d bytes", p, len(got))
			}
		}
	})
	t.Run("an object beside a folder", func(t *testing.T) {
		one, two := newStore(t)
		for _, p := range []string{directory.RevocationsPath("L1"), directory.RevocationPartPath("L1", 0),
			directory.RevocationPartPath("L1", 976)} {
			must.Do(t, one.Update(ctx, p, []byte(p), ""))
			if got, _ := read(t, two, p); got != p {
				t.Errorf("%s: %q", p, got)
			}
		}
		if names, err := two.List(ctx, directory.RevocationPartsPath("L1")); err != nil ||
			!slices.Equal(names, []string{"000000", "000976"}) {
			t.Error(names, err)
		}
	})
	t.Run("list", func(t *testing.T) {
		one, two := newStore(t)
		if names, err := one.List(ctx, "lots"); err != nil || len(names) != 0 {
			t.Errorf("empty: %v, %v", names, err)
		}
		for _, lot := range []string{"b", "a", "c.1"} {
			create(t, one, directory.ManifestPath(lot), lot)
			create(t, one, directory.ShardPath(lot, 3), lot)
		}
		for path, want := range map[string][]string{"lots": {"a", "b", "c.1"}, "lots/a": {"manifest", "shards"},
			"lots/a/shards": {"000003"}, "lots/none": nil} {
			if names, err := two.List(ctx, path); err != nil || !slices.Equal(names, want) {
				t.Errorf("%s: %v, %v; want %v", path, names, err, want)
			}
		}
	})
	t.Run("a caller that has gone", func(t *testing.T) {
		one, _ := newStore(t)
		gone, cancel := context.WithCancel(ctx)
		cancel()
		_, _, err := one.Read(gone, path)
		_, lerr := one.List(gone, "lots")
		for what, err := range map[string]error{"create": one.Create(gone, path, []byte("x")), "read": err,
			"update": one.Update(gone, path, []byte("x"), ""), "list": lerr} {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v", what, err)
			}
		}
		if _, _, err := one.Read(ctx, path); !errors.Is(err, directory.ErrNotFound) {
			t.Errorf("something was written: %v", err)
		}
	})
	t.Run("creating at once", func(t *testing.T) {
		one, two := newStore(t)
		won := race(func(i int) error {
			return []directory.Store{one, two}[i%2].Create(ctx, path, fmt.Appendf(nil, "content %d", i))
		}, func(err error) {
			if !errors.As(err, new(*directory.ConflictError)) {
				t.Error(err)
			}
		})
		if len(won) != 1 {
			t.Fatalf("%v won", won)
		}
		if got, _ := read(t, two, path); got != fmt.Sprintf("content %d", won[0]) {
			t.Errorf("%d won, and %q is there", won[0], got)
		}
	})
	t.Run("creating the same at once", func(t *testing.T) {
		one, two := newStore(t)
		won := race(func(i int) error {
			return []directory.Store{one, two}[i%2].Create(ctx, path, []byte("same"))
		}, func(err error) { t.Error(err) })
		if len(won) != racers {
			t.Errorf("%v of %d", won, racers)
		}
	})
	t.Run("updating at once", func(t *testing.T) {
		one, two := newStore(t)
		path, version := directory.RevocationsPath("L1"), ""
		for round := range 3 {
			won := race(func(i int) error {
				return []directory.Store{one, two}[i%2].Update(ctx, path, fmt.Appendf(nil, "%d.%d", round, i), version)
			}, func(err error) {
				if !errors.Is(err, directory.ErrChanged) {
					t.Error(err)
				}
			})
			if len(won) != 1 {
				t.Fatalf("round %d: %v won", round, won)
			}
			var got string
			if got, version = read(t, one, path); got != fmt.Sprintf("%d.%d", round, won[0]) {
				t.Errorf("%d won, and %q is there", won[0], got)
			}
		}
	})
}

const racers = 16

// race runs f for many at once, and says for whom it succeeded; lost gets the others' errors.
func race(f func(i int) error, lost func(error)) (won []int) {
	var mu sync.Mutex
	var all sync.WaitGroup
	start := make(chan struct{})
	for i := range racers {
		all.Go(func() {
			<-start
			err := f(i)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won = append(won, i)
			} else {
				lost(err)
			}
		})
	}
	close(start)
	all.Wait()
	return won
}
