package hsmkeys

import (
	"context"

	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

// RememberLotKeys finds the keys of all lots at once, and says how many there are. It saves the search at each lot's
// first payload, and changes nothing else.
func (t *OperatorToken) RememberLotKeys(ctx context.Context) (n int, err error) {
	n, err = keyop.RememberPrivateKeys(t.hsm, func(f func(*p11.Session) error) error {
		return t.hsm.With(ctx, "look for a key", f)
	})
	return n, p11.Explain("look for the keys of all lots", err)
}
