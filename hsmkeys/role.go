package hsmkeys

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// A Dedication says what a token is for. It is an object in the token, which init makes and nobody can change: JSON,
// see p11.Session.PutNote.
type Dedication struct {
	Side Side `json:"role"`
	// in which ways the token does not keep keys secret, as the administrator who ran init has accepted
	Weak []string `json:"weak,omitempty"`
}

// ErrNotDedicated: init was not run on the token.
var ErrNotDedicated = usage.Errorf("the token has no keys of this project yet: run init first")

// Dedicate makes a token one side's for ever. It refuses a token of the other side. If the token is dedicated already,
// nothing changes.
func (b *base) Dedicate(ctx context.Context, d Dedication) (created bool, err error) {
	text, err := json.Marshal(d)
	if err != nil {
		return false, err
	}
	return p11.Do(ctx, b.hsm, "dedicate the token", func(s *p11.Session) (bool, error) {
		if err := b.mustBe(s, d.Side); !errors.Is(err, ErrNotDedicated) {
			return false, err
		}
		err := s.PutNote(keyspec.DedicationLabel, text, ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, false),
			ck.Attr(pkcs11.CKA_DESTROYABLE, false)})
		return err == nil, p11.Explain("say in the token what it is for", err)
	})
}

// Weak says in which ways the token does not keep keys secret. They were accepted when it was initialised.
func (b *base) Weak(ctx context.Context) (weak []string, err error) {
	return p11.Do(ctx, b.hsm, "ask what the token is for", func(s *p11.Session) ([]string, error) {
		d, err := b.dedication(s)
		if err != nil {
			return nil, err
		}
		return d.Weak, nil
	})
}

// doAs is p11.Do on a token of one side.
func doAs[T any](
	ctx context.Context, b *base, side Side, operation string, f func(*p11.Session) (T, error),
) (T, error) {
	return p11.Do(ctx, b.hsm, operation, func(s *p11.Session) (v T, err error) {
		if err := b.mustBe(s, side); err != nil {
			return v, err
		}
		return f(s)
	})
}

// as is doAs for what has no result.
func (b *base) as(ctx context.Context, side Side, operation string, f func(*p11.Session) error) error {
	_, err := doAs(ctx, b, side, operation, func(s *p11.Session) (none struct{}, err error) { return none, f(s) })
	return err
}

// MustBe refuses a token that is not of this side.
func (b *base) MustBe(ctx context.Context, side Side) error {
	return b.hsm.With(ctx, "ask what the token is for", func(s *p11.Session) error { return b.mustBe(s, side) })
}

func (b *base) mustBe(s *p11.Session, side Side) error {
	d, err := b.dedication(s)
	if err != nil {
		return err
	}
	if d.Side != side {
		return usage.Errorf("%s is a token of the %s's, by what its init wrote into it: name one of the %s's", b,
			d.Side, side)
	}
	return nil
}

func (b *base) dedication(s *p11.Session) (*Dedication, error) {
	if d := b.dedicated.Load(); d != nil {
		return d, nil
	}
	found, err := s.Notes(keyspec.DedicationLabel, nil)
	if err != nil {
		return nil, p11.Explain("ask what the token is for", err)
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("%s: %w", b, ErrNotDedicated)
	case 1:
	default:
		return nil, fmt.Errorf("%s has %d objects %q: somebody has put another beside the one of its init; remove it "+
			"with the token's own tool", b, len(found), keyspec.DedicationLabel)
	}
	d := new(Dedication)
	if err := json.Unmarshal(found[0].Text, d); err != nil || d.Side != Factory && d.Side != Operator {
		return nil, fmt.Errorf("%s does not say whether it is a factory's or an operator's: its object %q is damaged",
			b, keyspec.DedicationLabel)
	}
	b.dedicated.Store(d)
	return d, nil
}
