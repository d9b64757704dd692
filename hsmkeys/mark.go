package hsmkeys

import (
	"context"
	"errors"

	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

// Marks gives the marks in the token. There are several if processes set one at the same time, or were killed while
// they did.
func (t *OperatorToken) Marks(ctx context.Context) ([][]byte, error) {
	return p11.Do(ctx, t.hsm, "read the high-water mark", func(s *p11.Session) (all [][]byte, err error) {
		found, err := keyop.Marks(s)
		for _, n := range found {
			all = append(all, n.Text)
		}
		return all, p11.Explain("read the high-water mark", err)
	})
}

// SetMark sets a mark and removes the given others; marks that another process has set meanwhile stay. It needs the
// user PIN. It makes a new object, because one that is changed in place could be lost when the process is killed.
func (t *OperatorToken) SetMark(ctx context.Context, mark []byte, others [][]byte) error {
	return t.as(ctx, Operator, "set the high-water mark", func(s *p11.Session) error {
		return p11.Explain("set the high-water mark", keyop.SetMark(s, mark, others))
	})
}

// Marks gives those of all tokens that are there.
func (p *OperatorPool) Marks(ctx context.Context) (all [][]byte, err error) {
	var errs []error
	for _, t := range p.pool.Tokens() {
		marks, err := t.Marks(ctx)
		all = append(all, marks...)
		errs = append(errs, err)
	}
	if len(all) > 0 {
		return all, nil
	}
	return nil, errors.Join(errs...)
}

// SetMark sets it in all tokens. It fails if none could be set.
func (p *OperatorPool) SetMark(ctx context.Context, mark []byte, others [][]byte) error {
	var errs []error
	for _, t := range p.pool.Tokens() {
		if err := t.SetMark(ctx, mark, others); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) < len(p.pool.Tokens()) {
		return nil
	}
	return errors.Join(errs...)
}
