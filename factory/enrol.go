package factory

import (
	"context"
	"crypto/rsa"
	"fmt"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/handover"
)

// EnrollOperator makes an operator's KEK in the token, as the security officer, and wraps it for the operator's
// transport key. generation is that of the KEK: 0 for the newest, and one more than that to rotate it; an earlier one
// is for what was wrapped under it. It opens the token itself: nobody else in the process may have it open.
func EnrollOperator(ctx context.Context, tokenURI string, officer hsmkeys.PIN, operator string, transport *rsa.PublicKey, generation int) (e *handover.Enrolment, jws []byte, created bool, err error) {
	name := func(manufacturer string) hsmkeys.Key { return kekOf(manufacturer, operator) }
	created, err = enroll(ctx, tokenURI, officer, operator, name, transport, generation, func(kek hsmkeys.Key, wrapped []byte, s *directory.Signer) error {
		e = &handover.Enrolment{
			Manufacturer: kek.Manufacturer, Operator: operator, TransportKey: directory.RSAThumbprint(transport),
			KEK: kek.HexID(), Algorithm: handover.RSAOAEP, Wrapped: wrapped,
		}
		if err := e.Validate(); err != nil {
			return err
		}
		jws, err = s.Sign(handover.TypeEnrolment, e)
		return err
	})
	return e, jws, created, err
}

// EnrollFixture makes the injection key of a fixture that injects device keys, and wraps it for the fixture's RSA key,
// as EnrollOperator does for an operator. With one more than the newest generation, the packages made from then on are
// for that one.
func EnrollFixture(ctx context.Context, tokenURI string, officer hsmkeys.PIN, fixture string, key *rsa.PublicKey, generation int) (e *handover.FixtureEnrolment, created bool, err error) {
	name := func(manufacturer string) hsmkeys.Key { return injectionKey(manufacturer, fixture) }
	created, err = enroll(ctx, tokenURI, officer, fixture, name, key, generation, func(k hsmkeys.Key, wrapped []byte, s *directory.Signer) error {
		e = handover.NewFixtureEnrolment(fixture, k.HexID(), wrapped, s.Public())
		return nil
	})
	return e, created, err
}

func enroll(ctx context.Context, tokenURI string, officer hsmkeys.PIN, name string, named func(manufacturer string) hsmkeys.Key,
	to *rsa.PublicKey, generation int, done func(k hsmkeys.Key, wrapped []byte, s *directory.Signer) error,
) (created bool, err error) {
	if err := directory.CheckName(name); err != nil {
		return false, err
	}
	// The key is named after the manufacturer, whose signing key only a user's login shows; the security officer's
	// login ends that one.
	var k hsmkeys.Key
	err = withSigner(ctx, tokenURI, func(t *hsmkeys.Token, s *directory.Signer) (err error) {
		if k = named(s.KeyID()); generation > 0 {
			k, err = next(ctx, t, k, generation)
		} else {
			k, err = newest(ctx, t, k)
		}
		return err
	})
	if err != nil {
		return false, err
	}
	if created, err = hsmkeys.EnrollKey(ctx, tokenURI, officer, k, to); err != nil {
		return false, fmt.Errorf("enroll %s: %w", name, err)
	}
	return created, withSigner(ctx, tokenURI, func(t *hsmkeys.Token, s *directory.Signer) error {
		wrapped, err := t.WrapEnrolled(ctx, k)
		if err != nil {
			return err
		}
		return done(k, wrapped, s)
	})
}

func withSigner(ctx context.Context, tokenURI string, f func(*hsmkeys.Token, *directory.Signer) error) error {
	return withToken(ctx, tokenURI, func(token *hsmkeys.Token) error {
		signer, err := openSigner(token)
		if err != nil {
			return err
		}
		return f(token, signer)
	})
}

func withToken(ctx context.Context, uri string, f func(*hsmkeys.Token) error) error {
	token, err := hsmkeys.Open(ctx, uri)
	if err != nil {
		return err
	}
	defer token.Close()
	return f(token)
}
