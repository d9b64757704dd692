package hsmkeys

import (
	"context"

	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

// RememberLotKeys looks the keys of all lots up at once, and says how many there are: after that, none is looked for
// when its first payload comes. Without it all goes well too.
func (t *OperatorToken) RememberLotKeys(ctx context.Context) (n int, err error) {
	n, err = keyop.RememberPrivateKeys(t.hsm, func(f func(*p11.Session) error) error {
		return t.hsm.With(ctx, "look for a key", f)
	})
	return n, p11.Explain("look for the keys of all lots", err)
}
