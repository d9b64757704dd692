// Package operator opens the operator's token and store, for keysvc's commands and its daemon, and does what the
// commands do with them, while a service serves or not.
package operator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/mark"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/sqlite"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/kme"
)

// A Token is what a store needs of the operator's HSM: the key of its rows' MACs, and the ledger's high-water mark.
type Token interface {
	mark.Token
	fmt.Stringer
	Derive(ctx context.Context, purpose string) (kme.Secret, error)
}

// NoKeys is the error of a token that keysvc init has not been run for.
func NoKeys(token fmt.Stringer) error {
	return usage.Errorf("%s has no keys yet: run keysvc init first", token)
}

// OpenStore opens an existing store, also one that is rolled back or damaged.
func OpenStore(ctx context.Context, token Token, name string) (*sqlstore.Store, error) {
	if there, err := there(ctx, name); err != nil {
		return nil, err
	} else if !there {
		return nil, usage.Errorf("there is no store at %s: run keysvc init first; or, if it is elsewhere, name its "+
			"folder with state, or the store itself with store", sqlstore.File(name))
	}
	return makeStore(ctx, token, name)
}

// ServeAlone keeps every other service away from a store in SQLite, as long as this process lives: instances do not
// share what they have in memory: attempts, and rates. Commands may use the store meanwhile.
func ServeAlone(name string) (unlock func(), err error) {
	path := sqlstore.File(name)
	if path == "" {
		return func() {}, nil
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return nil, err
	}
	return durable.LockFile(path+".lock", func(holder string) error {
		return fmt.Errorf("a keysvc serves from %s already, %s: a store in SQLite is for one instance; stop that one "+
			"first, or give them a store in PostgreSQL, which is for several", path, holder)
	})
}

// makeStore opens a store. If it is in a file that does not exist, it makes it.
func makeStore(ctx context.Context, token Token, name string) (*sqlstore.Store, error) {
	if err := sqlstore.CheckName(name); err != nil {
		return nil, err
	}
	if path := sqlstore.File(name); path != "" {
		if err := durable.CheckOwner("keysvc", filepath.Dir(path)); err != nil {
			return nil, err
		}
	}
	key, err := token.Derive(ctx, sqlstore.RowKey)
	if errors.Is(err, hsmkeys.ErrNoKey) {
		return nil, NoKeys(token)
	}
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	return sqlstore.Open(ctx, name, key)
}

// there says whether a store exists. It says so of every store in a server, without asking.
func there(ctx context.Context, name string) (bool, error) {
	if sqlstore.File(name) == "" {
		return true, nil
	}
	return sqlstore.Look(ctx, name)
}

// UseStore runs f with a store, and raises the token's high-water mark afterwards. It refuses a store that is rolled
// back.
func UseStore(ctx context.Context, token Token, name string, f func(*sqlstore.Store) error) error {
	store, err := OpenStore(ctx, token, name)
	if err != nil {
		return err
	}
	if err = mark.Check(ctx, store, token); err == nil {
		err = errors.Join(f(store), mark.Raise(context.WithoutCancel(ctx), store, token))
	}
	return errors.Join(err, store.Close())
}

// Migrate copies a whole store into an empty one, and gives the number of rows. It refuses a store in SQLite that a
// service serves from. report is told the number so far.
func Migrate(ctx context.Context, token Token, from, to string, report func(rows int)) (rows int, err error) {
	if there, err := there(ctx, from); err == nil && !there {
		return 0, usage.In("from", usage.Errorf("there is no store at %s: check its path", sqlstore.File(from)))
	}
	source, err := OpenStore(ctx, token, from)
	if err != nil {
		return 0, usage.In("from", err)
	}
	defer func() { err = errors.Join(err, source.Close()) }()
	unlock, err := ServeAlone(from) // what a service confirmed meanwhile would be lost
	if err != nil {
		return 0, usage.In("from", err)
	}
	defer unlock()
	if err := mark.Check(ctx, source, token); err != nil {
		return 0, usage.In("from", err)
	}
	target, err := makeStore(ctx, token, to)
	if err != nil {
		return 0, usage.In("to", err)
	}
	defer func() { err = errors.Join(err, target.Close()) }()
	if rows, err = source.Copy(ctx, target, report); err == nil {
		err = mark.Raise(ctx, target, token)
	}
	return rows, err
}

