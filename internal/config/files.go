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
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/durable"
)

// expiresSoon is how long before its end a certificate is worth a warning, but a third of its life at most.
const expiresSoon = 30 * 24 * time.Hour

// reason is an error of a file without its path, because a message has that already.
func reason(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	return err
}

// File reads a file of a setting; nil if it cannot. what names the file in a sentence.
func (r *Report) File(setting, what, path string) []byte {
	data, err := durable.ReadFile(path)
	if err != nil {
		r.Add(setting, fmt.Sprintf("%s %s cannot be read: %v", what, path, reason(err)), "put it there, for this user "+
			"to read, or name another")
		return nil
	}
	return data
}

// Secret is File for a file that only its user, and at most its group, may read.
func (r *Report) Secret(setting, what, path string) []byte {
	data := r.File(setting, what, path)
	if info, err := os.Stat(path); err == nil {
		if err := durable.Closed(what+" "+path, info); err != nil {
			r.Add(setting, err.Error(), "chmod 0600 it, and replace it if others had access")
		}
	}
	return data
}

// Folder warns of a folder that does not exist: it may come back, and some commands do not need it.
func (r *Report) Folder(setting, what, path, remedy string) {
	if info, err := os.Stat(path); err != nil {
		r.Warn(setting, fmt.Sprintf("%s %s cannot be opened: %v", what, path, reason(err)), remedy)
	} else if !info.IsDir() {
		r.Add(setting, fmt.Sprintf("%s %s is no folder", what, path), remedy)
	}
}

// Parent finds out whether the folder of a file that init will make is one, or can be made.
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

// Made finds out whether a folder is one that can be written to, or can be made by another command than init.
func (r *Report) Made(setting, what, dir string) {
	if err := durable.CanMkdir(dir); err != nil {
		r.Add(setting, fmt.Sprintf("%s: %v", what, err), "")
		return
	}
	if !exists(dir) {
		dir = filepath.Dir(dir)
	}
	if err := unix.Access(dir, unix.W_OK); err != nil {
		r.Add(setting, fmt.Sprintf("%s: %s cannot be written to: %v", what, dir, err), "name another, or chown it to "+
			"the service's user")
	}
}

// Token finds out whether a text is a token's URI.
func (r *Report) Token(setting, uri string) {
	if err := hsmkeys.CheckURI(uri); err != nil {
		r.Add(setting, err.Error(), "")
	}
}

// PIN finds out whether the PIN that a token's URI names can be read.
func (r *Report) PIN(setting, uri string) {
	if hsmkeys.CheckURI(uri) != nil {
		return
	}
	if err := hsmkeys.CheckPIN(uri); err != nil {
		r.Add(setting, err.Error(), "")
	}
}

// IsAddress says whether a text is HOST:PORT, for a server to listen at.
func IsAddress(text string) bool {
	_, port, err := net.SplitHostPort(text)
	return err == nil && isPort(port)
}

// IsReachable says whether a text is HOST:PORT, for others to reach it at.
func IsReachable(text string) bool {
	host, port, err := net.SplitHostPort(text)
	return err == nil && host != "" && port != "0" && isPort(port)
}

// IsURL says whether a text is SCHEME://HOST or SCHEME://HOST:PORT, with or without more, in one of some schemes.
func IsURL(text string, schemes ...string) bool {
	u, err := url.Parse(text)
	return err == nil && slices.Contains(schemes, u.Scheme) && u.Hostname() != "" &&
		(u.Port() == "" || isPort(u.Port()))
}

func isPort(text string) bool {
	_, err := net.LookupPort("tcp", text)
	return text != "" && err == nil
}

// An Address is where a setting says to listen; empty for nowhere.
type Address struct{ Setting, At string }

// Distinct reports addresses that are the same, or of which one includes the other.
func (r *Report) Distinct(all ...Address) {
	for i, a := range all {
		for _, b := range all[:i] {
			if overlap(a.At, b.At) {
				r.Add(a.Setting, fmt.Sprintf("%s and %s %s are one address", a.At, b.Setting, b.At),
					"choose another port for one of them")
			}
		}
	}
}

