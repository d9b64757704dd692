package cmdline

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"time"
)

// ServerTLS reads a server's certificate, and the CA of its clients: TLS 1.3, nothing less, and a client's certificate
// is verified; auth says whether each must have one.
func ServerTLS(certificate, key, clientCA string, auth tls.ClientAuthType) (*tls.Config, error) {
	own, err := tls.LoadX509KeyPair(certificate, key)
	if err != nil {
		return nil, fmt.Errorf("the server's certificate: %w", err)
	}
	if until := own.Leaf.NotAfter; time.Now().After(until) {
		return nil, fmt.Errorf("the server's certificate %s has expired at %s: put a new one there", certificate,
			until.Format(time.RFC3339))
	}
	pool, err := allCertificates(clientCA)
	if err != nil {
		return nil, fmt.Errorf("the clients' CA %w", err)
	}
	return &tls.Config{Certificates: []tls.Certificate{own}, ClientCAs: pool, ClientAuth: auth,
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2", "http/1.1"}}, nil
}

// ClientTLS reads a client's certificate, and the CA of its server.
func ClientTLS(certificate, key, serverCA string) (*tls.Config, error) {
	own, err := tls.LoadX509KeyPair(certificate, key)
	if err != nil {
		return nil, fmt.Errorf("the client's certificate: %w", err)
	}
	pool, err := allCertificates(serverCA)
	if err != nil {
		return nil, fmt.Errorf("the server's CA %w", err)
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{own}, RootCAs: pool}, nil
}

// allCertificates reads a file of certificates in PEM. AppendCertsFromPEM would leave out what is damaged, and with it
// the peers of a CA. Its errors go on from the name of what the file is.
func allCertificates(path string) (*x509.CertPool, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("cannot be read: %w", err)
	}
	pool, n := x509.NewCertPool(), 0
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if block.Type != "CERTIFICATE" || err != nil {
			return nil, fmt.Errorf("%s holds something that is no certificate, after %d that are: write it anew", path,
				n)
		}
		pool.AddCert(c)
		n++
	}
	switch begun := bytes.Count(data, []byte("-----BEGIN ")); {
	case begun != n:
		return nil, fmt.Errorf("%s holds a damaged certificate: %d begin, and %d can be read: write it anew",
			path, begun, n)
	case n == 0:
		return nil, fmt.Errorf("%s holds no certificate", path)
	}
	return pool, nil
}
