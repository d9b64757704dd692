package memory

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/durable"
)

// A Guard is the directory of a line, whose lists of revoked devices, and their parts, never go back. A copy of the
// last one that was read or published is in the line's folder, by the same path. Without it, whoever runs the directory
// could put an earlier list back, and the line would sign it anew, as a later one.
type Guard struct {
	directory.Store
	dir      string
	verifier *directory.Verifier
	readOnly bool // copies are compared, and never written
}

// NewGuard guards a directory, with the copies in the line's folder dir.
func NewGuard(store directory.Store, dir string, v *directory.Verifier) *Guard {
	return &Guard{Store: store, dir: dir, verifier: v}
}

// NewReadingGuard guards a directory for a process that may not write to the line's folder dir: it compares what it
// reads with the line's copies, and with its own, which are in the folder own.
func NewReadingGuard(store directory.Store, dir, own string, v *directory.Verifier) *Guard {
	return NewGuard(&Guard{Store: store, dir: dir, verifier: v, readOnly: true}, own, v)
}

// Read is the store's. It refuses a list, or a part, that is earlier than the line's copy, another of the same version,
// or not there.
func (g *Guard) Read(ctx context.Context, path string) ([]byte, string, error) {
	if !changes(path) {
		return g.Store.Read(ctx, path)
	}
	// The copy first: meanwhile, another process of the line may publish a later object, and copy that.
	kept, kerr := os.ReadFile(g.file(path))
	jws, version, err := g.Store.Read(ctx, path)
	refused, ok := errors.AsType[*directory.RefusedError](err)
	if err == nil || errors.Is(err, directory.ErrNotFound) || ok && !refused.Rollback {
		err = g.follow(path, kept, kerr, jws, err)
	} // else it says nothing of the object, or another guard has refused it
	return jws, version, err
}

// Update is the store's.
func (g *Guard) Update(ctx context.Context, path string, jws []byte, version string) error {
	err := g.Store.Update(ctx, path, jws, version)
	if err == nil && changes(path) {
		err = g.keep(path, jws)
	}
	return err
}

// PutBack publishes the line's copies of a lot's list and its parts again, where Read refuses what is there. Parts come
// first: the list names them.
func (g *Guard) PutBack(ctx context.Context, lot string) error {
	names, err := os.ReadDir(g.file(directory.RevocationPartsPath(lot)))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var paths []string
	for _, e := range names {
		if !strings.HasPrefix(e.Name(), ".") { // else a process was killed while it wrote that
			paths = append(paths, directory.RevocationPartsPath(lot)+"/"+e.Name())
		}
	}
	for _, path := range append(paths, directory.RevocationsPath(lot)) {
		_, version, err := g.Read(ctx, path)
		if refused, ok := errors.AsType[*directory.RefusedError](err); ok && refused.Rollback {
			var kept []byte
			if kept, err = os.ReadFile(g.file(path)); err == nil {
				err = g.Store.Update(ctx, path, kept, version)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// changes says whether an object is one of those that are replaced: a list of revoked devices, or a part of one.
func changes(path string) bool {
	names := strings.Split(path, "/")
	return len(names) == 3 && names[2] == "revocations" || len(names) == 4 && names[2] == "revoked"
}

func (g *Guard) file(path string) string { return filepath.Join(g.dir, filepath.FromSlash(path)) }

// follow keeps an object that is later than the line's copy, and refuses one that is not, unless it is the same. kerr
// is the error of reading the copy, and err that of reading the object.
func (g *Guard) follow(path string, kept []byte, kerr error, jws []byte, err error) error {
	if kerr == nil && err == nil && bytes.Equal(jws, kept) {
		return nil
	}
	was := 0
	if !errors.Is(kerr, fs.ErrNotExist) {
		if kerr == nil {
			was, kerr = g.version(path, kept)
		}
		if kerr != nil { // the error is no RefusedError, which is about the directory
			return fmt.Errorf("the line's copy %s cannot be used: bring it back from a backup of the folder: %v",
				g.file(path), kerr)
		}
	}
	now, what := 0, "it is not there"
	if err == nil {
		now, err = g.version(path, jws)
		what = fmt.Sprintf("it has version %d", now)
	}
	if now > was {
		if g.readOnly {
			return nil
		}
		return g.keep(path, jws)
	}
	if was == 0 {
		return err
	}
	if refused, ok := errors.AsType[*directory.RefusedError](err); ok {
		what = refused.Reason
	}
	return &directory.RefusedError{Object: path, Rollback: true, Reason: fmt.Sprintf("%s, and the copy %s is "+
		"another one, of version %d: find out who changed the directory; factory reconcile --repair, on the line that "+
		"published that one, publishes it again", what, g.file(path), was)}
}

func (g *Guard) keep(path string, jws []byte) error {
	file := g.file(path)
	err := durable.MkdirAll(filepath.Dir(file), 0o755)
	if err == nil {
		err = durable.WriteFile(file, jws, 0o644)
	}
	if err != nil {
		err = fmt.Errorf("the line's copy of %s cannot be written: %w", path, err)
	}
	return err
}

// version is that of an object, which must be the one that belongs at this path: a later one of another lot is not
// kept.
func (g *Guard) version(path string, jws []byte) (version int, err error) {
	belongs := ""
	if strings.HasSuffix(path, "/revocations") {
		var list directory.Revocations
		err = g.verifier.Verify(directory.TypeRevocations, path, jws, &list)
		version, belongs = list.Version, directory.RevocationsPath(list.Lot)
	} else {
		var part directory.RevocationPart
		err = g.verifier.Verify(directory.TypeRevocationPart, path, jws, &part)
		version, belongs = part.Version, directory.RevocationPartPath(part.Lot, part.Part)
	}
	if err == nil && belongs != path {
		err = &directory.RefusedError{Object: path, Reason: "it is " + belongs}
	}
	if err != nil {
		return 0, err
	}
	return version, nil
}
