package hsmkeys

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// A Side is whose token it is. A token has keys of one side only: on a token of both, who may use the one's could send
// the other's away.
type Side string

const (
	Factory  Side = "factory"  // the manufacturer's
	Operator Side = "operator" // the operator's
)

// A Dedication says what a token is for. It is an object in the token, which init makes and nobody can change: JSON,
// see putNote.
type Dedication struct {
	Side Side     `json:"role"`
	Weak []string `json:"weak,omitempty"` // what the token does not keep secret as it should, and who made it was told and accepted
}

const dedicationLabel = "kme token role"

// ErrNotDedicated: init was not run on the token.
var ErrNotDedicated = errors.New("the token has no keys of this project yet: run init first")

// Dedicate says for ever that the token is of one side. A token that is of the other is refused; of one that is
// dedicated already, nothing changes.
func (t *Token) Dedicate(ctx context.Context, d Dedication) (created bool, err error) {
	text, err := json.Marshal(d)
	if err != nil {
		return false, err
	}
	return do(ctx, t, "dedicate the token", func(s *session) (bool, error) {
		if err := t.mustBe(s, d.Side); !errors.Is(err, ErrNotDedicated) {
			return false, err
		}
		err := s.putNote(dedicationLabel, text, attributes{attr(pkcs11.CKA_PRIVATE, false), attr(pkcs11.CKA_DESTROYABLE, false)})
		return err == nil, explainIf("say in the token what it is for", err)
	})
}

// Weak is what the token does not keep secret as it should. It was accepted when the token was initialised.
func (t *Token) Weak(ctx context.Context) (weak []string, err error) {
	return do(ctx, t, "ask what the token is for", func(s *session) ([]string, error) {
		d, err := t.dedication(s)
		if err != nil {
			return nil, err
		}
		return d.Weak, nil
	})
}

// doAs is do on a token of one side.
func doAs[T any](ctx context.Context, t *Token, side Side, operation string, f func(*session) (T, error)) (T, error) {
	return do(ctx, t, operation, func(s *session) (v T, err error) {
		if err := t.mustBe(s, side); err != nil {
			return v, err
		}
		return f(s)
	})
}

// MustBe refuses a token that is not of this side.
func (t *Token) MustBe(ctx context.Context, side Side) error {
	return t.with(ctx, "ask what the token is for", func(s *session) error { return t.mustBe(s, side) })
}

func (t *Token) mustBe(s *session, side Side) error {
	d, err := t.dedication(s)
	if err != nil {
		return err
	}
	if d.Side != side {
		return fmt.Errorf("%s is a token of the %s's, by what its init wrote into it: give --token of the %s's", t, d.Side, side)
	}
	return nil
}

func (t *Token) dedication(s *session) (*Dedication, error) {
	if d := t.dedicated.Load(); d != nil {
		return d, nil
	}
	found, err := s.notes(dedicationLabel, nil)
	if err != nil {
		return nil, explain("ask what the token is for", err)
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("%s: %w", t, ErrNotDedicated)
	case 1:
	default:
		return nil, fmt.Errorf("%s has %d objects %q: somebody has put another beside the one of its init; remove it with the token's own tool", t, len(found), dedicationLabel)
	}
	d := new(Dedication)
	if err := json.Unmarshal(found[0].text, d); err != nil || d.Side != Factory && d.Side != Operator {
		return nil, fmt.Errorf("%s does not say whether it is a factory's or an operator's: its object %q is damaged", t, dedicationLabel)
	}
	t.dedicated.Store(d)
	return d, nil
}
