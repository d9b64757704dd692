// Package testkeys has RSA keys for tests, which guard nothing: to look for their primes takes seconds under the race
// detector, and most of the CPU of a test in which a token does so.
package testkeys

import (
	"crypto/rand"
	"crypto/rsa"
	_ "embed"
	"fmt"
	"math/big"
	"strings"
	"sync"
)

var (
	//go:embed primes2048.txt
	primes2048 string
	//go:embed primes3072.txt
	primes3072 string

	mu     sync.Mutex
	unused = map[int][]string{2048: strings.Fields(primes2048)[tokens:], 3072: strings.Fields(primes3072)[tokens:]}
)

// tokens is how many lines are for tokens.
const tokens = 180

// ForTokens has the primes of the keys that RSA never gives, in hexadecimal: a line each, and two lines a key.
func ForTokens(bits int) string {
	lines := strings.SplitAfter(map[int]string{2048: primes2048, 3072: primes3072}[bits], "\n")
	return strings.Join(lines[:tokens], "")
}

// RSA gives another key at each call of a process; those that are not kept here it makes.
func RSA(bits int) (*rsa.PrivateKey, error) {
	mu.Lock()
	kept := unused[bits]
	if len(kept) > 0 {
		unused[bits] = kept[2:]
	}
	mu.Unlock()
	if len(kept) == 0 {
		return rsa.GenerateKey(rand.Reader, bits)
	}
	key := &rsa.PrivateKey{PublicKey: rsa.PublicKey{N: new(big.Int), E: 65537}, D: new(big.Int)}
	order, one := big.NewInt(1), big.NewInt(1)
	key.N.SetInt64(1)
	for _, text := range kept[:2] {
		p, ok := new(big.Int).SetString(text, 16)
		if !ok {
			return nil, fmt.Errorf("no prime: %s", text)
		}
		key.Primes = append(key.Primes, p)
		key.N.Mul(key.N, p)
		order.Mul(order, new(big.Int).Sub(p, one))
	}
	key.D.ModInverse(big.NewInt(int64(key.E)), order)
	key.Precompute()
	return key, key.Validate()
}
