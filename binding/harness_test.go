package binding_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tink-crypto/tink-go/v2/kwp/subtle"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/imports"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/directory/filestore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

func TestMain(m *testing.M) {
	if os.Getenv(childArgs) != "" { // its tokens are those of the process that began it
		os.Exit(m.Run())
	}
	softhsmtest.Main(m, 91)
}

const (
	operator = "op"
	ttl      = 5 * time.Minute
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

// times has a life of attempts that tests know.
func times() binding.Times {
	t := binding.DefaultTimes()
	t.Attempt = ttl
	return t
}

// here is the origin of those who have one peer only.
var here = binding.Origin{Provisioning: binding.Allowed}

// newRANDs makes RANDs that no vector had before.
func newRANDs(n int) (all [][]byte) {
	for range n {
		b := make([]byte, hsmkeys.RANDSize)
		rand.Read(b)
		all = append(all, b)
	}
	return all
}

// A harness is an operator: a real token and a real database, and a recorder between them and the service.
type harness struct {
	pool     *hsmkeys.OperatorPool  // what the service has, as in keysvc
	token    *hsmkeys.OperatorToken // the only one of the pool
	observed *relay
	tokenURI string
	soPIN    string // where the security officer's is
	store    *sqlstore.Store
	recorder *recorder
	log      *testproc.Log
	service  *binding.Service
	readers  map[string]*directory.Reader
}

// A relay gives what a token tells its observer to metrics, when there are some.
type relay struct {
	to atomic.Pointer[binding.Metrics]
}

func (r *relay) Waited(d time.Duration) {
	if m := r.to.Load(); m != nil {
		m.Waited(d)
	}
}

func (r *relay) Worked(operation string, took time.Duration, err error) {
	if m := r.to.Load(); m != nil {
		m.Worked(operation, took, err)
	}
}

func newHarness(t testing.TB) *harness {
	t.Helper()
	ctx := t.Context()
	tok := softhsmtest.Operator(t)
	observed := new(relay)
	pool := must[*hsmkeys.OperatorPool](t)(hsmkeys.OpenOperatorPool(ctx, []string{tok.URI},
		hsmkeys.Options{Observer: observed}))
	token := pool.Tokens()[0]
	must[bool](t)(token.Dedicate(ctx, hsmkeys.Dedication{Side: hsmkeys.Operator}))
	must[bool](t)(token.EnsureStorageKey(ctx))
	must[bool](t)(token.EnsureLedgerKey(ctx))
	store := openStore(t, token, sqlstore.InFolder(t.TempDir()))
	t.Cleanup(func() { store.Close() })
	r := &harness{pool: pool, token: token, observed: observed, tokenURI: tok.URI, soPIN: "file:" + tok.SOPINFile,
		store: store, log: new(testproc.Log), readers: map[string]*directory.Reader{}}
	t.Cleanup(func() { r.token.Close() })
	r.recorder = &recorder{Ledger: store, token: pool, store: store}
	r.service = r.newService(binding.Options{})
	return r
}

// newService is one with the harness's recorder, log and, unless there are others, times.
func (r *harness) newService(o binding.Options) *binding.Service {
	o.Token, o.Store, o.Log = r.recorder, r.recorder, r.slog()
	if o.Times.Now == nil {
		o.Times = times()
	}
	return binding.NewService(o)
}

// openStore opens a store whose rows have their MACs under a token's key.
func openStore(t testing.TB, token *hsmkeys.OperatorToken, name string) *sqlstore.Store {
	t.Helper()
	key := must[kme.Secret](t)(token.Derive(t.Context(), sqlstore.RowKey))
	return must[*sqlstore.Store](t)(sqlstore.Open(t.Context(), name, key))
}

// transport is a transport key that waits for its enrolment.
func (r *harness) transport(t testing.TB) *rsa.PublicKey {
	t.Helper()
	if all := must[[]*rsa.PublicKey](t)(r.token.TransportKeys(t.Context())); len(all) > 0 {
		return all[0]
	}
	return must[*rsa.PublicKey](t)(r.token.NewTransportKey(t.Context()))
}

// enroll takes a manufacturer in, and reads its directory.
func (r *harness) enroll(t testing.TB, m *maker) {
	t.Helper()
	must[*registry.Manufacturer](t)(imports.Enroll(t.Context(), r.token, r.store,
		imports.Enrolment{JWS: m.sign(t, handover.TypeEnrolment, m.enrolment(t, r)), PEM: m.pem, Thumbprint: m.KeyID(),
			Directory: "file:" + m.dir}))
	r.readers[m.KeyID()] = m.reader(t)
}

// take imports a lot and serves it.
func (r *harness) take(t testing.TB, m *maker, lot *lot) {
	t.Helper()
	must[*registry.Lot](t)(imports.ImportLot(t.Context(), r.token, r.store,
		m.sign(t, handover.TypeGrant, m.grant(t, lot)), nil))
	r.serve(t)
}

func (r *harness) lots(t testing.TB) *registry.Lots {
	t.Helper()
	return must[*registry.Lots](t)(registry.OpenLots(t.Context(), r.store,
		func(m *registry.Manufacturer) (*directory.Reader, error) {
			return r.readers[m.KeyID], nil
		}))
}

func (r *harness) serve(t testing.TB) {
	t.Helper()
	lots := r.lots(t)
	r.service = r.service.WithLots(lots)
	lots.LogWithdrawn(slog.New(slog.NewJSONHandler(r.log, nil)))
}

// refresh has the service know what a maker has revoked, without the wait for revocation_ttl.
func (r *harness) refresh(t testing.TB, m *maker, l *lot) {
	t.Helper()
	if err := r.readers[m.KeyID()].Refresh(t.Context(), l.Manifest); err != nil {
		t.Fatal(err)
	}
}

// revoke has a lot's manufacturer revoke a device, and the service know it.
func (r *harness) revoke(t testing.TB, m *maker, l *lot, d *device) {
	t.Helper()
	if err := directory.Revoke(t.Context(), m.store, m.Signer, l.Manifest, []kme.IMEI{d.imei}, "stolen", time.Now(),
		nil); err != nil {
		t.Fatal(err)
	}
	r.refresh(t, m, l)
}

// vector asks for a vector, and gives the error.
func (r *harness) vector(t testing.TB, imsi kme.IMSI) error {
	_, err := r.service.PrepareVector(t.Context(), imsi, newRANDs(1), here)
	return err
}

// attempt opens an attempt as an HSS does.
func (r *harness) attempt(t testing.TB, imsi kme.IMSI) string {
	t.Helper()
	p := must[*binding.Prepared](t)(r.service.PrepareVector(t.Context(), imsi, newRANDs(1), here))
	if p.AttemptID == "" {
		t.Fatalf("IMSI %s is bound", imsi)
	}
	return p.AttemptID
}

// activate has a vector go out under an IMSI's pending binding, and reports success.
func (r *harness) activate(t testing.TB, imsi kme.IMSI) {
	t.Helper()
	if p := must[*binding.Prepared](t)(r.service.PrepareVector(t.Context(), imsi, newRANDs(1),
		here)); p.AttemptID != "" {
		t.Fatalf("IMSI %s is not bound", imsi)
	}
	got := must[*binding.Reported](t)(r.service.ReportAuthentication(t.Context(), imsi, true, here))
	if !got.Served || got.Binding.State != binding.Active {
		t.Fatalf("IMSI %s is not active: %+v", imsi, got)
	}
}

// checkBound looks into the store, past the service.
func (r *harness) checkBound(t testing.TB, imsi kme.IMSI, want bool) {
	t.Helper()
	sub := must[*binding.Subscription](t)(r.store.Subscription(t.Context(), imsi, time.Now()))
	if bound := sub.Latest() != nil; bound != want {
		t.Errorf("IMSI %s is bound: %v, want %v", imsi, bound, want)
	}
}

// A maker is a manufacturer without an HSM: what it hands over is what a factory does, with keys that tests can know.
type maker struct {
	*directory.Signer
	pem   []byte
	kek   []byte
	dir   string
	store *filestore.Store
}

func newMaker(t testing.TB) *maker {
	t.Helper()
	key := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	m := &maker{Signer: must[*directory.Signer](t)(directory.NewSigner(key)), kek: make([]byte, 32), dir: t.TempDir()}
	rand.Read(m.kek)
	m.pem = must[[]byte](t)(pemkey.Encode(m.Public()))
	m.store = must[*filestore.Store](t)(filestore.Open(m.dir))
	return m
}

func (m *maker) reader(t testing.TB) *directory.Reader {
	t.Helper()
	// Tests publish while they read, and revoke: see harness.refresh.
	return directory.NewReader(m.store, directory.NewVerifier(m.Public()), directory.ReaderOptions{
		RevocationTTL: time.Hour, NegativeTTL: time.Nanosecond, ReadTimeout: testproc.Patience})
}

func (m *maker) kekKey() hsmkeys.Key {
	return hsmkeys.Key{Role: hsmkeys.RoleKEK, Manufacturer: m.KeyID(), Name: operator}
}

func (m *maker) lotKey(name string) hsmkeys.Key {
	return hsmkeys.Key{Role: hsmkeys.RoleLot, Manufacturer: m.KeyID(), Name: name}
}

func (m *maker) sign(t testing.TB, typ directory.Type, payload any) []byte {
	t.Helper()
	return must[[]byte](t)(m.Sign(typ, payload))
}

func (m *maker) enrolment(t testing.TB, r *harness) *handover.Enrolment {
	t.Helper()
	transport := r.transport(t)
	return &handover.Enrolment{
		Manufacturer: m.KeyID(), Operator: operator, TransportKey: pemkey.Thumbprint(transport),
		KEK: m.kekKey().HexID(), Algorithm: handover.RSAOAEP,
		Wrapped: must[[]byte](t)(rsa.EncryptOAEP(sha1.New(), rand.Reader, transport, m.kek, nil)),
	}
}

// A lot is one of a maker's.
type lot struct {
	*directory.Manifest
	key     *rsa.PrivateKey
	devices []*device
}

// A device is an ME.
type device struct {
	imei   kme.IMEI
	signer crypto.Signer // nil for the devices of the known answers
	lot    *lot
}

var testTAC = "35209900"

// newLot publishes the manifest of a lot and its one shard. A key that is no crypto.Signer is a public one.
func (m *maker) newLot(
	t testing.TB, name string, suite kme.Suite, key *rsa.PrivateKey, first int, devices ...any,
) *lot {
	t.Helper()
	tac := must[kme.TAC](t)(kme.ParseTAC(testTAC))
	l := &lot{key: key, Manifest: &directory.Manifest{
		Lot: name, Manufacturer: m.KeyID(), Suite: suite, N: key.N.Bytes(), E: key.E, Mechanism: "software",
		Ranges: []directory.Range{{TAC: tac, First: first, Count: len(devices)}}, ShardSize: len(devices),
		Created: time.Now().UTC(),
	}}
	if suite == kme.SuiteBound {
		l.OAEP = kme.OAEPHash
	}
	var keys []directory.DeviceKey
	for i, d := range devices {
		imei := must[kme.IMEI](t)(kme.NewIMEI(tac, first+i))
		signer, ok := d.(crypto.Signer)
		if ok {
			d = signer.Public()
		}
		l.devices = append(l.devices, &device{imei, signer, l})
		keys = append(keys, directory.DeviceKey{IMEI: imei, Key: d})
	}
	shard := must[*directory.Shard](t)(directory.NewShard(l.Manifest, 0, keys, make([]byte, sha256.Size)))
	for path, o := range map[string]struct {
		typ     directory.Type
		payload any
	}{
		directory.ManifestPath(name): {directory.TypeManifest, l.Manifest},
		directory.ShardPath(name, 0): {directory.TypeShard, shard},
	} {
		if err := directory.Publish(t.Context(), m.store, path, m.Signer, o.typ, o.payload); err != nil {
			t.Fatal(err)
		}
	}
	if err := directory.BeginRevocations(t.Context(), m.store, m.Signer, l.Manifest, time.Now(),
		time.Hour); err != nil {
		t.Fatal(err)
	}
	return l
}

func (m *maker) wrap(t testing.TB, key *rsa.PrivateKey) []byte {
	t.Helper()
	return must[[]byte](t)(must[*subtle.KWP](t)(subtle.NewKWP(m.kek)).
		Wrap(must[[]byte](t)(x509.MarshalPKCS8PrivateKey(key))))
}

func (m *maker) grant(t testing.TB, l *lot) *handover.Grant {
	t.Helper()
	return &handover.Grant{
		Operator: operator, KEK: m.kekKey().HexID(), Lot: l.Lot, Algorithm: handover.A256KWP, Wrapped: m.wrap(t, l.key),
		Manifest: string(m.sign(t, directory.TypeManifest, l.Manifest)),
	}
}

func newDevices(t testing.TB, n int) (keys []any) {
	t.Helper()
	for range n {
		keys = append(keys, must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)))
	}
	return keys
}

