package directory

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
)

// A Store keeps objects by path. It verifies nothing. All methods may be called concurrently and by several processes;
// what they have done is durable when they return. They write nothing that CheckSize refuses. Package storetest holds
// every implementation to this.
type Store interface {
	// Create puts an object where there is none. The same bytes again are success; other bytes a *ConflictError.
	Create(ctx context.Context, path string, data []byte) error
	// Read gives an object and its version, an opaque string for Update; or ErrNotFound.
	Read(ctx context.Context, path string) (data []byte, version string, err error)
	// Update replaces the object that has this version; an empty version stands for there being none. When it has
	// changed since, ErrChanged.
	Update(ctx context.Context, path string, data []byte, version string) error
	// List gives the names directly below a path, sorted; none if there is nothing.
	List(ctx context.Context, path string) ([]string, error)
}

var (
	// ErrNotFound: the store has no such object.
	ErrNotFound = errors.New("not in the directory")
	// ErrChanged: the object has changed since it was read.
	ErrChanged = errors.New("changed since it was read")
	// ErrUnavailable: the store cannot be reached, or is sealed; the same call may work later.
	ErrUnavailable = errors.New("the directory is not available")
)

// MaxObject is the most bytes that an object may have, in every store, so that a directory can move from one to
// another: Vault on Raft storage takes 1 MiB as it is set up, with some 100 bytes of its own.
const MaxObject = 1_000_000

// CheckSize refuses an object that no store takes.
func CheckSize(path string, data []byte) error {
	if len(data) > MaxObject {
		return fmt.Errorf("%s would have %d bytes, and an object has %d at most: it was not written", path,
			len(data), MaxObject)
	}
	return nil
}

// A ConflictError says that a path holds other bytes than those to be created there.
type ConflictError struct {
	Path       string
	Have, Want [sha256.Size]byte // SHA-256 of what is there, and of what was to be
}

// NewConflictError compares what a path has with what it was to get.
func NewConflictError(path string, have, want []byte) *ConflictError {
	return &ConflictError{Path: path, Have: sha256.Sum256(have), Want: sha256.Sum256(want)}
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("%s is published already with other content (SHA-256 %x, not %x): what is published is never "+
		"replaced", e.Path, e.Have, e.Want)
}
