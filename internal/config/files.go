package config

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/kmehsm/kmehsm/hsmkeys"
)

// expiresSoon is how long before its end a certificate is worth a warning, but a third of its life at most.
const expiresSoon = 30 * 24 * time.Hour

// reason is an error of a file without the path, which stands before it.
func reason(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	return err
}

// File reads a file of a setting; nil if it cannot. what names the file in a sentence.
func (r *Report) File(setting, what, path string) []byte {
	data, err := os.ReadFile(path)
	if err != nil {
		r.Add(setting, fmt.Sprintf("%s %s cannot be read: %v", what, path, reason(err)), "put it there, for this user "+
			"to read, or name another")
		return nil
	}
	return data
}

// Secret is File of one that only its user, and its group at most, may read.
func (r *Report) Secret(setting, what, path string) []byte {
	data := r.File(setting, what, path)
	if info, err := os.Stat(path); err == nil && info.Mode().Perm()&0o007 != 0 {
		r.Add(setting, fmt.Sprintf("%s %s is open to every user of the machine (mode %04o)", what, path,
			info.Mode().Perm()), "chmod 0600 it, and replace it if others had access")
	}
	return data
}

// Folder warns of a folder that is not there: it may come back, and not all needs it.
func (r *Report) Folder(setting, what, path, remedy string) {
	if info, err := os.Stat(path); err != nil {
		r.Warn(setting, fmt.Sprintf("%s %s cannot be opened: %v", what, path, reason(err)), remedy)
	} else if !info.IsDir() {
		r.Add(setting, fmt.Sprintf("%s %s is no folder", what, path), remedy)
	}
}

// Parent finds out whether the folder of a file that will be made is one, or can be made.
func (r *Report) Parent(setting, what, path string) {
	dir := filepath.Dir(path)
	for !exists(dir) && dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
	}
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		r.Add(setting, fmt.Sprintf("%s %s cannot be made: %s is no folder that can be opened", what, path, dir),
			"name another place")
	}
}

// Token finds out whether a text is a token's URI.
func (r *Report) Token(setting, uri string) {
	if err := hsmkeys.CheckURI(uri); err != nil {
		r.Add(setting, fmt.Sprintf("%s: %v", setting, err), "")
	}
}

// PIN finds out whether the PIN that a token's URI names can be read.
func (r *Report) PIN(setting, uri string) {
	if !r.Good(setting) {
		return
	}
	if err := hsmkeys.CheckPIN(uri); err != nil {
		r.Add(setting, fmt.Sprintf("%s: %v", setting, err), "")
	}
}

// Address finds out whether a TCP address can be had. What runs already has its own.
func (r *Report) Address(setting, address string) {
	l, err := net.Listen("tcp", address)
	if err == nil {
		l.Close()
		return
	}
	remedy := ""
	if errors.Is(err, syscall.EADDRINUSE) {
		remedy = Running
	}
	r.Add(setting, notHad(address, err).Error(), remedy)
}

// Running is the remedy for an address that the program itself may have.
const Running = "if that is the service itself, check with --running"

// Listen says what to do about an address that cannot be had.
func Listen(address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	return l, notHad(address, err)
}

// SocketFree refuses a Unix socket that somebody serves.
func SocketFree(path string) error {
	c, err := net.Dial("unix", path)
	if err != nil {
		return nil
	}
	c.Close()
	return fmt.Errorf("another process serves %s: stop it, or choose another socket", path)
}

func notHad(address string, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("another process listens at %s (ss -ltnp shows which): stop it, or choose another port",
			address)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("%s is no address of this machine (ip address shows them): choose another", address)
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("this user may not listen at %s: choose a port above 1023", address)
	}
	return err
}