// newServed is an operator who serves one lot, L1, of five devices.
func newServed(t testing.TB) (*harness, *maker, *lot) {
	t.Helper()
	r, m := newHarness(t), newMaker(t)
	r.enroll(t, m)
	l := m.newLot(t, "L1", kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), 1, newDevices(t, 5)...)
	r.take(t, m, l)
	r.recorder.take()
	return r, m, l
}

// payload is what the device sends for a fresh KME.
func (d *device) payload(t testing.TB) ([]byte, *kme.Plaintext) {
	t.Helper()
	p := &kme.Plaintext{KME: kme.RandomSecret(), RME: kme.RandomSecret()}
	p.Sig = must[[]byte](t)(d.lot.Suite.Sign(d.signer, p.KME.Bytes()))
	return d.encrypt(t, p), p
}

func (d *device) encrypt(t testing.TB, p *kme.Plaintext) []byte {
	t.Helper()
	return must[[]byte](t)(d.lot.Suite.Encrypt(&d.lot.key.PublicKey, p))
}

// newIMSI gives an IMSI that no test has had.
func newIMSI() kme.IMSI { return parseIMSI(fmt.Sprintf("00101%010d", imsis.Add(1))) }

var imsis atomic.Int64

// parseIMSI is for texts that are IMSIs.
func parseIMSI(text string) kme.IMSI {
	imsi, err := kme.ParseIMSI(text)
	if err != nil {
		panic(err)
	}
	return imsi
}

