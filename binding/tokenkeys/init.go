// Package tokenkeys looks after the operator token's own keys: it makes them, seals KMEs again under later ones, and
// carries them to another token.
package tokenkeys

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/kmehsm/kmehsm/binding/mark"
	"github.com/kmehsm/kmehsm/hsmkeys"
)

// An InitToken is what Init needs of the operator's HSM.
type InitToken interface {
	DedicateToken
	mark.Token
	EnsureStorageKey(ctx context.Context) (created bool, err error)
	EnsureLedgerKey(ctx context.Context) (created bool, err error)
}

// A DedicateToken is what Dedicate needs of it.
type DedicateToken interface {
	Weaknesses(ctx context.Context, side hsmkeys.Side) ([]hsmkeys.Finding, error)
	Weak(ctx context.Context) ([]string, error)
	Dedicate(ctx context.Context, d hsmkeys.Dedication) (created bool, err error)
}

// Init is Dedicate, and makes the token's storage key, ledger key and high-water mark unless it has them.
func Init(ctx context.Context, token InitToken, accept bool) (created bool, weak []string, err error) {
	created, weak, err = Dedicate(ctx, token, accept)
	ensureMark := func(ctx context.Context) (bool, error) { return mark.Ensure(ctx, token) }
	for _, ensure := range []func(context.Context) (bool, error){token.EnsureStorageKey,
		token.EnsureLedgerKey, ensureMark} {
		if err != nil {
			return false, nil, err
		}
		var made bool
		made, err = ensure(ctx)
		created = created || made
	}
	return created, weak, err
}

// Dedicate makes the token the operator's, unless that was done. A token that does not do what the secrecy of keys
// rests on is refused, unless it is accepted as it is: then weak is what it does not do, and the token itself says so
// from then on.
func Dedicate(ctx context.Context, token DedicateToken, accept bool) (created bool, weak []string, err error) {
	weak, err = token.Weak(ctx)
	if errors.Is(err, hsmkeys.ErrNotDedicated) {
		var found []hsmkeys.Finding
		if found, err = token.Weaknesses(ctx, hsmkeys.Operator); len(found) > 0 {
			weak = hsmkeys.Sentences(found)
			if !accept {
				return false, weak, fmt.Errorf("the token was tried, and keys would not be safe in it: %s: use "+
					"another token; or accept this one with --accept-weak-token, "+
					"and the service says so in its log and at /readyz for ever", strings.Join(weak, "; "))
			}
		}
	}
	if err != nil {
		return false, nil, err
	}
	created, err = token.Dedicate(ctx, hsmkeys.Dedication{Side: hsmkeys.Operator, Weak: weak})
	return created, weak, err
}
