package hsmkeys

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"iter"
	"math/big"

	"github.com/letsencrypt/boulder/goodkey"

	"github.com/kmehsm/kmehsm/kme"
)

// fermatRounds is what Boulder runs in production: it finds primes that are closer than any good generator makes them.
const fermatRounds = 110

// CheckLotKey refuses a modulus that is not good: its exact length, e = 65537, small prime factors, ROCA
// (CVE-2017-15361) and primes close together (Fermat's factorisation).
func CheckLotKey(ctx context.Context, pub *rsa.PublicKey, bits int) error {
	if got := pub.N.BitLen(); got != bits {
		return fmt.Errorf("the token made a modulus of %d bits, not %d: do not use this token for lots", got, bits)
	}
	if pub.E != kme.PublicExponent {
		return fmt.Errorf("the token made a key with public exponent %d, not %d: do not use this token for lots", pub.E, kme.PublicExponent)
	}
	policy, err := goodkey.NewPolicy(&goodkey.Config{FermatRounds: fermatRounds}, nil)
	if err != nil {
		return err
	}
	if err := policy.GoodKey(ctx, pub); err != nil {
		return fmt.Errorf("the modulus is weak: %w: do not use this token for lots", err)
	}
	return nil
}

// CheckCommonFactors refuses a modulus that shares a prime with an earlier one, or is one of them: both keys are
// then open to anybody who computes a greatest common divisor. For one new modulus, the product of the earlier ones is
// needed only modulo it, which costs one multiplication each and constant memory; a product tree pays when all are
// checked against all.
func CheckCommonFactors(n *big.Int, earlier iter.Seq2[string, *big.Int]) error {
	product := big.NewInt(1)
	for name, m := range earlier {
		if m.Cmp(n) == 0 {
			return fmt.Errorf("the modulus is that of lot %s: the token's random numbers repeat; do not use it", name)
		}
		product.Mod(product.Mul(product, m), n)
	}
	if new(big.Int).GCD(nil, nil, product, n).Cmp(big.NewInt(1)) == 0 {
		return nil
	}
	for name, m := range earlier {
		if new(big.Int).GCD(nil, nil, m, n).Cmp(big.NewInt(1)) != 0 {
			return fmt.Errorf("the modulus shares a prime with that of lot %s: both are broken; do not use this token, and replace that lot", name)
		}
	}
	return errors.New("the modulus shares a prime with an earlier one")
}
