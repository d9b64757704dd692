package mesim

import (
	"context"
	"crypto/aes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" // OAEP's parameter, not a signature's
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/tink-crypto/tink-go/v2/kwp/subtle"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// A line is what a manufacturer without an HSM hands over: the injection packages of a lot for a fixture.
type line struct {
	dir, fixtureKey, enrolment string
	manifest                   *directory.Manifest
	lot                        *rsa.PrivateKey
	devices                    map[kme.IMEI]*ecdsa.PublicKey
}

const injectionKeyID = "0123"

// lotKey is made once: it takes long.
var lotKey = sync.OnceValues(func() (*rsa.PrivateKey, error) { return testkeys.RSA(2048) })

func newLine(t testing.TB, devices int) *line {
	t.Helper()
	l := &line{dir: t.TempDir(), lot: must[*rsa.PrivateKey](t)(lotKey()), devices: map[kme.IMEI]*ecdsa.PublicKey{}}
	l.fixtureKey, l.enrolment = filepath.Join(l.dir, "fixture.key"), filepath.Join(l.dir, "fixture.json")
	fixture := must[*rsa.PrivateKey](t)(testkeys.RSA(2048))
	l.write(t, "fixture.key",
		pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(fixture)}))
	injection := make([]byte, 32)
	rand.Read(injection)
	wrapped := must[[]byte](t)(rsa.EncryptOAEP(sha1.New(), rand.Reader, &fixture.PublicKey, injection, nil))
	signer := must[*directory.Signer](t)(
		directory.NewSigner(must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))))
	enrolment := handover.NewFixtureEnrolment("f1", injectionKeyID, wrapped, signer.Public())
	l.write(t, "fixture.json", must[[]byte](t)(enrolment.Marshal()))

	tac := must[kme.TAC](t)(kme.ParseTAC("35209900"))
	l.manifest = &directory.Manifest{
		Lot: "L1", Manufacturer: signer.KeyID(), Suite: kme.SuiteECDSA, N: l.lot.N.Bytes(), E: l.lot.E,
		Mechanism: "software", Ranges: []directory.Range{{TAC: tac, Count: devices}}, ShardSize: devices,
		Created: time.Now().UTC(),
	}
	l.write(t, "L1/manifest.jws", must[[]byte](t)(signer.Sign(directory.TypeManifest, l.manifest)))
	kwp := must[*subtle.KWP](t)(subtle.NewKWP(injection))
	var lines []handover.InjectionLine
	for i := range devices {
		imei := must[kme.IMEI](t)(kme.NewIMEI(tac, i))
		key := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		l.devices[imei] = &key.PublicKey
		wrapped := must[[]byte](t)(kwp.Wrap(must[[]byte](t)(x509.MarshalPKCS8PrivateKey(key))))
		lines = append(lines, handover.NewInjectionLine(imei, "L1", 0, &key.PublicKey, injectionKeyID, wrapped))
	}
	file, _, err := handover.MarshalPackage(lines...)
	if err != nil {
		t.Fatal(err)
	}
	l.write(t, "L1/injection-000000.jsonl", file)
	return l
}

func (l *line) write(t testing.TB, name string, data []byte) {
	t.Helper()
	path := filepath.Join(l.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, data, 0o600)); err != nil {
		t.Fatal(err)
	}
}

func (l *line) open() (*Fleet, error) { return OpenFleet(l.dir, l.fixtureKey, []string{l.enrolment}) }

// run is one of all devices of the line.
func (l *line) run(t testing.TB, n Network) Run {
	t.Helper()
	return Run{
		Network: n, Devices: must[[]*Device](t)(must[*Fleet](t)(l.open()).Devices(t.Context(), 0, 0)),
		FirstIMSI: must[kme.IMSI](t)(kme.ParseIMSI("001010000000000")), Concurrency: 1,
	}
}

// An operator is a network that does in software what keysvc does in the HSM, or lies.
type operator struct {
	kmev1connect.UnimplementedKeyServiceHandler
	*line
	lie string // "nw_sig", "clear", "rand", "control" or "state"; guarded by mu, as the others

	mu    sync.Mutex
	bound map[string]kme.Secret // by IMSI
	used  map[string]bool       // the KMEs
}

func newOperator(l *line, lie string) *operator {
	return &operator{line: l, lie: lie, bound: map[string]kme.Secret{}, used: map[string]bool{}}
}