// BackUpStore copies a store in SQLite to a file, also while a service changes it. Then it verifies the copy, and gives
// its report. The copy replaces the file only if a service wrote every row, and if it has all that the token's mark
// counted at the beginning. report is told how many pages are copied, and how many there are.
func BackUpStore(
	ctx context.Context, token Token, name, to string, report func(pages, of int),
) (found *sqlstore.Report, err error) {
	path, ok := strings.CutPrefix(name, "sqlite:")
	if !ok {
		return nil, usage.Errorf("this store is in PostgreSQL, whose own tools make its backups while the service " +
			"runs: pg_dump --format=custom one of this moment; pg_basebackup with a WAL archive (archive_command) " +
			"one that can be brought back to any moment; docs/backup-postgresql.md has the commands")
	}
	if info, err := os.Stat(filepath.Dir(to)); err != nil || !info.IsDir() {
		return nil, fmt.Errorf("there is no folder %s for the backup", filepath.Dir(to))
	}
	upTo, err := mark.Read(ctx, token)
	if err != nil {
		return nil, err
	}
	return found, UseStore(ctx, token, name, func(*sqlstore.Store) error {
		return sqlite.Backup(ctx, path, to, report, func(copied string) (err error) {
			if found, err = verifyCopy(ctx, token, "sqlite:"+copied, upTo); err == nil && len(found.Damaged) > 0 {
				err = fmt.Errorf("%w, and more", found.Damaged[0])
				if len(found.Damaged) == 1 {
					err = found.Damaged[0]
				}
			}
			if err != nil {
				err = fmt.Errorf("no backup was made, and %s is as it was: the copy is not good: %w", to, err)
			}
			return err
		})
	})
}

// verifyCopy verifies a whole store, which must not be behind a mark.
func verifyCopy(ctx context.Context, token Token, name string, upTo *binding.Mark) (*sqlstore.Report, error) {
	store, err := OpenStore(ctx, token, name)
	if err != nil {
		return nil, err
	}
	found, err := store.Verify(ctx, func(int, int) {})
	if err == nil {
		_, err = store.Check(ctx, upTo)
	}
	return found, errors.Join(err, store.Close())
}

// A Verification says whether a store is what the service has written last.
type Verification struct {
	*sqlstore.Report
	OK         bool   `json:"ok"`
	RolledBack string `json:"rolled_back,omitempty"` // why it is behind the token's high-water mark, if it is
}

// VerifyStore reads all of a store, and compares it with the token's high-water mark. report is called as by
// [sqlstore.Store.Verify].
func VerifyStore(
	ctx context.Context, token Token, store *sqlstore.Store, report func(rows, of int),
) (*Verification, error) {
	behind := mark.Check(ctx, store, token)
	if behind != nil && !errors.Is(behind, binding.ErrRolledBack) {
		return nil, behind
	}
	found, err := store.Verify(ctx, report)
	if err != nil {
		return nil, err
	}
	v := &Verification{Report: found, OK: behind == nil && len(found.Damaged) == 0}
	if behind != nil {
		v.RolledBack = behind.Error()
	}
	return v, nil
}

// Err is nil if the store is OK.
func (v *Verification) Err() error {
	if v.OK {
		return nil
	}
	return errors.New("the store is not what the service has written last: find out who has changed it; a " +
		"subscription that is damaged can be ended with keysvc binding revoke, a manufacturer or a lot needs a " +
		"backup of the store")
}

// A StorageKey is a generation of the storage key that a token has.
type StorageKey struct {
	Generation int `json:"generation"`
	KMEs       int `json:"kmes"` // that are sealed under it
}

// StorageKeys gives all generations, the newest last.
func StorageKeys(ctx context.Context, token *hsmkeys.OperatorToken, store *sqlstore.Store) ([]StorageKey, error) {
	generations, err := token.StorageGenerations(ctx)
	if err != nil {
		return nil, err
	}
	all := []StorageKey{}
	for _, g := range generations {
		from, err := store.CountSealed(ctx, hsmkeys.SealedFrom(g))
		if err != nil {
			return nil, err
		}
		to, err := store.CountSealed(ctx, hsmkeys.SealedFrom(g+1))
		if err != nil {
			return nil, err
		}
		all = append(all, StorageKey{Generation: g, KMEs: to - from})
	}
	return all, nil
}

// tokenFile is where keysvc init leaves the URI of the token in the --state folder.
const tokenFile = "token"

// rememberToken notes the token for TokenURI.
func rememberToken(state, uri string) error {
	return durable.WriteFile(filepath.Join(state, tokenFile), []byte(uri+"\n"), 0o600)
}

// TokenURI names the operator's token: the one of the command line; else the one that keysvc init has noted; else the
// one of the environment, which may be a factory's. given is that of the command line, of the environment, or, if both
// have none, of the configuration, which counts as the command line. The token's URI names a library that is loaded:
// root takes none that another user could have named.
func TokenURI(state, given string, typed bool) (uri string, err error) {
	if typed || given != os.Getenv("KMEHSM_TOKEN") {
		return given, nil
	}
	own, err := os.ReadFile(filepath.Join(state, tokenFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", cmp.Or(durable.CheckFolder("keysvc", state), err)
	}
	if err == nil {
		if err := durable.CheckOwner("keysvc", state); err != nil {
			return "", err
		}
	}
	return cmp.Or(strings.TrimSpace(string(own)), given), nil
}
