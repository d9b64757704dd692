package factory

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// The names of the line's keys. All but the signing key are those of one manufacturer, whom the signing key names.

var signingKey = hsmkeys.Key{Role: hsmkeys.RoleSigning}

func injectionKey(manufacturer, fixture string) hsmkeys.Key {
	return hsmkeys.Key{Role: hsmkeys.RoleInjection, Manufacturer: manufacturer, Name: fixture}
}

func (l *Line) lotKey(lot string) hsmkeys.Key {
	return hsmkeys.Key{Role: hsmkeys.RoleLot, Manufacturer: l.Manufacturer(), Name: lot}
}

func kekOf(manufacturer, operator string) hsmkeys.Key {
	return hsmkeys.Key{Role: hsmkeys.RoleKEK, Manufacturer: manufacturer, Name: operator}
}

// Init makes the token the manufacturer's and makes the signing key, unless that was done, and gives the public signing
// key as PEM: what operators pin. It refuses a token that could hold no lot.
func Init(ctx context.Context, token Token) (pem []byte, keyID string, created bool, err error) {
	if err := refuseWeak(ctx, token); err != nil {
		return nil, "", false, err
	}
	if created, err = token.Dedicate(ctx, hsmkeys.Dedication{Side: hsmkeys.Factory}); err != nil {
		return nil, "", false, err
	}
	made, err := token.EnsureSigningKey(ctx, signingKey)
	if err != nil {
		return nil, "", false, err
	}
	signer, err := openSigner(token)
	if err != nil {
		return nil, "", false, err
	}
	pem, err = pemkey.Encode(signer.Public())
	return pem, signer.KeyID(), created || made, err
}

// Keys are the keys that the line needs of its own, each in its newest generation: the signing key, and the injection
// keys of all fixtures, whose names are known once the signing key is there.
func Keys(ctx context.Context, token Token) (keys []hsmkeys.Key, err error) {
	signing, err := newest(ctx, token, signingKey)
	if err != nil {
		return nil, err
	}
	keys = append(keys, signing)
	signer, err := openSigner(token)
	if errors.Is(err, errNoSigningKey) {
		return keys, nil
	}
	if err != nil {
		return nil, err
	}
	fixtures, err := token.Fixtures(ctx, signer.KeyID())
	if err != nil {
		return nil, err
	}
	slices.Sort(fixtures)
	for _, name := range fixtures {
		injection, err := newest(ctx, token, injectionKey(signer.KeyID(), name))
		if err != nil {
			return nil, err
		}
		keys = append(keys, injection)
	}
	return keys, nil
}

// newest is the last generation of a key that the token has; the first if it has none.
func newest(ctx context.Context, token Token, k hsmkeys.Key) (hsmkeys.Key, error) {
	last := k
	for g := range k.Generations() {
		if has, err := token.Has(ctx, g); err != nil || !has {
			return last, err
		}
		last = g
	}
	return last, nil
}

// next checks that generation is one that a key has, or the one after, and gives it.
func next(ctx context.Context, token Token, k hsmkeys.Key, generation int) (hsmkeys.Key, error) {
	have, err := newest(ctx, token, k)
	if err != nil {
		return k, err
	}
	if now := max(have.Generation, 1); generation < 1 || generation > now+1 {
		return k, fmt.Errorf("%s has generation %d now: the next is %d", k.Label(), now, now+1)
	}
	if generation > hsmkeys.MaxGenerations {
		return k, fmt.Errorf("a key has %d generations at most", hsmkeys.MaxGenerations)
	}
	k.Generation = generation
	return k, nil
}

// RotateSigningKey makes a generation of the signing key, from 2 on. If the token has it already, it stays as it is.
// The line goes on meanwhile; commands that begin later sign with the new key. What they sign carries the statements
// that lead from the first key, which readers still pin, to the new one. The earlier keys stay in the token, to sign
// those statements.
func RotateSigningKey(ctx context.Context, token Token, generation int) (keyID string, created bool, err error) {
	if _, err := openSigner(token); err != nil {
		return "", false, err
	}
	k, err := next(ctx, token, signingKey, generation)
	if err != nil {
		return "", false, err
	}
	if created, err = token.EnsureSigningKey(ctx, k); err != nil {
		return "", false, err
	}
	signer, err := openSigner(token)
	if err != nil {
		return "", false, err
	}
	return signer.SigningKeyID(), created, nil
}

var errNoSigningKey = usage.Errorf("the token has no signing key yet: run factory init first")

// openSigner signs with the newest signing key, which the earlier ones introduce.
func openSigner(token Token) (signer *directory.Signer, err error) {
	for g := range signingKey.Generations() {
		s, err := token.Signer(g)
		switch {
		case errors.Is(err, hsmkeys.ErrNoKey) && signer == nil:
			return nil, errNoSigningKey
		case errors.Is(err, hsmkeys.ErrNoKey):
			return signer, nil
		case err == nil && signer == nil:
			signer, err = directory.NewSigner(s)
		case err == nil:
			signer, err = signer.Succeed(s)
		}
		if err != nil {
			return nil, err
		}
	}
	return signer, nil
}

// injection is the injection key, in its newest generation, of a fixture; of the only one if no name is given.
func (l *Line) injection(ctx context.Context, fixture string) (k hsmkeys.Key, err error) {
	all, err := l.token.Fixtures(ctx, l.Manufacturer())
	if err != nil {
		return k, err
	}
	slices.Sort(all)
	switch {
	case len(all) == 0:
		return k, errors.New("no fixture is enrolled, so nobody could inject the device keys: run factory fixture " +
			"enroll first")
	case fixture == "" && len(all) == 1:
		fixture = all[0]
	case fixture == "":
		return k, usage.In("fixture", usage.Errorf("%d fixtures are enrolled, and injection packages are for one: say "+
			"which, of %s", len(all), strings.Join(all, ", ")))
	case !slices.Contains(all, fixture):
		return k, fmt.Errorf("no fixture %s is enrolled, but %s: run factory fixture enroll %[1]s first", fixture,
			strings.Join(all, ", "))
	}
	return newest(ctx, l.token, injectionKey(l.Manufacturer(), fixture))
}