func overlap(a, b string) bool {
	if a == "" || b == "" {
		return false
	}
	one, err := net.ResolveTCPAddr("tcp", a)
	if err != nil {
		return false
	}
	two, err := net.ResolveTCPAddr("tcp", b)
	if err != nil || one.Port != two.Port || one.Port == 0 {
		return false
	}
	every := func(ip net.IP) bool { return ip == nil || ip.IsUnspecified() }
	return every(one.IP) || every(two.IP) || one.IP.Equal(two.IP)
}

// Addresses finds out whether the program could listen at these TCP addresses. If it runs already, it uses them itself.
func (r *Report) Addresses(all ...Address) {
	for _, a := range all {
		if a.At == "" || !r.Good(a.Setting) {
			continue
		}
		l, err := net.Listen("tcp", a.At)
		switch {
		case err == nil:
			l.Close()
		case errors.Is(err, syscall.EADDRINUSE):
			r.Add(a.Setting, a.At+" is in use (ss -ltnp shows by whom)",
				"choose another port, or stop the process that has it; "+Running)
		default:
			r.Add(a.Setting, notHad(a.At, err).Error(), "")
		}
	}
}

// Running is the remedy for an address that the program itself may be using.
const Running = "if that is this configuration's own service, check with --running"

// Listen says what to do about an address that cannot be had.
func Listen(address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	return l, notHad(address, err)
}

// SocketFree fails if a process serves a Unix socket.
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
	case errors.As(err, new(*net.DNSError)):
		return fmt.Errorf("the host of %s is not known (getent hosts shows what is): choose an address of this machine",
			address)
	}
	return err
}

// ServerTLS finds what is wrong with a server's certificate, its key, and the CA of its clients: the settings of
// tls.
func (r *Report) ServerTLS(certificate, key, clientCA string) {
	const own = "the server's certificate"
	if data := r.File("tls.certificate", own, certificate); data != nil {
		chain, err := parseCertificates(certificate, data)
		if err != nil {
			r.Add("tls.certificate", own+" "+err.Error(), "write it anew")
		} else {
			r.dates("tls.certificate", own+" "+certificate, chain[0])
			r.Purpose("tls.certificate", own+" "+certificate, chain[0], x509.ExtKeyUsageServerAuth)
		}
		private := r.Secret("tls.key", "the key of the server's certificate,", key)
		if err == nil && private != nil {
			r.pair("tls.key", certificate, key, data, private)
		}
	} else {
		r.Secret("tls.key", "the key of the server's certificate,", key)
	}
	r.Authority("tls.client_ca", "the clients' CA", clientCA)
}

// Authority finds what is wrong with a file of certificates of CAs.
func (r *Report) Authority(setting, what, path string) {
	data := r.File(setting, what, path)
	if data == nil {
		return
	}
	all, err := parseCertificates(path, data)
	if err != nil {
		r.Add(setting, what+" "+err.Error(), "write it anew")
	}
	for _, ca := range all {
		r.dates(setting, fmt.Sprintf("%s %s (%s)", what, path, ca.Subject), ca)
	}
}

// Purpose finds out whether a certificate may be used as a server's, or as a client's.
func (r *Report) Purpose(setting, what string, c *x509.Certificate, usage x509.ExtKeyUsage) {
	if err := CheckPurpose(c, usage); err != nil {
		r.Add(setting, fmt.Sprintf("%s %v", what, err), "have one made that is")
	}
}

// CheckPurpose fails unless a certificate is for servers, or clients. One without extended key usages is for all (RFC
// 5280, 4.2.1.12). Its errors go on from the name of what the certificate is.
func CheckPurpose(c *x509.Certificate, usage x509.ExtKeyUsage) error {
	if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0 || slices.Contains(c.ExtKeyUsage, usage) ||
		slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny) {
		return nil
	}
	if usage == x509.ExtKeyUsageServerAuth {
		return errors.New("is not for a server: its extendedKeyUsage has no serverAuth")
	}
	return errors.New("is not for a client: its extendedKeyUsage has no clientAuth")
}

// dates finds what is wrong with the validity of a certificate.
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
	data, err := durable.ReadFile(path)
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
