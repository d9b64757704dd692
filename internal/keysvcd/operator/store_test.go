package operator

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/kme"
)

func TestTokenURI(t *testing.T) {
	t.Setenv("KMEHSM_TOKEN", "pkcs11:token=environment")
	dir := t.TempDir()
	check := func(given, want string) {
		t.Helper()
		if got, err := TokenURI(dir, given, false); err != nil || got != want {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	}
	check("pkcs11:token=environment", "pkcs11:token=environment")
	if err := rememberToken(dir, "pkcs11:token=init"); err != nil {
		t.Fatal(err)
	}
	check("pkcs11:token=environment", "pkcs11:token=init")
	check("pkcs11:token=flag", "pkcs11:token=flag")
	if got, err := TokenURI(dir, "pkcs11:token=environment", true); err != nil || got != "pkcs11:token=environment" {
		t.Errorf("of the command line and the environment: %q, %v", got, err)
	}
	if os.Geteuid() == 0 { // root loads no library that another user names
		must.Do(t, os.Chown(dir, 65534, 65534))
		if uri, err := TokenURI(dir, "pkcs11:token=environment", false); !errors.As(err, new(usage.Error)) {
			t.Errorf("of another user's folder, root takes %q, %v", uri, err)
		}
		check("pkcs11:token=flag", "pkcs11:token=flag")
		must.Do(t, os.Chown(dir, 0, 0))
	}
	if err := os.Remove(filepath.Join(dir, tokenFile)); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, tokenFile), 0o700); err != nil {
		t.Fatal(err)
	}
	if uri, err := TokenURI(dir, "pkcs11:token=environment", false); err == nil {
		t.Errorf("a file that cannot be read: %q", uri)
	}
}

// A store that is rolled back is neither used nor copied; it can be opened all the same.
func TestRolledBackStore(t *testing.T) {
	dir, ctx, tok := t.TempDir(), t.Context(), softhsmtest.Token(t)
	name, other := sqlstore.InFolder(dir), "sqlite:"+filepath.Join(dir, "other.db")
	initialise(t, tok, dir)
	withToken(t, tok, func(token *hsmkeys.OperatorToken) error {
		if err := UseStore(ctx, token, name, openAttempt(t)); err != nil {
			return err
		}
		before, err := os.ReadFile(filepath.Join(dir, "keysvc.db"))
		if err != nil {
			return err
		}
		if err := UseStore(ctx, token, name, openAttempt(t)); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "keysvc.db"), before, 0o600); err != nil {
			return err
		}
		err = UseStore(ctx, token, name, func(*sqlstore.Store) error { t.Error("it is used"); return nil })
		if !errors.Is(err, binding.ErrRolledBack) {
			t.Errorf("used: %v", err)
		}
		if _, err := Migrate(ctx, token, name, other, func(int) {}); !errors.Is(err, binding.ErrRolledBack) {
			t.Errorf("copied: %v", err)
		}
		store, err := OpenStore(ctx, token, name)
		if err != nil {
			return err
		}
		v, err := VerifyStore(ctx, token, store, func(int, int) {})
		if err != nil || v.OK || v.RolledBack == "" {
			t.Errorf("verified: %+v, %v", v, err)
		}
		return store.Close()
	})
}

// A markless token cannot say what the mark is.
type markless struct {
	*hsmkeys.OperatorToken
	marks [][]byte
	err   error
}

func (m markless) Marks(context.Context) ([][]byte, error) { return m.marks, m.err }

// A store whose mark is not known is not one that is rolled back: the error is the token's.
func TestVerifyWithoutMark(t *testing.T) {
	dir, ctx, tok := t.TempDir(), t.Context(), softhsmtest.Token(t)
	initialise(t, tok, dir)
	withToken(t, tok, func(token *hsmkeys.OperatorToken) error {
		for want, m := range map[string]markless{
			"the token is away":                           {token, nil, errors.New("the token is away")},
			"the high-water mark in the token is damaged": {token, [][]byte{[]byte("{")}, nil},
		} {
			store := must.Get[*sqlstore.Store](t)(OpenStore(ctx, token, sqlstore.InFolder(dir)))
			v, err := VerifyStore(ctx, m, store, func(int, int) {})
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%+v, %v, want %q", v, err, want)
			}
			must.Do(t, store.Close())
		}
		return nil
	})
}

// openAttempt makes an entry in the ledger.
func openAttempt(t *testing.T) func(*sqlstore.Store) error {
	t.Helper()
	imsi, err := kme.ParseIMSI("001010000000001")
	if err != nil {
		t.Fatal(err)
	}
	a, err := binding.NewOpened(imsi, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return func(s *sqlstore.Store) error { return s.OpenAttempt(t.Context(), *a) }
}

// A copy is what the token goes on with: its ledger says that it was made, and the one that was copied is an earlier
// one.
func TestMigrate(t *testing.T) {
	dir, ctx, tok := t.TempDir(), t.Context(), softhsmtest.Token(t)
	name, other := sqlstore.InFolder(dir), "sqlite:"+filepath.Join(dir, "other.db")
	initialise(t, tok, dir)
	withToken(t, tok, func(token *hsmkeys.OperatorToken) error {
		if err := UseStore(ctx, token, name, openAttempt(t)); err != nil {
			return err
		}
		stop := must.Get[func()](t)(ServeAlone(name)) // whatever it confirms during the copy would be lost
		_, err := Migrate(ctx, token, name, other, func(int) {})
		if about, _ := errors.AsType[usage.About](err); about.Setting != "from" ||
			!strings.HasPrefix(err.Error(), "a keysvc serves from ") {
			t.Errorf("a store that is served was copied: %v", err)
		}
		if _, err := os.Stat(filepath.Join(dir, "other.db")); err == nil {
			t.Error("a refused copy has made a store")
		}
		stop()
		if rows, err := Migrate(ctx, token, name, other, func(int) {}); err != nil || rows == 0 {
			t.Errorf("%d rows: %v", rows, err)
		}
		if _, err := Migrate(ctx, token, name, other, func(int) {}); err == nil {
			t.Error("a store was copied into one that is not empty")
		}
		if err := UseStore(ctx, token, name, func(*sqlstore.Store) error {
			return nil
		}); !errors.Is(err, binding.ErrRolledBack) {
			t.Errorf("the store that was copied: %v", err)
		}
		return UseStore(ctx, token, other, func(s *sqlstore.Store) error {
			var events strings.Builder
			for e, err := range s.Entries(ctx) {
				if err != nil {
					return err
				}
				events.WriteString(string(e.Event) + " ")
			}
			if !strings.Contains(events.String(), string(binding.EventOpened)) {
				t.Errorf("the copy has %s", events.String())
			}
			all, err := StorageKeys(ctx, token, s)
			if err == nil && (len(all) != 1 || all[0].KMEs != 0) {
				t.Errorf("storage keys: %v", all)
			}
			return err
		})
	})
}
