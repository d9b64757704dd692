// Package testkeys has RSA keys for tests, which guard nothing: under the race detector each takes seconds to make.
package testkeys

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	_ "embed"
	"encoding/pem"
	"sync"
)

var (
	//go:embed rsa2048.pem
	pem2048 []byte
	//go:embed rsa3072.pem
	pem3072 []byte

	mu     sync.Mutex
	unused = map[int][]byte{2048: pem2048, 3072: pem3072}
)

// RSA gives another key at each call of a process; those that are not kept here it makes.
func RSA(bits int) (*rsa.PrivateKey, error) {
	mu.Lock()
	block, rest := pem.Decode(unused[bits])
	unused[bits] = rest
	mu.Unlock()
	if block == nil {
		return rsa.GenerateKey(rand.Reader, bits)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	return key.(*rsa.PrivateKey), nil
}
