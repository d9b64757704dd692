package operator

import (
	"context"
	"errors"

	"github.com/kmehsm/kmehsm/binding/mark"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/binding/tokenkeys"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// An Init makes a token the operator's, with its keys, and the store in a file.
type Init struct {
	URI        string // of the token
	State      string // the folder that remembers the token
	Store      string // if it is in PostgreSQL, sqlstore.Upgrade has made its tables
	AcceptWeak bool
	NewStore   bool // also if the token has written another store
}

// Made says what this run of an Init has made.
type Made struct {
	Keys, Store bool
	Weak        []string // see tokenkeys.Dedicate
}

// Run makes what is missing. Before it makes anything, it refuses a store that another token has written. It also
// refuses a token that has written a store which is not there, unless NewStore: a new store would lack all decisions.
func (i Init) Run(ctx context.Context, token *hsmkeys.OperatorToken) (made Made, err error) {
	there, err := there(ctx, i.Store)
	switch {
	case err != nil:
	case !there && !i.NewStore:
		err = i.neverWrote(ctx, token)
	case there && sqlstore.File(i.Store) != "":
		err = i.fits(ctx, token)
	}
	if err != nil {
		return made, err
	}
	if made.Keys, made.Weak, err = tokenkeys.Init(ctx, token, i.AcceptWeak); err != nil {
		return made, err
	}
	if !there {
		store, err := makeStore(ctx, token, i.Store)
		if err != nil {
			return made, err
		}
		if err := store.Close(); err != nil {
			return made, err
		}
	}
	made.Store = !there
	return made, rememberToken(i.State, i.URI)
}

// neverWrote fails if a token has written a store.
func (i Init) neverWrote(ctx context.Context, token *hsmkeys.OperatorToken) error {
	if written, err := mark.Written(ctx, token); err != nil || !written {
		return err
	}
	return usage.Errorf("%s has written a store, and there is none at %s: name that one with --state or --store, or "+
		"bring it back from a backup; if it is lost, keysvc init --new-store makes an empty one, and keysvc store "+
		"accept-rollback has it served", token, i.Store)
}

// fits fails if another token has written the store.
func (i Init) fits(ctx context.Context, token *hsmkeys.OperatorToken) error {
	if err := token.MustBe(ctx, hsmkeys.Operator); err != nil && !errors.Is(err, hsmkeys.ErrNotDedicated) {
		return err
	}
	key, err := token.Derive(ctx, sqlstore.RowKey)
	if errors.Is(err, hsmkeys.ErrNoKey) {
		return usage.Errorf("%s has no keys yet, and there is a store at %s, which another token has written: bring "+
			"that token's keys to this one with keysvc backup; or name another --state; or, if that token is lost, "+
			"move the store away", token, i.Store)
	}
	if err != nil {
		return err
	}
	key.Wipe()
	return UseStore(ctx, token, i.Store, func(*sqlstore.Store) error { return nil })
}
