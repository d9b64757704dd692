package directory

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// A memory is a Store of this process's.
type memory struct {
	mu      sync.Mutex
	objects map[string][]byte // by path; guarded by mu
	version map[string]int    // by path; guarded by mu
}

func newMemory() *memory { return &memory{objects: map[string][]byte{}, version: map[string]int{}} }

func (m *memory) Create(ctx context.Context, path string, data []byte) error {
	err := m.Update(ctx, path, data, "")
	if errors.Is(err, ErrChanged) {
		err = nil
		if have, _, _ := m.Read(ctx, path); !bytes.Equal(have, data) {
			err = NewConflictError(path, have, data)
		}
	}
	return err
}

func (m *memory) Read(_ context.Context, path string) (data []byte, version string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	data, ok := m.objects[path]
	if !ok {
		return nil, "", fmt.Errorf("%s: %w", path, ErrNotFound)
	}
	return bytes.Clone(data), fmt.Sprint(m.version[path]), nil
}

func (m *memory) Update(_ context.Context, path string, data []byte, version string) error {
	if err := CheckSize(path, data); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var now string
	if _, ok := m.objects[path]; ok {
		now = fmt.Sprint(m.version[path])
	}
	if now != version {
		return fmt.Errorf("%s: %w", path, ErrChanged)
	}
	m.objects[path] = bytes.Clone(data)
	m.version[path]++
	return nil
}

func (m *memory) List(_ context.Context, path string) (names []string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for p := range m.objects {
		if name, ok := strings.CutPrefix(p, path+"/"); ok {
			name, _, _ = strings.Cut(name, "/")
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

func (m *memory) remove(path string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.objects, path)
}
