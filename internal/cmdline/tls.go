package cmdline

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
)

// ServerTLS reads a server's certificate, and the CA of its clients: TLS 1.3, nothing less, and a client's certificate is
// verified; auth says whether each must have one.
func ServerTLS(certificate, key, clientCA string, auth tls.ClientAuthType) (*tls.Config, error) {
	own, err := tls.LoadX509KeyPair(certificate, key)
	if err != nil {
		return nil, fmt.Errorf("the server's certificate: %w", err)
	}
	ca, err := os.ReadFile(clientCA)
	if err != nil {
		return nil, fmt.Errorf("the clients' CA: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("the clients' CA %s holds no certificate", clientCA)
	}
	return &tls.Config{Certificates: []tls.Certificate{own}, ClientCAs: pool, ClientAuth: auth, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2", "http/1.1"}}, nil
}
