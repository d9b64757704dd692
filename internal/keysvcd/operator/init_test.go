package operator

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
)

// Init alone makes a store. It makes none beside one that the token has written elsewhere, and takes none that another
// token has written.
func TestInit(t *testing.T) {
	dir, ctx, tok, other := t.TempDir(), t.Context(), softhsmtest.Token(t), softhsmtest.Token(t)
	name, path := sqlstore.InFolder(dir), filepath.Join(dir, "keysvc.db")
	refused := func(tok softhsmtest.Tok, i Init, says string) {
		t.Helper()
		withToken(t, tok, func(token *hsmkeys.OperatorToken) error {
			if made, err := i.Run(ctx, token); err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("%+v, %v; want %q", made, err, says)
			}
			return nil
		})
	}
	open := func() (err error) {
		withToken(t, tok, func(token *hsmkeys.OperatorToken) error {
			err = UseStore(ctx, token, name, openAttempt(t))
			return nil
		})
		return err
	}
	if err := open(); err == nil || !strings.Contains(err.Error(), "run keysvc init first") {
		t.Error(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil { // as an init that was killed leaves it
		t.Fatal(err)
	}
	if err := open(); err == nil || !strings.Contains(err.Error(), "run keysvc init first") {
		t.Errorf("an empty file: %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Size() != 0 {
		t.Errorf("a command that reads has made a store: %v, %v", info, err)
	}
	initialise(t, tok, dir)
	if err := open(); err != nil {
		t.Error(err)
	}

	// The same again changes nothing.
	withToken(t, tok, func(token *hsmkeys.OperatorToken) error {
		made, err := newInit(tok, dir).Run(ctx, token)
		if err == nil && (made.Keys || made.Store) {
			t.Errorf("made again: %+v", made)
		}
		return err
	})

	// Another token, without keys and with some.
	refused(other, newInit(other, dir), "which another token has written")
	withToken(t, other, func(token *hsmkeys.OperatorToken) error {
		if _, err := token.Weak(ctx); !errors.Is(err, hsmkeys.ErrNotDedicated) {
			t.Errorf("a refused init has made keys: %v", err)
		}
		return nil
	})
	if uri, err := TokenURI(dir, os.Getenv("KMEHSM_TOKEN"), false); err != nil || uri != tok.URI {
		t.Errorf("the folder remembers %s, %v", uri, err)
	}

	initialise(t, other, t.TempDir())
	refused(other, newInit(other, dir), "this token is not the one that it was written with")

	// In a wrong folder, and where the store is lost.
	wrong := t.TempDir()
	refused(tok, newInit(tok, wrong), "has written a store")
	if left, err := os.ReadDir(wrong); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	refused(tok, newInit(tok, dir), "--new-store")
	withToken(t, tok, func(token *hsmkeys.OperatorToken) error {
		i := newInit(tok, dir)
		i.NewStore = true
		made, err := i.Run(ctx, token)
		if err == nil && (made.Keys || !made.Store) {
			t.Errorf("%+v", made)
		}
		return err
	})
}
