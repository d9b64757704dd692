// Package cache has what we use of otter's cache behind an interface. A struct with a field of otter's own generic
// type makes each package that imports it, however far above, compile all of otter again (decision 37).
package cache

import "github.com/maypok86/otter/v2"

// A Cache is described at otter.Cache.
type Cache[K comparable, V any] interface {
	GetIfPresent(K) (V, bool)
	GetEntryQuietly(K) (otter.Entry[K, V], bool)
	Set(K, V) (V, bool)
	SetIfAbsent(K, V) (V, bool)
	Invalidate(K) (V, bool)
	CleanUp()
}

// New makes a Cache. It panics if its options contradict each other.
func New[K comparable, V any](o *otter.Options[K, V]) Cache[K, V] { return otter.Must(o) }
