package cmdline

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"time"
)

// ServerTLS reads a server's certificate, and the CA of its clients: TLS 1.3, nothing less, and a client's certificate is
// verified; auth says whether each must have one.
func ServerTLS(certificate, key, clientCA string, auth tls.ClientAuthType) (*tls.Config, error) {
	own, err := tls.LoadX509KeyPair(certificate, key)
	if err != nil {
		return nil, fmt.Errorf("the server's certificate: %w", err)
	}
	if until := own.Leaf.NotAfter; time.Now().After(until) {
		return nil, fmt.Errorf("the server's certificate %s has expired at %s: put a new one there", certificate, until.Format(time.RFC3339))
	}
	ca, err := os.ReadFile(clientCA)
	if err != nil {
		return nil, fmt.Errorf("the clients' CA: %w", err)
	}
	pool, err := allCertificates(ca)
	if err != nil {
		return nil, fmt.Errorf("the clients' CA %s %w", clientCA, err)
	}
	return &tls.Config{Certificates: []tls.Certificate{own}, ClientCAs: pool, ClientAuth: auth, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2", "http/1.1"}}, nil
}

// allCertificates reads certificates in PEM. AppendCertsFromPEM would leave out what is damaged, and with it the clients
// of a CA.
func allCertificates(data []byte) (*x509.CertPool, error) {
	pool, n := x509.NewCertPool(), 0
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if block.Type != "CERTIFICATE" || err != nil {
			return nil, fmt.Errorf("holds something that is no certificate, after %d that are: write it anew", n)
		}
		pool.AddCert(c)
		n++
	}
	switch begun := bytes.Count(data, []byte("-----BEGIN ")); {
	case begun != n:
		return nil, fmt.Errorf("holds a damaged certificate: %d begin, and %d can be read: write it anew", begun, n)
	case n == 0:
		return nil, errors.New("holds no certificate")
	}
	return pool, nil
}
