package operator

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/binding/tokenkeys"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/kme"
)

// A backup brings the storage and ledger key to another token.
func TestCreateBackup(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	from, to, stranger := softhsmtest.Token(t), softhsmtest.Token(t), softhsmtest.Token(t)
	path := filepath.Join(dir, "restore-key.json")
	initialise(t, from, t.TempDir())
	derived := func(tok softhsmtest.Tok) (key kme.Secret) {
		t.Helper()
		withToken(t, tok, func(token *hsmkeys.OperatorToken) (err error) {
			key, err = token.Derive(ctx, sqlstore.RowKey)
			return err
		})
		return key
	}
	var thumbprint string
	withToken(t, to, func(token *hsmkeys.OperatorToken) (err error) {
		thumbprint, err = NewRestoreKey(ctx, token, true, path)
		return err
	})
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := handover.ParseReceiver(handover.TypeRestoreKey, data, thumbprint)
	if err != nil {
		t.Fatal(err)
	}
	// Of a token that is not the operator's, the security officer's PIN is not tried.
	if _, err := CreateBackup(ctx, stranger.URI, "wrong", pub); !errors.Is(err, hsmkeys.ErrNotDedicated) {
		t.Errorf("a backup of a token that is not the operator's: %v", err)
	}
	b, err := CreateBackup(ctx, from.URI, hsmkeys.PIN(from.SOPIN), pub)
	if err != nil {
		t.Fatal(err)
	}
	if b.Token == "" || len(b.Keys) != 2 {
		t.Errorf("%+v", b)
	}
	withToken(t, to, func(token *hsmkeys.OperatorToken) error {
		_, err := tokenkeys.Restore(ctx, token, b.Data, b.Thumbprint)
		return err
	})
	if !derived(from).Equal(derived(to)) {
		t.Error("the other token has other keys")
	}
}

// A key whose public half cannot be written for whoever needs it is not kept.
func TestNewTransportKey(t *testing.T) {
	dir, ctx, tok := t.TempDir(), t.Context(), softhsmtest.Token(t)
	initialise(t, tok, t.TempDir())
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	withToken(t, tok, func(token *hsmkeys.OperatorToken) error {
		if _, err := NewTransportKey(ctx, token, filepath.Join(dir, "file", "t.json")); err == nil {
			t.Error("a file was written below a file")
		}
		if all, err := TransportKeys(ctx, token); err != nil || len(all) != 0 {
			t.Errorf("left: %v, %v", all, err)
		}
		thumbprint, err := NewTransportKey(ctx, token, filepath.Join(dir, "t.json"))
		if err != nil {
			return err
		}
		all, err := TransportKeys(ctx, token)
		if err != nil || len(all) != 1 || all[thumbprint] == nil {
			t.Errorf("%v, %v, not %s", all, err, thumbprint)
		}
		return nil
	})
}
