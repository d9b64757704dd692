package binding_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tink-crypto/tink-go/v2/kwp/subtle"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/kme"
)

func TestMain(m *testing.M) {
	if os.Getenv(childArgs) != "" { // its tokens are those of the process that began it
		os.Exit(m.Run())
	}
	softhsmtest.Main(m, 60)
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

// A rig is an operator: a real token and a real database, and a recorder between them and the service.
type rig struct {
	token    *hsmkeys.OperatorToken
	observed *relay
	tokenURI string
	soPIN    string // where the security officer's is
	store    *sqlstore.Store
	recorder *recorder
	log      *logBuffer
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

func newRig(t testing.TB) *rig {
	t.Helper()
	ctx := t.Context()
	tok := softhsmtest.Operator(t)
	observed := new(relay)
	token := must[*hsmkeys.OperatorToken](t)(hsmkeys.OpenOperator(ctx, tok.URI, hsmkeys.Options{Observer: observed}))
	must[bool](t)(token.Dedicate(ctx, hsmkeys.Dedication{Side: hsmkeys.Operator}))
	must[bool](t)(token.EnsureStorageKey(ctx))
	must[bool](t)(token.EnsureLedgerKey(ctx))
	store := openStore(t, token, sqlstore.InFolder(t.TempDir()))
	t.Cleanup(func() { store.Close() })
	r := &rig{token: token, observed: observed, tokenURI: tok.URI, soPIN: "file:" + tok.SOPINFile, store: store, log: new(logBuffer), readers: map[string]*directory.Reader{}}
	t.Cleanup(func() { r.token.Close() })
	r.recorder = &recorder{Ledger: store, token: token, store: store}
	r.service = binding.NewService(r.recorder, r.recorder, new(binding.Lots), times(),
		slog.New(slog.NewJSONHandler(r.log, nil)))
	return r
}

// openStore opens a store whose rows have their MACs under a token's key.
func openStore(t testing.TB, token *hsmkeys.OperatorToken, name string) *sqlstore.Store {
	t.Helper()
	key := must[kme.Secret](t)(token.Derive(t.Context(), sqlstore.RowKey))
	return must[*sqlstore.Store](t)(sqlstore.Open(t.Context(), name, key))
}

// transport is a transport key that waits for its enrolment.
func (r *rig) transport(t testing.TB) *rsa.PublicKey {
	t.Helper()
	if all := must[[]*rsa.PublicKey](t)(r.token.TransportKeys(t.Context())); len(all) > 0 {
		return all[0]
	}
	return must[*rsa.PublicKey](t)(r.token.NewTransportKey(t.Context()))
}

// enroll takes a manufacturer in, and reads its directory.
func (r *rig) enroll(t testing.TB, m *maker) {
	t.Helper()
	must[*binding.Manufacturer](t)(binding.Enroll(t.Context(), r.token, r.store, m.sign(t, directory.TypeEnrolment, m.enrolment(t, r)), m.pem, m.KeyID(), "file:"+m.dir))
	r.readers[m.KeyID()] = m.reader(t)
}

// take imports a lot and serves it.
func (r *rig) take(t testing.TB, m *maker, lot *lot) {
	t.Helper()
	must[*binding.Lot](t)(binding.ImportLot(t.Context(), r.token, r.store, m.sign(t, directory.TypeGrant, m.grant(t, lot)), nil))
	r.serve(t)
}

func (r *rig) lots(t testing.TB) *binding.Lots {
	t.Helper()
	return must[*binding.Lots](t)(binding.OpenLots(t.Context(), r.store, func(m *binding.Manufacturer) (*directory.Reader, error) {
		return r.readers[m.KeyID], nil
	}))
}

func (r *rig) serve(t testing.TB) {
	t.Helper()
	lots := r.lots(t)
	r.service = r.service.WithLots(lots)
	lots.LogWithdrawn(slog.New(slog.NewJSONHandler(r.log, nil)))
}

// refresh has the service know what a maker has revoked, without the wait for revocation_ttl.
func (r *rig) refresh(t testing.TB, m *maker, l *lot) {
	t.Helper()
	if err := r.readers[m.KeyID()].Refresh(t.Context(), l.Manifest); err != nil {
		t.Fatal(err)
	}
}

// attempt opens an attempt as an HSS does.
func (r *rig) attempt(t testing.TB, imsi string) string {
	t.Helper()
	p := must[*binding.Prepared](t)(r.service.PrepareVector(t.Context(), imsi, newRANDs(1), here))
	if p.AttemptID == "" {
		t.Fatalf("IMSI %s is bound", imsi)
	}
	return p.AttemptID
}

// activate has a vector go out under an IMSI's pending binding, and reports success.
func (r *rig) activate(t testing.TB, imsi string) {
	t.Helper()
	if p := must[*binding.Prepared](t)(r.service.PrepareVector(t.Context(), imsi, newRANDs(1), here)); p.AttemptID != "" {
		t.Fatalf("IMSI %s is not bound", imsi)
	}
	got := must[*binding.Reported](t)(r.service.ReportAuthentication(t.Context(), imsi, true, here))
	if !got.Served || got.Binding.State != binding.Active {
		t.Fatalf("IMSI %s is not active: %+v", imsi, got)
	}
}

// checkBound looks into the store, past the service.
func (r *rig) checkBound(t testing.TB, imsi string, want bool) {
	t.Helper()
	sub := must[*binding.Subscription](t)(r.store.Subscription(t.Context(),
		must[kme.IMSI](t)(kme.ParseIMSI(imsi)), time.Now()))
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
	store *directory.FileStore
}

func newMaker(t testing.TB) *maker {
	t.Helper()
	key := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	m := &maker{Signer: must[*directory.Signer](t)(directory.NewSigner(key)), kek: make([]byte, 32), dir: t.TempDir()}
	rand.Read(m.kek)
	m.pem = must[[]byte](t)(pemkey.Encode(m.Public()))
	m.store = must[*directory.FileStore](t)(directory.OpenFileStore(m.dir))
	return m
}

func (m *maker) reader(t testing.TB) *directory.Reader {
	t.Helper()
	// Tests publish while they read, and revoke: see rig.refresh.
	return directory.NewReader(m.store, directory.NewVerifier(m.Public()), directory.ReaderOptions{RevocationTTL: time.Hour, NegativeTTL: time.Nanosecond})
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

func (m *maker) enrolment(t testing.TB, r *rig) *directory.Enrolment {
	t.Helper()
	transport := r.transport(t)
	return &directory.Enrolment{
		Manufacturer: m.KeyID(), Operator: operator, TransportKey: directory.RSAThumbprint(transport), KEK: m.kekKey().HexID(),
		Algorithm: directory.RSAOAEP, Wrapped: must[[]byte](t)(rsa.EncryptOAEP(sha1.New(), rand.Reader, transport, m.kek, nil)),
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
func (m *maker) newLot(t testing.TB, name string, suite kme.Suite, key *rsa.PrivateKey, first int, devices ...any) *lot {
	t.Helper()
	tac := must[kme.TAC](t)(kme.ParseTAC(testTAC))
	l := &lot{key: key, Manifest: &directory.Manifest{
		Lot: name, Manufacturer: m.KeyID(), Suite: suite, N: key.N.Bytes(), E: key.E, Mechanism: "software",
		Ranges: []directory.Range{{TAC: tac, First: first, Count: len(devices)}}, ShardSize: len(devices), Created: time.Now().UTC(),
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
	if err := directory.BeginRevocations(t.Context(), m.store, m.Signer, l.Manifest, time.Now(), time.Hour); err != nil {
		t.Fatal(err)
	}
	return l
}

func (m *maker) wrap(t testing.TB, key *rsa.PrivateKey) []byte {
	t.Helper()
	return must[[]byte](t)(must[*subtle.KWP](t)(subtle.NewKWP(m.kek)).Wrap(must[[]byte](t)(x509.MarshalPKCS8PrivateKey(key))))
}

func (m *maker) grant(t testing.TB, l *lot) *directory.Grant {
	t.Helper()
	return &directory.Grant{
		Operator: operator, KEK: m.kekKey().HexID(), Lot: l.Lot, Algorithm: directory.A256KWP, Wrapped: m.wrap(t, l.key),
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
func newServed(t testing.TB) (*rig, *maker, *lot) {
	t.Helper()
	r, m := newRig(t), newMaker(t)
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
func newIMSI() string {
	imsis.Lock()
	defer imsis.Unlock()
	imsis.n++
	return fmt.Sprintf("00101%010d", imsis.n)
}

var imsis struct {
	sync.Mutex
	n int
}

// A recorder notes each call of the service to its token and its store, and can make one fail or something happen first.
type recorder struct {
	binding.Ledger // of the store
	token          binding.Token
	store          binding.Store

	mu     sync.Mutex
	calls  []string                // guarded by mu
	before func(call string) error // guarded by mu
}

// tokenCalls are the methods of binding.Token.
var tokenCalls = []string{"OpenPayload", "EncryptRANDs", "DecryptRAND", "ExportKME"}

func (r *recorder) enter(call string) error {
	r.mu.Lock()
	r.calls = append(r.calls, call)
	before := r.before
	r.mu.Unlock()
	if before != nil {
		return before(call)
	}
	return nil
}

// take gives the calls since the last take.
func (r *recorder) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	calls := r.calls
	r.calls = nil
	return calls
}

func (r *recorder) takeToken() []string {
	return slices.DeleteFunc(r.take(), func(call string) bool { return !slices.Contains(tokenCalls, call) })
}

// onFirst lets f happen before a call's first time.
func (r *recorder) onFirst(call string, f func() error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.before = func(c string) error {
		if c != call {
			return nil
		}
		r.mu.Lock()
		r.before = nil
		r.mu.Unlock()
		return f()
	}
}

func (r *recorder) OpenPayload(ctx context.Context, p hsmkeys.Payload) (*hsmkeys.Opened, error) {
	if err := r.enter("OpenPayload"); err != nil {
		return nil, err
	}
	return r.token.OpenPayload(ctx, p)
}

func (r *recorder) EncryptRANDs(ctx context.Context, sealed []byte, rands []hsmkeys.RAND) ([]hsmkeys.RAND, error) {
	if err := r.enter("EncryptRANDs"); err != nil {
		return nil, err
	}
	return r.token.EncryptRANDs(ctx, sealed, rands)
}

func (r *recorder) ExportKME(ctx context.Context, p hsmkeys.Payload) (kme.Secret, error) {
	if err := r.enter("ExportKME"); err != nil {
		return kme.Secret{}, err
	}
	return r.token.ExportKME(ctx, p)
}

func (r *recorder) DecryptRAND(ctx context.Context, sealed []byte, rand hsmkeys.RAND) (out hsmkeys.RAND, err error) {
	if err := r.enter("DecryptRAND"); err != nil {
		return out, err
	}
	return r.token.DecryptRAND(ctx, sealed, rand)
}

func (r *recorder) Prepare(ctx context.Context, q binding.VectorRequest) (binding.Decision, error) {
	if err := r.enter("Prepare"); err != nil {
		return binding.Decision{}, err
	}
	return r.store.Prepare(ctx, q)
}

func (r *recorder) Spent(ctx context.Context, imsi kme.IMSI, rand hsmkeys.RAND) (bool, error) {
	if err := r.enter("Spent"); err != nil {
		return false, err
	}
	return r.store.Spent(ctx, imsi, rand)
}

func (r *recorder) Establish(ctx context.Context, b *binding.Binding, tag []byte, good bool, now time.Time) error {
	if err := r.enter("Establish"); err != nil {
		return err
	}
	return r.store.Establish(ctx, b, tag, good, now)
}

func (r *recorder) Report(ctx context.Context, imsi kme.IMSI, o kme.Origin, ok bool,
	now time.Time) (*binding.Subscription, error) {
	if err := r.enter("Report"); err != nil {
		return nil, err
	}
	return r.store.Report(ctx, imsi, o, ok, now)
}

func (r *recorder) Subscription(ctx context.Context, imsi kme.IMSI, now time.Time) (*binding.Subscription, error) {
	if err := r.enter("Subscription"); err != nil {
		return nil, err
	}
	return r.store.Subscription(ctx, imsi, now)
}

func (r *recorder) OpenAttempt(ctx context.Context, a binding.Attempt) error {
	if err := r.enter("OpenAttempt"); err != nil {
		return err
	}
	return r.store.OpenAttempt(ctx, a)
}

func (r *recorder) Revoke(ctx context.Context, imsi kme.IMSI, now time.Time) (*binding.Binding, error) {
	if err := r.enter("Revoke"); err != nil {
		return nil, err
	}
	return r.store.Revoke(ctx, imsi, now)
}

func (r *recorder) Bindings(ctx context.Context, q binding.BindingQuery) ([]*binding.Binding, error) {
	if err := r.enter("Bindings"); err != nil {
		return nil, err
	}
	return r.store.Bindings(ctx, q)
}

func (r *recorder) DropExpired(ctx context.Context, now time.Time) error {
	return r.store.DropExpired(ctx, now)
}

// A logBuffer holds what the service logged.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
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

// known are the known answers of kme/testdata.
type known struct {
	Lots []struct {
		Name string
		Key  string `json:"private_key_pkcs8_pem"`
	}
	Vectors []*vector
}

type vector struct {
	Name    string
	Suite   kme.Suite
	Expect  string
	Why     string
	Lot     string   `json:"lot_key"`
	Device  []byte   `json:"device_public_key_spki_b64"`
	KME     hexBytes `json:"kme_hex"`
	RME     hexBytes `json:"rme_hex"`
	Payload hexBytes `json:"payload_hex"`
	NWSig   hexBytes `json:"nw_sig_hex"`
}

// secondOfPair says that the vector is the one to be refused for its KME, which the first of the pair has used.
func (v *vector) secondOfPair() bool { return strings.Contains(v.Name, "second of a malleated pair") }

type hexBytes []byte

func (h *hexBytes) UnmarshalText(text []byte) (err error) {
	*h, err = hex.DecodeString(string(text))
	return err
}

var vectors = func() func(t testing.TB) *known {
	read := sync.OnceValues(func() (*known, error) {
		data, err := os.ReadFile(filepath.FromSlash("../kme/testdata/kme-payload.json"))
		if err != nil {
			return nil, err
		}
		k := new(known)
		return k, json.Unmarshal(data, k)
	})
	return func(t testing.TB) *known {
		t.Helper()
		return must[*known](t)(read())
	}
}()

func (k *known) lot(t testing.TB, name string) *rsa.PrivateKey {
	t.Helper()
	for _, l := range k.Lots {
		if l.Name == name {
			block, _ := pem.Decode([]byte(l.Key))
			return must[any](t)(x509.ParsePKCS8PrivateKey(block.Bytes)).(*rsa.PrivateKey)
		}
	}
	t.Fatalf("the known answers have no lot %s", name)
	return nil
}

// newKnown is an operator who serves the lots of the known answers, and the device of each. A manifest has one suite, so
// a lot key that is used with two stands for two lots.
func newKnown(t testing.TB) (r *rig, devices map[*vector]*device) {
	t.Helper()
	r, m, k := newRig(t), newMaker(t), vectors(t)
	r.enroll(t, m)
	type lotOf struct {
		key   string
		suite kme.Suite
	}
	keys := map[lotOf][]any{}
	index := map[string]int{} // of a device in its lot, by its key
	for _, v := range k.Vectors {
		at := lotOf{v.Lot, v.Suite}
		if _, seen := index[string(v.Device)]; !seen {
			index[string(v.Device)] = len(keys[at])
			keys[at] = append(keys[at], must[any](t)(x509.ParsePKIXPublicKey(v.Device)))
		}
	}
	lots := map[lotOf]*lot{}
	for at, devices := range keys {
		name := at.key + "-" + string(at.suite)
		lots[at] = m.newLot(t, name, at.suite, k.lot(t, at.key), 100*(len(lots)+1), devices...)
		r.take(t, m, lots[at])
	}
	devices = map[*vector]*device{}
	for _, v := range k.Vectors {
		devices[v] = lots[lotOf{v.Lot, v.Suite}].devices[index[string(v.Device)]]
	}
	r.recorder.take()
	return r, devices
}

func (r *rig) slog() *slog.Logger { return slog.New(slog.NewJSONHandler(r.log, nil)) }

// attemptPastRecorder opens an attempt unless the IMSI is bound, where the recorder does not see it.
func (r *rig) attemptPastRecorder(t testing.TB, imsi string) string {
	t.Helper()
	parsed := must[kme.IMSI](t)(kme.ParseIMSI(imsi))
	d := must[binding.Decision](t)(r.store.Prepare(t.Context(), binding.VectorRequest{
		IMSI: parsed, Origin: here, RANDs: []hsmkeys.RAND{hsmkeys.RAND(newRANDs(1)[0])}, Now: time.Now(),
		AttemptID: "attempt of " + imsi, AttemptTTL: ttl, PendingVectors: 3,
	}))
	if d.Attempt == nil {
		return ""
	}
	return d.Attempt.ID
}