// serve gives a client of the operator.
func (o *operator) serve(t testing.TB) *client.Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	listener := must[net.Listener](t)(net.Listen("unix", path))
	mux := http.NewServeMux()
	mux.Handle(kmev1connect.NewKeyServiceHandler(o))
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{Handler: mux, Protocols: protocols}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	options := client.Options{URLs: []string{"unix:" + path}, Timeout: testproc.Patience, Tries: 1}
	c := must[*client.Client](t)(client.New(options))
	t.Cleanup(c.Close)
	return c
}

// Stream answers calls in turn.
func (o *operator) Stream(
	_ context.Context, b *connect.BidiStream[kmev1.StreamRequest, kmev1.StreamResponse],
) error {
	for {
		m, err := b.Receive()
		if err != nil {
			return nil
		}
		for _, c := range m.Calls {
			a := &kmev1.Answer{Id: c.Id}
			switch q := c.Call.(type) {
			case *kmev1.Call_PrepareVector:
				a.Answer = &kmev1.Answer_PrepareVector{PrepareVector: o.prepare(q.PrepareVector)}
			case *kmev1.Call_EstablishKme:
				if nwSig, ok := o.establish(q.EstablishKme.Imsi, q.EstablishKme.Imei, q.EstablishKme.Payload); ok {
					a.Answer = &kmev1.Answer_EstablishKme{
						EstablishKme: &kmev1.EstablishKMEResponse{NwSig: nwSig, State: kmev1.State_PENDING}}
				} else {
					a.Answer = &kmev1.Answer_Error{Error: &kmev1.CallError{Code: "permission_denied",
						Reason: string(kme.KMERejected), Message: "the payload is rejected"}}
				}
			case *kmev1.Call_ReportAuthentication:
				a.Answer = &kmev1.Answer_ReportAuthentication{ReportAuthentication: o.report()}
			}
			if err := b.Send(&kmev1.StreamResponse{Answers: []*kmev1.Answer{a}}); err != nil {
				return err
			}
		}
	}
}

// vector is a RAND as it goes out, and the id of an attempt for an IMSI that is not bound.
func (o *operator) vector(imsi string, random []byte) (out []byte, attempt string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	key, bound := o.bound[imsi]
	if !bound {
		if o.lie == "clear" {
			random[0] ^= 1
		}
		return random, "attempt"
	}
	if o.lie == "control" {
		return random, "attempt"
	}
	if o.lie == "rand" {
		random[0] ^= 1
	}
	block, err := aes.NewCipher(key.Bytes())
	if err != nil {
		panic(err)
	}
	block.Encrypt(random, random)
	return random, ""
}

// establish gives NW_SIG; ok is false for a payload that is rejected.
func (o *operator) establish(imsi, imei string, payload []byte) (nwSig []byte, ok bool) {
	raw := new(big.Int).Exp(new(big.Int).SetBytes(payload), o.lot.D, o.lot.N).FillBytes(make([]byte, len(payload)))
	p, ok := o.manifest.Suite.Split(raw)
	device, err := kme.ParseIMEI(imei)
	signed := o.manifest.Suite.Signed(kme.Context{}, &p)
	if !ok || err != nil || !o.manifest.Suite.Verify(o.devices[device], signed, p.Sig) {
		return nil, false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.used[string(p.KME.Bytes())] {
		return nil, false
	}
	o.used[string(p.KME.Bytes())], o.bound[imsi] = true, p.KME
	sum := p.NWSig()
	if o.lie == "nw_sig" {
		sum[31] ^= 1
	}
	return sum[:], true
}

func (o *operator) prepare(q *kmev1.PrepareVectorRequest) *kmev1.PrepareVectorResponse {
	out, attempt := o.vector(q.Imsi, q.Rands[0])
	answer := &kmev1.PrepareVectorResponse{Rands: [][]byte{out}, AttemptId: attempt,
		Control: kmev1.Control_PREPROCESSED}
	if attempt != "" {
		answer.Control = kmev1.Control_PROVISIONING_ONLY
	}
	return answer
}

func (o *operator) report() *kmev1.ReportAuthenticationResponse {
	answer := &kmev1.ReportAuthenticationResponse{State: kmev1.State_ACTIVE, Control: kmev1.Control_PREPROCESSED}
	if o.lie == "state" {
		answer.State = kmev1.State_PENDING
	}
	return answer
}
