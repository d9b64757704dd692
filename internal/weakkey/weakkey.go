// Package weakkey refuses RSA keys that are weak: by themselves, or beside others.
package weakkey

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"iter"
	"math/big"
	"runtime"
	"slices"
	"sync"

	"github.com/letsencrypt/boulder/goodkey"
	"github.com/titanous/rocacheck"
	"golang.org/x/sync/errgroup"

	"github.com/kmehsm/kmehsm/kme"
)

// fermatRounds is what Boulder runs in production: it finds primes that are closer than any good generator makes them.
const fermatRounds = 110

// Check refuses a modulus that is not good: its exact length, e = 65537, small prime factors, ROCA
// (CVE-2017-15361) and primes close together (Fermat's factorisation).
func Check(ctx context.Context, pub *rsa.PublicKey, bits int) error {
	if got := pub.N.BitLen(); got != bits {
		return fmt.Errorf("the modulus has %d bits, not %d", got, bits)
	}
	if pub.E != kme.PublicExponent {
		return fmt.Errorf("the public exponent is %d, not %d", pub.E, kme.PublicExponent)
	}
	policy, err := goodkey.NewPolicy(&goodkey.Config{FermatRounds: fermatRounds}, nil)
	if err != nil {
		return err
	}
	if err := policy.GoodKey(ctx, pub); err != nil {
		return fmt.Errorf("the modulus is weak: %w", err)
	}
	return nil
}

// CheckWrapping refuses a public key too weak to carry an AES-256 key.
func CheckWrapping(pub *rsa.PublicKey) error {
	if bits := pub.N.BitLen(); bits < 3072 || bits > 8192 {
		return fmt.Errorf("the RSA key has %d bits; it must have 3072 at least, to carry an AES-256 key", bits)
	}
	if pub.E != kme.PublicExponent {
		return fmt.Errorf("the RSA key's public exponent is %d; only %d is accepted", pub.E, kme.PublicExponent)
	}
	if err := checkModulus(pub.N); err != nil {
		return fmt.Errorf("the RSA key's modulus is weak: %w: it needs to be made anew, by another generator", err)
	}
	return nil
}

// checkModulus refuses a modulus of any length that others have made, if a quick look shows that it is weak: a small
// factor, a prime, a square, ROCA.
func checkModulus(n *big.Int) error {
	root := new(big.Int).Sqrt(n)
	switch {
	case new(big.Int).GCD(nil, nil, n, smallPrimes()).Cmp(big.NewInt(1)) != 0:
		return errors.New("it has a small prime factor")
	case n.ProbablyPrime(0):
		return errors.New("it is a prime")
	case root.Mul(root, root).Cmp(n) == 0:
		return errors.New("it is a square")
	case rocacheck.IsWeak(&rsa.PublicKey{N: n, E: kme.PublicExponent}):
		return errors.New("it was made by an Infineon chip (CVE-2017-15361)")
	}
	return nil
}

// smallPrimes is the product of the primes below 752, which is how far NIST SP 800-89 section 5.3.3 looks.
var smallPrimes = sync.OnceValue(func() *big.Int {
	product := big.NewInt(2)
	for p := int64(3); p < 752; p += 2 {
		if n := big.NewInt(p); n.ProbablyPrime(0) {
			product.Mul(product, n)
		}
	}
	return product
})

// CommonFactors refuses a modulus that shares a prime with an earlier one, or is one of them: whoever computes their
// greatest common divisor has both keys. For one new modulus, the product of the earlier ones is needed only modulo the
// new one. That costs one multiplication each, on all processors. A product tree pays when all are checked against all.
func CommonFactors(n *big.Int, earlier iter.Seq2[string, *big.Int]) error {
	var all []*big.Int
	for name, m := range earlier {
		if m.Cmp(n) == 0 {
			return fmt.Errorf("the modulus is that of lot %s: the token's random numbers repeat; do not use it", name)
		}
		all = append(all, m)
	}
	shares := slices.Collect(slices.Chunk(all, len(all)/runtime.GOMAXPROCS(0)+1)) // of the processors
	products := make([]*big.Int, len(shares))
	err := each(context.Background(), len(shares), func(i int) { products[i] = productModulo(n, shares[i]) })
	if err != nil {
		return err
	}
	if new(big.Int).GCD(nil, nil, productModulo(n, products), n).Cmp(big.NewInt(1)) == 0 {
		return nil
	}
	for name, m := range earlier {
		if new(big.Int).GCD(nil, nil, m, n).Cmp(big.NewInt(1)) != 0 {
			return fmt.Errorf("the modulus shares a prime with that of lot %s: both are broken; do not use this "+
				"token, and replace that lot", name)
		}
	}
	return errors.New("the modulus shares a prime with an earlier one")
}

func productModulo(n *big.Int, all []*big.Int) *big.Int {
	product, longer, quotient := big.NewInt(1), new(big.Int), new(big.Int)
	for _, m := range all {
		quotient.QuoRem(longer.Mul(product, m), n, product)
	}
	return product
}

// SharedFactors gives the places of those moduli that share a prime with another, or are another. It is Bernstein's
// batch algorithm ("How to find smooth parts of integers", 2004, as Heninger, Durumeric, Wustrow and Halderman used it
// in "Mining your Ps and Qs", 2012): a product tree, and what is left at each leaf of the product of all others.
// Instead of taking the product P modulo squares it keeps, at a node with product v, (P/v) mod v, which needs numbers
// half as long: for v = a*b, P/a = (P/v)*b.
func SharedFactors(ctx context.Context, moduli []*big.Int) ([]int, error) {
	if len(moduli) < 2 {
		return nil, nil
	}
	levels := [][]*big.Int{moduli}
	for level := moduli; len(level) > 2; {
		above := make([]*big.Int, (len(level)+1)/2)
		if err := each(ctx, len(above), func(i int) {
			if above[i] = level[2*i]; 2*i+1 < len(level) {
				above[i] = new(big.Int).Mul(level[2*i], level[2*i+1])
			}
		}); err != nil {
			return nil, err
		}
		levels, level = append(levels, above), above
	}
	others := []*big.Int{big.NewInt(1)} // (P/v) mod v of the level above
	for depth := len(levels) - 1; depth >= 0; depth-- {
		level := levels[depth]
		levels[depth] = nil
		below := make([]*big.Int, len(level))
		if err := each(ctx, len(level), func(i int) {
			v, rest := level[i], new(big.Int).Mod(others[i/2], level[i])
			if sibling := i ^ 1; sibling < len(level) {
				rest.Mul(rest, new(big.Int).Mod(level[sibling], v))
				rest.Mod(rest, v)
			}
			below[i] = rest
		}); err != nil {
			return nil, err
		}
		others = below
	}
	var shared []int
	one := big.NewInt(1)
	for i, rest := range others {
		if new(big.Int).GCD(nil, nil, rest, moduli[i]).Cmp(one) != 0 {
			shared = append(shared, i)
		}
	}
	return shared, nil
}

// each calls f with 0 to n-1, on all processors.
func each(ctx context.Context, n int, f func(int)) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i := range n {
		g.Go(func() error {
			if ctx.Err() == nil {
				f(i)
			}
			return ctx.Err()
		})
	}
	return g.Wait()
}
