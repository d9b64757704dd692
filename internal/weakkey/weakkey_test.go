package weakkey

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"math/big"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testkeys"
)

func prime(t *testing.T, bits int) *big.Int {
	t.Helper()
	p, err := rand.Prime(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestCheck(t *testing.T) {
	good := must.Get[*rsa.PrivateKey](t)(testkeys.RSA(2048)).PublicKey
	p := prime(t, 1024)
	q := new(big.Int).Add(p, big.NewInt(2))
	for !q.ProbablyPrime(20) {
		q.Add(q, big.NewInt(2))
	}
	small := new(big.Int).Mul(prime(t, 2038), big.NewInt(751))
	for small.BitLen() != 2048 {
		small.Mul(prime(t, 2038), big.NewInt(751))
	}
	for name, c := range map[string]struct {
		n    *big.Int
		e    int
		bits int
		want string
	}{
		"good":         {good.N, 65537, 2048, ""},
		"other length": {good.N, 65537, 3072, "2048 bits"},
		"e = 3":        {good.N, 3, 2048, "exponent is 3,"},
		"e = 65536":    {good.N, 65536, 2048, "exponent is 65536,"},
		"even":         {new(big.Int).Sub(good.N, big.NewInt(1)), 65537, 2048, "weak"},
		"small factor": {small, 65537, 2048, "small prime"},
		"close primes": {new(big.Int).Mul(p, q), 65537, new(big.Int).Mul(p, q).BitLen(), "weak"},
		"ROCA":         {rocaModulus(t), 65537, 2048, "Infineon"},
	} {
		t.Run(name, func(t *testing.T) {
			err := Check(t.Context(), &rsa.PublicKey{N: c.n, E: c.e}, c.bits)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// A key that a KEK or an injection key is wrapped to was made by somebody else.
func TestCheckWrapping(t *testing.T) {
	good := must.Get[*rsa.PrivateKey](t)(testkeys.RSA(3072))
	mersenne := func(p uint) *big.Int { n := new(big.Int).Lsh(big.NewInt(1), p); return n.Sub(n, big.NewInt(1)) }
	three := new(big.Int).Exp(big.NewInt(3), big.NewInt(1938), nil)
	for name, c := range map[string]struct {
		n    *big.Int
		e    int
		want string
	}{
		"good":         {good.N, 65537, ""},
		"short":        {new(big.Int).Rsh(good.N, 1), 65537, "3071 bits"},
		"e = 3":        {good.N, 3, "exponent is 3"},
		"even":         {new(big.Int).Sub(good.N, big.NewInt(1)), 65537, "small prime"},
		"a power of 3": {three, 65537, "small prime"},
		"a prime":      {mersenne(3217), 65537, "a prime"},
		"a square":     {new(big.Int).Exp(mersenne(2203), big.NewInt(2), nil), 65537, "a square"},
		// powers of 65537, still
		"ROCA": {new(big.Int).Exp(rocaModulus(t), big.NewInt(3), nil), 65537, "Infineon"},
	} {
		if err := CheckWrapping(&rsa.PublicKey{N: c.n, E: c.e}); (err == nil) != (c.want == "") || err != nil &&
			!strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
}

// rocaModulus has the fingerprint of CVE-2017-15361: modulo each of the first primes it is a power of 65537. The other
// small primes, which are tried before, do not divide it.
func rocaModulus(t *testing.T) *big.Int {
	t.Helper()
	fingerprint, others := big.NewInt(1), big.NewInt(1)
	for i := int64(2); i < 752; i++ {
		switch p := big.NewInt(i); {
		case !p.ProbablyPrime(10):
		case i <= 167:
			fingerprint.Mul(fingerprint, p)
		default:
			others.Mul(others, p)
		}
	}
	power := new(big.Int).Exp(big.NewInt(65537), prime(t, 32), fingerprint)
	n := prime(t, 2048)
	n.Add(n.Sub(n, new(big.Int).Mod(n, fingerprint)), power)
	for new(big.Int).GCD(nil, nil, n, others).Cmp(big.NewInt(1)) != 0 {
		n.Sub(n, fingerprint)
	}
	return n
}

func TestCommonFactors(t *testing.T) {
	p, q, r, s := prime(t, 512), prime(t, 512), prime(t, 512), prime(t, 512)
	mul := func(a, b *big.Int) *big.Int { return new(big.Int).Mul(a, b) }
	earlier := func(yield func(string, *big.Int) bool) {
		for name, n := range map[string]*big.Int{"A": mul(p, q), "B": mul(prime(t, 512), prime(t, 512))} {
			if !yield(name, n) {
				return
			}
		}
	}
	for name, c := range map[string]struct {
		n    *big.Int
		want string
	}{
		"fresh":       {mul(r, s), ""},
		"shared":      {mul(q, r), "shares a prime with that of lot A"},
		"the same":    {mul(p, q), "is that of lot A"},
		"a square of": {mul(p, p), "shares a prime with that of lot A"},
	} {
		t.Run(name, func(t *testing.T) {
			err := CommonFactors(c.n, earlier)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// A manufacturer's thousandth lot. The numbers are random: a product does not care whether its factors are good keys.
func BenchmarkCommonFactors(b *testing.B) {
	number := func() *big.Int {
		n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 3072))
		if err != nil {
			b.Fatal(err)
		}
		return n.SetBit(n, 0, 1)
	}
	earlier := make([]*big.Int, 1000)
	for i := range earlier {
		earlier[i] = number()
	}
	n := number()
	for b.Loop() {
		CommonFactors(n, func(yield func(string, *big.Int) bool) {
			for _, m := range earlier {
				if !yield("", m) {
					return
				}
			}
		})
	}
}

// Moduli of small primes, so that all pairs can be looked at too.
func TestSharedFactors(t *testing.T) {
	random := mathrand.New(mathrand.NewPCG(1, 2))
	var primes []*big.Int
	for n := int64(10_001); len(primes) < 60; n += 2 {
		if p := big.NewInt(n); p.ProbablyPrime(0) {
			primes = append(primes, p)
		}
	}
	found := 0
	for round := range 300 {
		moduli := make([]*big.Int, round%24)
		for i := range moduli {
			moduli[i] = new(big.Int).Mul(primes[random.IntN(len(primes))], primes[random.IntN(len(primes))])
		}
		var want []int
		for i, n := range moduli {
			for j, m := range moduli {
				if i != j && new(big.Int).GCD(nil, nil, n, m).Cmp(big.NewInt(1)) != 0 {
					want = append(want, i)
					break
				}
			}
		}
		got, err := SharedFactors(t.Context(), moduli)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%v: %v, want %v, %v", moduli, got, want, err)
		}
		found += len(want)
	}
	if found == 0 {
		t.Error("nothing was to be found")
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := SharedFactors(ended, []*big.Int{big.NewInt(15), big.NewInt(21), big.NewInt(35)}); !errors.Is(err,
		context.Canceled) {
		t.Error(err)
	}
}

// Ten thousand moduli of 3072 bits, of which two share a prime. The products need not be of primes for that.
func BenchmarkSharedFactors(b *testing.B) {
	moduli := make([]*big.Int, 10_000)
	for i := range moduli {
		n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 3071))
		if err != nil {
			b.Fatal(err)
		}
		moduli[i] = n.SetBit(n.SetBit(n, 3071, 1), 0, 1)
	}
	for b.Loop() {
		if _, err := SharedFactors(b.Context(), moduli); err != nil {
			b.Fatal(err)
		}
	}
}
