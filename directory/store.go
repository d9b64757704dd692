package directory

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
)

// A Store keeps objects by path. It verifies nothing. All methods may be called concurrently and by several processes;
// changes are durable when they return. They refuse what CheckSize refuses. Package storetest tests that an
// implementation keeps this contract.
type Store interface {
	// Create creates an object. If there is one with the same bytes, it succeeds; with other bytes, it fails with a
	// *ConflictError.
	Create(ctx context.Context, path string, data []byte) error
	// Read gives an object and its version, for Update; else ErrNotFound, or a *RefusedError for what can be none.
	Read(ctx context.Context, path string) (data []byte, version string, err error)
	// Update replaces an object if it still has this version; an empty version means that there is no object. Otherwise
	// it fails with ErrChanged.
	Update(ctx context.Context, path string, data []byte, version string) error
	// List gives the names directly below a path, sorted; none if there is nothing.
	List(ctx context.Context, path string) ([]string, error)
}

var (
	// ErrNotFound: the store has no such object.
	ErrNotFound = errors.New("not in the directory")
	// ErrChanged: the object has changed since it was read.
	ErrChanged = errors.New("changed since it was read")
	// ErrNotCurrent: a lot's list of revoked devices is refused, or cannot be read again; see ReaderOptions.Strict.
	ErrNotCurrent = errors.New("it is not known which devices are revoked now")
	// ErrUnavailable: the store cannot be reached, or is sealed; the same call may work later.
	ErrUnavailable = errors.New("the directory is not available")
)

// MaxObject is the largest size of an object, in bytes. It is the same in every store, so that a directory can be
// moved: Vault on Raft storage takes 1 MiB by default, with some 100 bytes of its own.
const MaxObject = 1_000_000

// CheckSize refuses an object that is too large for a store.
func CheckSize(path string, data []byte) error {
	if len(data) > MaxObject {
		return fmt.Errorf("%s has %d bytes, not %d at most: it was not written", path, len(data), MaxObject)
	}
	return nil
}

// A ConflictError says that a path has other bytes than those that were to be created.
type ConflictError struct {
	Path       string
	Have, Want [sha256.Size]byte // SHA-256 of what is there, and of what was to be
}

// NewConflictError makes one of what a path has, and of what was to be created there.
func NewConflictError(path string, have, want []byte) *ConflictError {
	return &ConflictError{Path: path, Have: sha256.Sum256(have), Want: sha256.Sum256(want)}
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("%s is published already with other content (SHA-256 %x, not %x): what is published is never "+
		"replaced", e.Path, e.Have, e.Want)
}
