package config

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
)

// ServerTLS reads a server's certificate, and the CA of its clients: TLS 1.3, nothing less, and a client's certificate
// is verified; auth says whether each must have one.
func ServerTLS(certificate, key, clientCA string, auth tls.ClientAuthType) (*tls.Config, error) {
	var files Report
	files.ServerTLS(certificate, key, clientCA)
	if err := files.Err(); err != nil {
		return nil, err
	}
	own, err := tls.LoadX509KeyPair(certificate, key)
	if err != nil {
		return nil, fmt.Errorf("the server's certificate: %w", err)
	}
	pool, err := Certificates(clientCA)
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
	if err := CheckPurpose(own.Leaf, x509.ExtKeyUsageClientAuth); err != nil {
		return nil, fmt.Errorf("the client's certificate %s %w", certificate, err)
	}
	pool, err := Certificates(serverCA)
	if err != nil {
		return nil, fmt.Errorf("the server's CA %w", err)
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{own}, RootCAs: pool}, nil
}