// ServerTLS finds what is wrong with a server's certificate, its key, and the CA of its clients, which are settings
// below prefix.
func (r *Report) ServerTLS(prefix, certificate, key, clientCA string) {
	const own = "the server's certificate"
	if data := r.File(prefix+"certificate", own, certificate); data != nil {
		chain, err := parseCertificates(certificate, data)
		if err != nil {
			r.Add(prefix+"certificate", own+" "+err.Error(), "write it anew")
		} else {
			r.dates(prefix+"certificate", own+" "+certificate, chain[0])
			if !forServers(chain[0]) {
				r.Add(prefix+"certificate", own+" "+certificate+" is not for a server (extended key usage)",
					"have one made with serverAuth")
			}
		}
		private := r.Secret(prefix+"key", "the key of the server's certificate,", key)
		if err == nil && private != nil {
			r.pair(prefix+"key", certificate, key, data, private)
		}
	} else {
		r.Secret(prefix+"key", "the key of the server's certificate,", key)
	}
	if data := r.File(prefix+"client_ca", "the clients' CA", clientCA); data != nil {
		all, err := parseCertificates(clientCA, data)
		if err != nil {
			r.Add(prefix+"client_ca", "the clients' CA "+err.Error(), "write it anew")
		}
		for _, ca := range all {
			r.dates(prefix+"client_ca", fmt.Sprintf("the clients' CA %s (%s)", clientCA, ca.Subject), ca)
		}
	}
}

// forServers says whether clients take a certificate for a server's (RFC 5280 section 4.2.1.12).
func forServers(c *x509.Certificate) bool {
	return len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0 || slices.ContainsFunc(c.ExtKeyUsage,
		func(u x509.ExtKeyUsage) bool { return u == x509.ExtKeyUsageServerAuth || u == x509.ExtKeyUsageAny })
}

// dates finds what is wrong with the time that a certificate is good for.
func (r *Report) dates(setting, what string, c *x509.Certificate) {
	switch now := time.Now(); {
	case now.After(c.NotAfter):
		r.Add(setting, fmt.Sprintf("%s has expired at %s", what, c.NotAfter.Format(time.RFC3339)),
			"put a new one there")
	case now.Before(c.NotBefore):
		r.Add(setting, fmt.Sprintf("%s is not good before %s", what, c.NotBefore.Format(time.RFC3339)),
			"wait, or set the clock right")
	case c.NotAfter.Sub(now) < min(expiresSoon, c.NotAfter.Sub(c.NotBefore)/3):
		r.Warn(setting, fmt.Sprintf("%s expires at %s", what, c.NotAfter.Format(time.RFC3339)),
			"have a new one made")
	}
}

// pair finds out whether a key is the certificate's.
func (r *Report) pair(setting, certificate, key string, certificatePEM, keyPEM []byte) {
	if _, err := tls.X509KeyPair(certificatePEM, keyPEM); err != nil {
		if block, _ := pem.Decode(keyPEM); block != nil && isKey(block.Bytes) {
			r.Add(setting, fmt.Sprintf("the key %s is not that of the server's certificate %s", key, certificate),
				"name the key that the certificate was made for")
		} else {
			r.Add(setting, fmt.Sprintf("%s holds no private key: %v", key, err),
				"write the key there, in PEM and without a passphrase")
		}
	}
}

// isKey says whether a private key can be read.
func isKey(der []byte) bool {
	_, pkcs8 := x509.ParsePKCS8PrivateKey(der)
	_, ec := x509.ParseECPrivateKey(der)
	_, rsa := x509.ParsePKCS1PrivateKey(der)
	return pkcs8 == nil || ec == nil || rsa == nil
}

// Certificates reads a file of certificates in PEM. AppendCertsFromPEM would leave out what is damaged, and with it the
// peers of a CA. Its errors go on from the name of what the file is.
func Certificates(path string) (*x509.CertPool, error) {
	all, err := ReadCertificates(path)
	pool := x509.NewCertPool()
	for _, c := range all {
		pool.AddCert(c)
	}
	return pool, err
}

// ReadCertificates is Certificates one by one.
func ReadCertificates(path string) ([]*x509.Certificate, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("cannot be read: %w", err)
	}
	return parseCertificates(path, data)
}

// parseCertificates gives all of a file's, or an error.
func parseCertificates(path string, data []byte) (all []*x509.Certificate, err error) {
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if block.Type != "CERTIFICATE" || err != nil {
			return nil, fmt.Errorf("%s holds something that is no certificate, after %d that are", path, len(all))
		}
		all = append(all, c)
	}
	switch begun := bytes.Count(data, []byte("-----BEGIN ")); {
	case begun != len(all):
		return nil, fmt.Errorf("%s holds a damaged certificate: %d begin, and %d can be read", path, begun, len(all))
	case begun == 0:
		return nil, fmt.Errorf("%s holds no certificate", path)
	}
	return all, nil
}