// parseIMEI is for texts that are IMEIs.
func parseIMEI(text string) kme.IMEI {
	imei, err := kme.ParseIMEI(text)
	if err != nil {
		panic(err)
	}
	return imei
}

// checkRefused insists on a refusal, and on its whole answer where message is not empty.
func checkRefused(t testing.TB, what string, err error, reason kme.Reason, message string) {
	t.Helper()
	var r *binding.Refusal
	if !errors.As(err, &r) {
		t.Errorf("%s: error %v, want a refusal with %s", what, err, reason)
	} else if r.Reason != reason || message != "" && r.Message != message {
		t.Errorf("%s: %s, %q (cause %v), want %s, %q", what, r.Reason, r.Message, r.Cause, reason, message)
	}
}

func (r *harness) slog() *slog.Logger { return slog.New(slog.NewJSONHandler(r.log, nil)) }

// attemptPastRecorder opens an attempt unless the IMSI is bound, where the recorder does not see it.
func (r *harness) attemptPastRecorder(t testing.TB, imsi kme.IMSI) string {
	t.Helper()
	d := must[binding.Decision](t)(r.store.Prepare(t.Context(), binding.VectorRequest{
		IMSI: imsi, Origin: here, RANDs: []hsmkeys.RAND{hsmkeys.RAND(newRANDs(1)[0])}, Now: time.Now(),
		AttemptTTL: ttl, PendingVectors: 3,
	}))
	if d.Attempt == nil {
		return ""
	}
	return d.Attempt.ID
}
