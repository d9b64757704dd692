package directory

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/kme"
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newSigner(t testing.TB) *Signer {
	t.Helper()
	s, err := NewSigner(newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func tac(t testing.TB, s string) kme.TAC {
	t.Helper()
	v, err := kme.ParseTAC(s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// newManifest is a lot of 10 devices in two ranges, 4 a shard.
func newManifest(t testing.TB, s *Signer, lot string) *Manifest {
	t.Helper()
	n := make([]byte, 256)
	rand.Read(n)
	n[0] |= 0x80
	n[255] |= 1
	return &Manifest{
		Lot: lot, Manufacturer: s.KeyID(), Suite: kme.SuiteECDSA, N: n, E: 65537, Mechanism: "CKM_RSA_PKCS_KEY_PAIR_GEN",
		Ranges: []Range{{tac(t, "35209900"), 999_993, 7}, {tac(t, "35209901"), 0, 3}}, ShardSize: 4, Created: time.Now().UTC().Truncate(time.Second),
	}
}

// someHash stands for the SHA-256 of an injection package.
var someHash = bytes.Repeat([]byte{0xfb}, sha256.Size)

func keysOf(t testing.TB, m *Manifest, n int) []DeviceKey {
	t.Helper()
	first, count := m.ShardRange(n)
	var keys []DeviceKey
	for i := range count {
		keys = append(keys, DeviceKey{m.IMEI(first + i), newKey(t).Public()})
	}
	return keys
}

// counting counts the reads of each path, and fails those of paths in down.
type counting struct {
	Store
	mu    sync.Mutex
	reads map[string]int
	down  atomic.Bool
	hold  chan struct{} // where not nil, reads wait for it

	panics atomic.Bool
}

var errDown = errors.New("the store is away")

func (c *counting) Read(ctx context.Context, path string) ([]byte, string, error) {
	c.mu.Lock()
	c.reads[path]++
	c.mu.Unlock()
	if c.hold != nil {
		<-c.hold
	}
	if c.down.Load() {
		return nil, "", errDown
	}
	if c.panics.Load() {
		panic("a store's")
	}
	return c.Store.Read(ctx, path)
}

func (c *counting) count(path string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reads[path]
}

// newLot publishes a whole lot.
func newLot(t testing.TB, s *Signer, lot string) (*counting, *Manifest) {
	t.Helper()
	files, err := OpenFileStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	m := newManifest(t, s, lot)
	publish(t, files, s, m)
	return &counting{Store: files, reads: map[string]int{}}, m
}

func publish(t testing.TB, store Store, s *Signer, m *Manifest) {
	t.Helper()
	if err := errors.Join(Publish(t.Context(), store, ManifestPath(m.Lot), s, TypeManifest, m),
		BeginRevocations(t.Context(), store, s, m, time.Now(), time.Hour)); err != nil {
		t.Fatal(err)
	}
	for n := range m.Shards() {
		shard, err := NewShard(m, n, keysOf(t, m, n), someHash)
		if err != nil {
			t.Fatal(err)
		}
		if err := Publish(t.Context(), store, ShardPath(m.Lot, n), s, TypeShard, shard); err != nil {
			t.Fatal(err)
		}
	}
}

func TestManifestValidate(t *testing.T) {
	s := newSigner(t)
	for name, c := range map[string]struct {
		change func(*Manifest)
		want   string
	}{
		"good":               {func(*Manifest) {}, ""},
		"no name":            {func(m *Manifest) { m.Lot = "" }, "name"},
		"a path":             {func(m *Manifest) { m.Lot = "../x" }, "name"},
		"dots":               {func(m *Manifest) { m.Lot = "a..b" }, "name"},
		"a long name":        {func(m *Manifest) { m.Lot = strings.Repeat("x", 65) }, "name"},
		"no manufacturer":    {func(m *Manifest) { m.Manufacturer = "" }, "manufacturer"},
		"no suite":           {func(m *Manifest) { m.Suite = "" }, "suite"},
		"even e":             {func(m *Manifest) { m.E = 65536 }, "65537"},
		"no modulus":         {func(m *Manifest) { m.N = nil }, "modulus"},
		"even modulus":       {func(m *Manifest) { m.N[255] &^= 1 }, "odd"},
		"leading zero":       {func(m *Manifest) { m.N[0] = 0 }, "leading zero"},
		"odd length":         {func(m *Manifest) { m.N = m.N[1:]; m.N[0] |= 0x80 }, "2040 bits"},
		"suite and modulus":  {func(m *Manifest) { m.Suite = kme.SuiteRSA }, "2048 bits"},
		"no mechanism":       {func(m *Manifest) { m.Mechanism = "" }, "made"},
		"no time":            {func(m *Manifest) { m.Created = time.Time{} }, "made"},
		"shards of none":     {func(m *Manifest) { m.ShardSize = 0 }, "1024"},
		"shards too large":   {func(m *Manifest) { m.ShardSize = 1025 }, "1024"},
		"no ranges":          {func(m *Manifest) { m.Ranges = nil }, "no IMEIs"},
		"no TAC":             {func(m *Manifest) { m.Ranges[0].TAC = kme.TAC{} }, "serial numbers"},
		"no devices":         {func(m *Manifest) { m.Ranges[0].Count = 0 }, "one device at least"},
		"negative":           {func(m *Manifest) { m.Ranges[0].First = -1 }, "serial numbers"},
		"beyond the TAC":     {func(m *Manifest) { m.Ranges[0].Count = 8 }, "serial numbers"},
		"a count that wraps": {func(m *Manifest) { m.Ranges[0].Count = 1<<63 - 1 }, "serial numbers"},
		"overlapping":        {func(m *Manifest) { m.Ranges[1] = m.Ranges[0] }, "overlap"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newManifest(t, s, "L1")
			c.change(m)
			err := m.Validate()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v does not say %q", err, c.want)
			}
		})
	}
}

func TestPositions(t *testing.T) {
	m := newManifest(t, newSigner(t), "L1")
	if m.Devices() != 10 || m.Shards() != 3 {
		t.Fatal(m.Devices(), m.Shards())
	}
	for i := range m.Devices() {
		if at, ok := m.Position(m.IMEI(i)); !ok || at != i {
			t.Errorf("device %d is %v, at %d", i, m.IMEI(i), at)
		}
	}
	for _, s := range []string{"35209900999992", "35209901000003", "35209902000000"} {
		imei, _ := kme.ParseIMEI(s)
		if _, ok := m.Position(imei); ok {
			t.Errorf("%s is in the lot", s)
		}
	}
	for n, want := range [][2]int{{0, 4}, {4, 4}, {8, 2}, {12, 0}} {
		if first, count := m.ShardRange(n); first != want[0] || count != want[1] {
			t.Errorf("shard %d has %d from %d", n, count, first)
		}
	}
	if m.IMEI(10) != (kme.IMEI{}) {
		t.Error("there is an eleventh device")
	}
	other := newManifest(t, newSigner(t), "L2")
	other.Ranges = []Range{{tac(t, "35209901"), 2, 5}}
	if r := m.Overlap(other); r == nil || r.First != 2 {
		t.Errorf("overlap %v", r)
	}
	other.Ranges[0].First = 3
	if r := m.Overlap(other); r != nil {
		t.Errorf("overlap %v", r)
	}
}

// Our JWS, verified by nothing but its RFC: the header, the signed text and r || s.
func TestSignIsJWS(t *testing.T) {
	key := newKey(t)
	s, err := NewSigner(key)
	if err != nil {
		t.Fatal(err)
	}
	m := newManifest(t, s, "L1")
	jws, err := s.Sign(TypeManifest, m)
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(string(jws), ".")
	if len(parts) != 3 {
		t.Fatal(len(parts))
	}
	decode := func(s string) []byte {
		b, err := base64.RawURLEncoding.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	// RFC 7638: the members in order, without white space.
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(fmt.Appendf(nil, `{"crv":"P-256","kty":"EC","x":"%s","y":"%s"}`, base64.RawURLEncoding.EncodeToString(point[1:33]), base64.RawURLEncoding.EncodeToString(point[33:])))
	var header map[string]string
	if err := json.Unmarshal(decode(parts[0]), &header); err != nil || len(header) != 3 || header["alg"] != "ES256" || header["typ"] != "kme-lot-manifest+jws" ||
		header["kid"] != base64.RawURLEncoding.EncodeToString(sum[:]) || header["kid"] != s.KeyID() {
		t.Errorf("header %v, %v", header, err)
	}
	digest, sig := sha256.Sum256([]byte(parts[0]+"."+parts[1])), decode(parts[2])
	if len(sig) != 64 || !ecdsa.Verify(&key.PublicKey, digest[:], new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])) {
		t.Error("the signature does not verify")
	}
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if _, err := NewSigner(p384); err == nil {
		t.Error("a key on P-384 was taken")
	}
	if _, err := (&Signer{signer: faulty{key}, public: &key.PublicKey, root: &key.PublicKey}).Sign(TypeManifest, m); err == nil || !strings.Contains(err.Error(), "does not verify") {
		t.Errorf("a faulty signature was given out: %v", err)
	}
}

// After a rotation readers go on with the key that they have pinned; what was signed before stays good; and nobody but the
// manufacturer introduces a key.
func TestSuccession(t *testing.T) {
	key, second, third, intruder := newKey(t), newKey(t), newKey(t), newKey(t)
	s := must[*Signer](t)(NewSigner(key))
	m := newManifest(t, s, "L1")
	s2 := must[*Signer](t)(s.Succeed(second))
	s3 := must[*Signer](t)(s2.Succeed(third))
	v := NewVerifier(s.Public())
	for i, signer := range []*Signer{s3, s, s2, s3, s2} {
		jws := must[[]byte](t)(signer.Sign(TypeManifest, m))
		if _, err := v.Manifest("L1", jws); err != nil {
			t.Errorf("%d: %v", i, err)
		}
		if by, err := SignerOf(jws); err != nil || by != s.KeyID() || signer.KeyID() != s.KeyID() || !signer.Public().Equal(&key.PublicKey) {
			t.Errorf("%d: signed by %q, %v", i, by, err)
		}
	}
	if s3.SigningKeyID() != thumbprint(&third.PublicKey) {
		t.Error("the third key does not sign")
	}
	if _, err := NewVerifier(&second.PublicKey).Manifest("L1", must[[]byte](t)(s2.Sign(TypeManifest, m))); err == nil {
		t.Error("a later key, pinned as if it were another manufacturer, was believed")
	}

	jwk := func(k *ecdsa.PrivateKey) jose.JSONWebKey {
		return jose.JSONWebKey{Key: k.Public(), KeyID: thumbprint(k.Public())}
	}
	statement := func(by *ecdsa.PrivateKey, typ Type, payload any) string {
		return string(sign(t, map[string]any{"alg": "ES256", "kid": thumbprint(by.Public()), "typ": string(typ)}, payload, es256(t, by)))
	}
	own := statement(key, TypeSuccession, Succession{s.KeyID(), 2, jwk(second)})
	var long []string
	for range maxSuccession {
		long = append(long, own)
	}
	for name, c := range map[string]struct {
		chain any
		by    *ecdsa.PrivateKey
		want  string
	}{
		"good":                     {[]string{own}, second, ""},
		"no chain":                 {nil, second, "pinned"},
		"an empty chain":           {[]string{}, second, "no list"},
		"no list":                  {own, second, "no list"},
		"a list of other things":   {[]any{own, 1}, second, "no list"},
		"far too long":             {long, second, "no list"},
		"the intruder's statement": {[]string{statement(intruder, TypeSuccession, Succession{s.KeyID(), 2, jwk(intruder)})}, intruder, "pinned"},
		"under our name": {[]string{string(sign(t, map[string]any{"alg": "ES256", "kid": s.KeyID(), "typ": string(TypeSuccession)},
			Succession{s.KeyID(), 2, jwk(intruder)}, es256(t, intruder)))}, intruder, "does not verify"},
		"a statement about another key": {[]string{own}, intruder, "pinned"},
		"another type of object":        {[]string{statement(key, TypeManifest, Succession{s.KeyID(), 2, jwk(second)})}, second, "type"},
		"another manufacturer":          {[]string{statement(key, TypeSuccession, Succession{"other", 2, jwk(second)})}, second, "does not introduce"},
		"another generation":            {[]string{statement(key, TypeSuccession, Succession{s.KeyID(), 3, jwk(second)})}, second, "does not introduce"},
		"a key of another kind":         {[]string{statement(key, TypeSuccession, Succession{s.KeyID(), 2, jose.JSONWebKey{Key: &rsa.PublicKey{N: new(big.Int).SetBytes(m.N), E: 65537}}})}, second, "does not introduce"},
		"a step left out":               {[]string{statement(second, TypeSuccession, Succession{s.KeyID(), 3, jwk(third)})}, third, "pinned"},
		"in another order":              {[]string{statement(second, TypeSuccession, Succession{s.KeyID(), 3, jwk(third)}), own}, third, "pinned"},
		"statements beside the first":   {[]string{own}, key, "pinned"},
		"garbage":                       {[]string{"x"}, second, "compact JWS"},
	} {
		t.Run(name, func(t *testing.T) {
			header := map[string]any{"alg": "ES256", "kid": thumbprint(c.by.Public()), "typ": string(TypeManifest), "succession": c.chain}
			if c.chain == nil {
				delete(header, "succession")
			}
			jws := sign(t, header, m, es256(t, c.by))
			SignerOf(jws)
			_, err := NewVerifier(s.Public()).Manifest("L1", jws)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v does not say %q", err, c.want)
			}
		})
	}
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// faulty is a token with a fault in it.
type faulty struct{ crypto.Signer }

func (f faulty) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	other := bytes.Clone(digest)
	other[0] ^= 1
	return f.Signer.Sign(r, other, o)
}

// sign makes a JWS by hand, with any header.
func sign(t testing.TB, header, payload any, mac func(text []byte) []byte) []byte {
	t.Helper()
	h, err := json.Marshal(header)
	if err != nil {
		t.Fatal(err)
	}
	p, ok := payload.([]byte)
	if !ok {
		if p, err = json.Marshal(payload); err != nil {
			t.Fatal(err)
		}
	}
	text := base64.RawURLEncoding.EncodeToString(h) + "." + base64.RawURLEncoding.EncodeToString(p)
	return []byte(text + "." + base64.RawURLEncoding.EncodeToString(mac([]byte(text))))
}

func es256(t testing.TB, key *ecdsa.PrivateKey) func([]byte) []byte {
	return func(text []byte) []byte {
		digest := sha256.Sum256(text)
		r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		sig := make([]byte, 64)
		r.FillBytes(sig[:32])
		s.FillBytes(sig[32:])
		return sig
	}
}

// What whoever runs the store could put in the place of a shard. The reader refuses each, and says of which object and why.
func TestCompromisedStore(t *testing.T) {
	key := newKey(t)
	s, err := NewSigner(key)
	if err != nil {
		t.Fatal(err)
	}
	m := newManifest(t, s, "L1")
	keys := keysOf(t, m, 1)
	good, err := NewShard(m, 1, keys, someHash)
	if err != nil {
		t.Fatal(err)
	}
	header := map[string]any{"alg": "ES256", "kid": s.KeyID(), "typ": string(TypeShard)}
	with := func(name string, value any) map[string]any {
		h := map[string]any{}
		for k, v := range header {
			h[k] = v
		}
		if h[name] = value; value == nil {
			delete(h, name)
		}
		return h
	}
	shard := func(change func(*Shard)) *Shard {
		c := *good
		c.Keys = append([]DeviceKey(nil), good.Keys...)
		change(&c)
		return &c
	}
	own := es256(t, key)
	intruder := newKey(t)
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	hs256 := func(text []byte) []byte {
		h := hmac.New(sha256.New, spki)
		h.Write(text)
		return h.Sum(nil)
	}
	signed := sign(t, header, good, own)
	parts := bytes.Split(signed, []byte("."))
	swapped := sign(t, header, shard(func(s *Shard) { s.Keys[0].Key = intruder.Public() }), own)
	private, err := (&jose.JSONWebKey{Key: intruder, KeyID: m.IMEI(4).String()}).MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	payload, _ := json.Marshal(good)
	first, _ := json.Marshal(good.Keys[0])
	for name, c := range map[string]struct {
		jws  []byte
		want string
	}{
		"good":                      {signed, ""},
		"a swapped key":             {bytes.Join([][]byte{parts[0], bytes.Split(swapped, []byte("."))[1], parts[2]}, []byte(".")), "does not verify"},
		"another manufacturer's":    {sign(t, with("kid", thumbprint(&intruder.PublicKey)), good, es256(t, intruder)), "pinned"},
		"another's under our name":  {sign(t, header, good, es256(t, intruder)), "does not verify"},
		"truncated":                 {signed[:len(signed)-10], "does not verify"},
		"without a signature":       {bytes.Join([][]byte{parts[0], parts[1], nil}, []byte(".")), "refused"},
		"cut in the payload":        {signed[:len(signed)/2], "compact JWS"},
		"something behind":          {append(bytes.Clone(signed), '\n', 'x'), "refused"},
		"empty":                     {nil, "compact JWS"},
		"alg none":                  {sign(t, with("alg", "none"), good, func([]byte) []byte { return nil }), "ES256"},
		"HS256 with the public key": {sign(t, with("alg", "HS256"), good, hs256), "ES256"},
		"another type":              {sign(t, with("typ", string(TypeManifest)), good, own), "type"},
		"no type":                   {sign(t, with("typ", nil), good, own), "type"},
		"a key in the header":       {sign(t, with("jwk", jose.JSONWebKey{Key: intruder.Public()}), good, own), "headers"},
		"another header":            {sign(t, with("iat", 1), good, own), "headers"},
		"a critical header":         {sign(t, with("crit", []string{"b64"}), good, own), "refused"},
		"another lot's":             {sign(t, header, shard(func(s *Shard) { s.Lot = "L2" }), own), `lot "L2"`},
		"another shard":             {sign(t, header, shard(func(s *Shard) { s.Number = 0 }), own), "shard 0"},
		"in another order":          {sign(t, header, shard(func(s *Shard) { s.Keys[0], s.Keys[1] = s.Keys[1], s.Keys[0] }), own), "key 0 is that of"},
		"a device missing":          {sign(t, header, shard(func(s *Shard) { s.Keys = s.Keys[:3] }), own), "3 keys"},
		"of no package":             {sign(t, header, shard(func(s *Shard) { s.Package = nil }), own), "package has 0 bytes"},
		"a hash cut short":          {sign(t, header, shard(func(s *Shard) { s.Package = s.Package[:31] }), own), "package has 31 bytes"},
		"a hash too long":           {sign(t, header, shard(func(s *Shard) { s.Package = append(bytes.Clone(s.Package), 0) }), own), "package has 33 bytes"},
		"a hash that is no base64":  {sign(t, header, bytes.Replace(payload, []byte(`"package":"-`), []byte(`"package":"+`), 1), own), "base64url"},
		"one key twice":             {sign(t, header, shard(func(s *Shard) { s.Keys[1].Key = s.Keys[0].Key }), own), "have one key"},
		"a key of the other suite":  {sign(t, header, shard(func(s *Shard) { s.Keys[0].Key = &rsa.PublicKey{N: new(big.Int).SetBytes(m.N), E: 65537} }), own), "suite"},
		"a private key":             {sign(t, header, bytes.Replace(payload, first, private, 1), own), "not a valid public key"},
		"an unknown field":          {sign(t, header, bytes.Replace(payload, []byte(`{"lot"`), []byte(`{"x":1,"lot"`), 1), own), "unknown field"},
		"two documents":             {sign(t, header, append(bytes.Clone(payload), "{}"...), own), "more than one"},
		"no JSON":                   {sign(t, header, []byte("x"), own), "parsed"},
	} {
		t.Run(name, func(t *testing.T) {
			store, err := OpenFileStore(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(store.Create(t.Context(), ShardPath("L1", 1), c.jws),
				BeginRevocations(t.Context(), store, s, m, time.Now(), time.Hour)); err != nil {
				t.Fatal(err)
			}
			_, err = NewReader(store, NewVerifier(s.Public()), ReaderOptions{}).Device(t.Context(), m, m.IMEI(4))
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			var r *RefusedError
			if !errors.As(err, &r) || r.Object != ShardPath("L1", 1) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v does not say %q", err, c.want)
			}
		})
	}
	// And in the place of a manifest, another lot's.
	store, err := OpenFileStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	other, err := s.Sign(TypeManifest, newManifest(t, s, "L2"))
	if err == nil {
		err = store.Create(t.Context(), ManifestPath("L1"), other)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewReader(store, NewVerifier(s.Public()), ReaderOptions{}).Manifest(t.Context(), "L1"); err == nil || !strings.Contains(err.Error(), `manifest of lot "L2"`) {
		t.Error(err)
	}
}

func TestPublishAgain(t *testing.T) {
	s := newSigner(t)
	store, m := newLot(t, s, "L1")
	// Another signature each time, and the same payload.
	if err := Publish(t.Context(), store, ManifestPath("L1"), s, TypeManifest, m); err != nil {
		t.Errorf("the same again: %v", err)
	}
	changed := *m
	changed.ShardSize = 5
	if err := Publish(t.Context(), store, ManifestPath("L1"), s, TypeManifest, &changed); !errors.As(err, new(*ConflictError)) {
		t.Errorf("another payload: %v", err)
	}
	if err := Publish(t.Context(), store, ManifestPath("L1"), newSigner(t), TypeManifest, m); !errors.As(err, new(*ConflictError)) {
		t.Errorf("another manufacturer's: %v", err)
	}
}

func TestReader(t *testing.T) {
	s := newSigner(t)
	store, m := newLot(t, s, "L1")
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{})
	ctx := t.Context()
	if all, err := r.Manifests(ctx); err != nil || len(all) != 1 || all[0].Lot != "L1" {
		t.Error(all, err)
	}
	for i := range m.Devices() {
		d, err := r.Device(ctx, m, m.IMEI(i))
		if err != nil {
			t.Fatal(err)
		}
		shard, err := r.ReadShard(ctx, m, i/4)
		if err != nil {
			t.Fatal(err)
		}
		if d.Shard != i/4 || d.Revoked != nil || !shard.Keys[i%4].Key.(*ecdsa.PublicKey).Equal(d.Key) {
			t.Errorf("device %d: %+v", i, d)
		}
	}
	if n := store.count(ShardPath("L1", 0)); n != 5 {
		t.Errorf("shard 0 was read %d times, of which 4 were this test's", n)
	}
	stranger, _ := kme.ParseIMEI("35209902000000")
	if _, err := r.Device(ctx, m, stranger); !errors.Is(err, ErrUnknownDevice) {
		t.Error(err)
	}
	store.down.Store(true)
	if _, err := r.Device(ctx, m, m.IMEI(9)); err != nil {
		t.Errorf("the store is away, and a cached device with it: %v", err)
	}
}

func TestReaderRSA(t *testing.T) {
	s := newSigner(t)
	store, err := OpenFileStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	m := newManifest(t, s, "L1")
	n := make([]byte, 384)
	rand.Read(n)
	n[0] |= 0x80
	n[383] |= 1
	m.N, m.Suite, m.Ranges = n, kme.SuiteRSA, m.Ranges[1:]
	var keys []DeviceKey
	for i := range m.Devices() {
		k, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, DeviceKey{m.IMEI(i), k.Public()})
	}
	shard, err := NewShard(m, 0, keys, someHash)
	if err == nil {
		err = errors.Join(Publish(t.Context(), store, ShardPath("L1", 0), s, TypeShard, shard),
			BeginRevocations(t.Context(), store, s, m, time.Now(), time.Hour))
	}
	if err != nil {
		t.Fatal(err)
	}
	d, err := NewReader(store, NewVerifier(s.Public()), ReaderOptions{}).Device(t.Context(), m, m.IMEI(2))
	if err != nil || !keys[2].Key.(*rsa.PublicKey).Equal(d.Key) {
		t.Error(d, err)
	}
}

// However many ask for devices of one shard that nobody has asked for yet, the store is asked once; and a caller who
// gives up does not fail the others.
func TestReaderOneFlight(t *testing.T) {
	s := newSigner(t)
	store, m := newLot(t, s, "L1")
	store.hold = make(chan struct{})
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{})
	gone, cancel := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() { _, err := r.Device(gone, m, m.IMEI(0)); first <- err }()
	for store.count(ShardPath("L1", 0)) == 0 {
		time.Sleep(time.Millisecond)
	}
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			if _, err := r.Device(t.Context(), m, m.IMEI(i%4)); err != nil {
				t.Error(err)
			}
		})
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	time.Sleep(20 * time.Millisecond) // the hundred come up
	close(store.hold)
	all.Wait()
	for _, path := range []string{ShardPath("L1", 0), RevocationsPath("L1")} {
		if n := store.count(path); n != 1 {
			t.Errorf("%s was read %d times", path, n)
		}
	}
}

// A store that makes a shard when it is read, of the same keys each, so that a lot of any size is there at once.
type generated struct {
	Store
	t    *testing.T
	s    *Signer
	m    *Manifest
	keys []DeviceKey
}

func (g *generated) Read(_ context.Context, path string) ([]byte, string, error) {
	var n int
	if path == RevocationsPath(g.m.Lot) {
		jws, err := g.s.Sign(TypeRevocations, &Revocations{Lot: g.m.Lot, Version: 1})
		return jws, "1", err
	}
	if _, err := fmt.Sscanf(path, "lots/"+g.m.Lot+"/shards/%06d", &n); err != nil {
		return nil, "", ErrNotFound
	}
	first, count := g.m.ShardRange(n)
	keys := slices.Clone(g.keys[:count])
	for i := range keys {
		keys[i].IMEI = g.m.IMEI(first + i)
	}
	shard, err := NewShard(g.m, n, keys, someHash)
	if err != nil {
		g.t.Fatal(err)
	}
	jws, err := g.s.Sign(TypeShard, shard)
	return jws, "1", err
}

// However many devices are looked up, the process does not grow by more than the bound, and a half for the garbage
// collector and the structure of the cache.
func TestReaderCacheBound(t *testing.T) {
	limit, devices := int64(16<<20), 1_000_000
	if raceEnabled { // five times slower; with 64 bytes a key, this too is more than the bound
		limit, devices = 2<<20, 50_000
	}
	s := newSigner(t)
	m := newManifest(t, s, "L1")
	m.Ranges, m.ShardSize = []Range{{tac(t, "35209900"), 0, devices}}, 1024
	r := NewReader(&generated{t: t, s: s, m: m, keys: keysOf(t, m, 0)}, NewVerifier(s.Public()), ReaderOptions{CacheBytes: limit})
	heap := func() int64 {
		runtime.GC()
		runtime.GC() // what the first one finalised
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		return int64(stats.HeapAlloc)
	}
	before := heap()
	for i := range devices {
		if _, err := r.Device(t.Context(), m, m.IMEI(i)); err != nil {
			t.Fatal(err)
		}
	}
	r.shards.CleanUp()
	grown := heap() - before
	t.Logf("%d devices looked up with a cache of %d MiB: the heap has grown by %.1f MiB", devices, limit>>20, float64(grown)/(1<<20))
	if grown > limit*3/2+1<<20 || grown < limit/2 {
		t.Errorf("the heap has grown by %d bytes with a cache of %d", grown, limit)
	}
	runtime.KeepAlive(r)
}

func TestReaderMissingShard(t *testing.T) {
	s := newSigner(t)
	files, err := OpenFileStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	store, m := &counting{Store: files, reads: map[string]int{}}, newManifest(t, s, "L1")
	const ttl = 300 * time.Millisecond
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{NegativeTTL: ttl})
	path := ShardPath("L1", 0)
	start := time.Now()
	for range 1000 {
		if _, err := r.Device(t.Context(), m, m.IMEI(0)); !errors.Is(err, ErrUnknownDevice) {
			t.Fatal(err)
		}
	}
	if n, took := store.count(path), time.Since(start); n > 1+int(took/ttl) {
		t.Errorf("a missing shard was asked for %d times in %s", n, took)
	}
	publish(t, files, s, m)
	for start := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		if _, err := r.Device(t.Context(), m, m.IMEI(0)); err == nil {
			break
		} else if time.Since(start) > 10*time.Second {
			t.Fatal("a shard published since is never found: ", err)
		}
	}
	// What may pass is not remembered.
	store.down.Store(true)
	if _, err := r.Device(t.Context(), m, m.IMEI(4)); !errors.Is(err, errDown) {
		t.Error(err)
	}
	store.down.Store(false)
	if _, err := r.Device(t.Context(), m, m.IMEI(4)); err != nil {
		t.Error(err)
	}
}

func TestRevocations(t *testing.T) {
	s := newSigner(t)
	store, m := newLot(t, s, "L1")
	ctx, now := t.Context(), time.Now()
	const ttl = 50 * time.Millisecond
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{RevocationTTL: ttl})
	revoked := func(i int) bool {
		t.Helper()
		time.Sleep(2 * ttl)
		d, err := r.Device(ctx, m, m.IMEI(i))
		if err != nil {
			t.Fatal(err)
		}
		return d.Revoked != nil
	}
	if revoked(3) {
		t.Error("revoked before it was")
	}
	for range 2 {
		if err := Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(3)}, "stolen", now, nil); err != nil {
			t.Fatal(err)
		}
	}
	if !revoked(3) || revoked(2) {
		t.Error("the list does not reach a cached shard, or reaches the wrong device")
	}
	old, _, err := store.Read(ctx, RevocationsPath("L1"))
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for _, i := range []int{1, 5, 0, 9} {
		all.Go(func() {
			if err := Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(i)}, "lost", now, nil); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	list, err := r.ReadRevocations(ctx, m)
	if err != nil || len(list.Parts) != 1 || list.Parts[0].Version != 5 || fmt.Sprintf("%x", []byte(list.Parts[0].Revoked)) != "d440" {
		t.Fatalf("%+v, %v", list, err)
	}
	if !revoked(9) {
		t.Error("9 is not revoked")
	}
	// The store goes back to the first list, and then away: what was seen last stands.
	_, version, _ := store.Read(ctx, RevocationsPath("L1"))
	if err := store.Update(ctx, RevocationsPath("L1"), old, version); err != nil {
		t.Fatal(err)
	}
	if !revoked(9) {
		t.Error("an older list was believed")
	}
	store.down.Store(true)
	if !revoked(9) || revoked(2) {
		t.Error("the list went with the store")
	}
	stranger, _ := kme.ParseIMEI("35209902000000")
	store.down.Store(false)
	for name, err := range map[string]error{
		"another lot's device": Revoke(ctx, store, s, m, []kme.IMEI{stranger}, "x", now, nil),
		"no reason":            Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(2)}, " ", now, nil),
		"a long reason":        Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(2)}, strings.Repeat("x", 201), now, nil),
		"another's list":       Revoke(ctx, store, newSigner(t), m, []kme.IMEI{m.IMEI(2)}, "x", now, nil),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// A list that cannot be read, or is not believed, does not make the one before it younger, and each try is told.
func TestOverdue(t *testing.T) {
	s := newSigner(t)
	store, m := newLot(t, s, "L1")
	ctx, now := t.Context(), time.Now()
	var told []Overdue
	const ttl = 20 * time.Millisecond
	o := ReaderOptions{RevocationTTL: ttl, Overdue: func(d Overdue) { told = append(told, d) }}
	r := NewReader(store, NewVerifier(s.Public()), o)
	look := func() error {
		t.Helper()
		time.Sleep(2 * ttl)
		_, _, err := r.RevocationsOf(ctx, m, m.IMEI(3))
		return err
	}
	// Without a list there is no answer.
	store.down.Store(true)
	if err := look(); !errors.Is(err, errDown) || len(told) != 1 || told[0] != (Overdue{"L1", Failed, time.Time{}, errDown}) {
		t.Fatalf("%v, %+v", err, told)
	}
	store.down.Store(false)
	if err := errors.Join(look(), Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(3)}, "stolen", now, nil), look()); err != nil {
		t.Fatal(err)
	}
	if got := r.Overdue(); len(got) != 0 || len(told) != 1 {
		t.Errorf("%+v", got)
	}
	read := time.Now()
	good, _, err := store.Read(ctx, RevocationsPath("L1"))
	if err != nil {
		t.Fatal(err)
	}
	put := func(jws []byte) { put(t, store, RevocationsPath("L1"), jws) }
	older, err := s.Sign(TypeRevocations, &Revocations{Lot: "L1", Version: 1})
	if err != nil {
		t.Fatal(err)
	}
	anothers, err := newSigner(t).Sign(TypeRevocations, &Revocations{Lot: "L1", Version: 9})
	if err != nil {
		t.Fatal(err)
	}
	same := must[[]byte](t)(s.Sign(TypeRevocations, &Revocations{Lot: "L1", Version: 2}))
	for name, c := range map[string]struct {
		harm func()
		why  Why
	}{
		"away":                    {func() { store.down.Store(true) }, Failed},
		"an older one":            {func() { put(older) }, Rollback},
		"another of this version": {func() { put(same) }, Rollback},
		"another's":               {func() { put(anothers) }, Refused},
		"noise":                   {func() { put([]byte("noise")) }, Refused},
		"a panic on read":         {func() { store.panics.Store(true) }, Failed},
		"gone":                    {func() { remove(t, store, RevocationsPath("L1")) }, Withheld},
	} {
		told = nil
		c.harm()
		for range 2 {
			if err := look(); err != nil {
				t.Errorf("%s: the last list does not stand: %v", name, err)
			}
		}
		got := r.Overdue()
		if len(told) != 2 || len(got) != 1 || got[0].Lot != "L1" || got[0].Why != c.why || told[1].Why != c.why {
			t.Errorf("%s: told %+v, overdue %+v", name, told, got)
		} else if !got[0].Since.Before(read) {
			t.Errorf("%s: the list that stands is said to be of %s", name, got[0].Since)
		}
		store.down.Store(false)
		store.panics.Store(false)
		put(good)
		if err := look(); err != nil || len(r.Overdue()) != 0 {
			t.Errorf("after %s: %v, %+v", name, err, r.Overdue())
		}
		read = time.Now()
	}
}

// A panic over what the store has is the error of those who wait for it, and no end of the process.
func TestReaderPanics(t *testing.T) {
	s := newSigner(t)
	store, m := newLot(t, s, "L1")
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{})
	store.panics.Store(true)
	if _, err := r.Device(t.Context(), m, m.IMEI(0)); panics.Of(err) == nil {
		t.Errorf("%v", err)
	}
	store.panics.Store(false)
	if _, err := r.Device(t.Context(), m, m.IMEI(0)); err != nil {
		t.Errorf("after it: %v", err)
	}
}

// A device that came back has the key that it was issued last; a revocation after that is of that key too.
func TestReissue(t *testing.T) {
	ctx, s := t.Context(), newSigner(t)
	store, m := newLot(t, s, "L1")
	imei, now := m.IMEI(3), time.Now()
	device := func() Device {
		t.Helper()
		d, err := NewReader(store, NewVerifier(s.Public()), ReaderOptions{}).Device(ctx, m, imei)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	same := func(a, b crypto.PublicKey) bool { return a.(*ecdsa.PublicKey).Equal(b) }
	first, second, third := device().Key, DeviceKey{imei, newKey(t).Public()}, DeviceKey{imei, newKey(t).Public()}
	step := func(err error, key crypto.PublicKey, revoked bool, history int) {
		t.Helper()
		if d := device(); err != nil || !same(d.Key, key) || (d.Revoked != nil) != revoked || len(d.History) != history {
			t.Errorf("%+v, %v", d, err)
		}
		if got := listed(t, readerOf(store, s), m, imei); got != revoked {
			t.Errorf("the list alone: %v", got)
		}
	}
	if err := Revoke(ctx, store, s, m, []kme.IMEI{m.IMEI(5)}, "stolen", now, nil); err != nil {
		t.Fatal(err)
	}
	step(nil, first, false, 0)
	if d := device(); !bytes.Equal(d.Package, someHash) {
		t.Errorf("the package of the first key is %x", d.Package)
	}
	anotherHash := bytes.Repeat([]byte{1}, sha256.Size)
	step(Reissue(ctx, store, s, m, second, someHash, "return 1", now), second.Key, false, 1)
	step(Reissue(ctx, store, s, m, second, someHash, "return 1", now), second.Key, false, 1)
	step(Revoke(ctx, store, s, m, []kme.IMEI{imei}, "stolen", now, nil), second.Key, true, 2)
	step(Revoke(ctx, store, s, m, []kme.IMEI{imei}, "stolen", now, nil), second.Key, true, 2)
	step(Reissue(ctx, store, s, m, third, anotherHash, "return 2", now), third.Key, false, 3)
	if d := device(); !bytes.Equal(d.Package, anotherHash) {
		t.Errorf("the package of the key issued last is %x", d.Package)
	}
	if d, err := NewReader(store, NewVerifier(s.Public()), ReaderOptions{}).Device(ctx, m, m.IMEI(5)); err != nil || d.Revoked == nil {
		t.Errorf("the other device: %+v, %v", d, err)
	}
	stranger, _ := kme.ParseIMEI("35209902000000")
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]DeviceKey{"another lot's device": {stranger, newKey(t).Public()}, "a key of another suite": {imei, &rsaKey.PublicKey}} {
		if err := Reissue(ctx, store, s, m, key, someHash, "x", now); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	err = Reissue(ctx, store, s, m, DeviceKey{imei, newKey(t).Public()}, nil, "x", now)
	if err == nil || !strings.Contains(err.Error(), "package has 0 bytes") {
		t.Errorf("a key of no package: %v", err)
	}
	// Parts that the line would never sign.
	entry := func(n int, key *DeviceKey) Revocation {
		r := Revocation{m.IMEI(n), "x", now.UTC(), key, nil}
		if key != nil {
			r.Package = someHash
		}
		return r
	}
	short, alone := entry(3, &DeviceKey{imei, newKey(t).Public()}), entry(3, nil)
	short.Package, alone.Package = someHash[1:], someHash
	for name, part := range map[string]*RevocationPart{
		"another device's key": {"L1", 0, 99, []Revocation{entry(3, &DeviceKey{m.IMEI(4), newKey(t).Public()})}},
		"revoked twice":        {"L1", 0, 99, []Revocation{entry(3, nil), entry(3, nil)}},
		"not in order":         {"L1", 0, 99, []Revocation{entry(4, nil), entry(3, nil)}},
		"a key of no suite":    {"L1", 0, 99, []Revocation{entry(3, &DeviceKey{imei, &rsaKey.PublicKey})}},
		"a hash cut short":     {"L1", 0, 99, []Revocation{short}},
		"a hash without a key": {"L1", 0, 99, []Revocation{alone}},
		"another lot's":        {"L2", 0, 99, nil},
		"another part":         {"L1", 1, 99, nil},
	} {
		put(t, store, RevocationPartPath("L1", 0), must[[]byte](t)(s.Sign(TypeRevocationPart, part)))
		if _, err := NewReader(store, NewVerifier(s.Public()), ReaderOptions{}).Device(ctx, m, imei); !errors.As(err, new(*RefusedError)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is published, byte for byte: the key is the base point of P-256 (SP 800-186, 3.2.1.3), the hash that of "abc"
// (FIPS 180-4).
func TestPublishedEncodings(t *testing.T) {
	const jwk = `{"kty":"EC","kid":"35209900000001","crv":"P-256","x":"axfR8uEsQkf4vOblY6RA8ncDfYEt6zOg9KE5RdiYwpY",` +
		`"y":"T-NC4v4af5uO5-tKfA-eFivOM1drMV7Oy7ZAaDe_UfU"}`
	const sum = `"ungWv48Bz-pBQUDeXa4iI7ADYaOWF3qctBD_YfIAFa0"`
	imei, _ := kme.ParseIMEI("35209900000001")
	var key DeviceKey
	if err := key.UnmarshalJSON([]byte(jwk)); err != nil {
		t.Fatal(err)
	}
	hash, at := sha256.Sum256([]byte("abc")), time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, c := range []struct {
		v    any
		want string
	}{
		{Shard{"L1", 7, hash[:], []DeviceKey{key}}, `{"lot":"L1","shard":7,"package":` + sum + `,"keys":[` + jwk + `]}`},
		{Revocation{imei, "RMA 1", at, &key, hash[:]},
			`{"imei":"35209900000001","reason":"RMA 1","time":"2026-01-02T03:04:05Z","key":` + jwk + `,"package":` + sum + `}`},
		{Revocation{imei, "stolen", at, nil, nil},
			`{"imei":"35209900000001","reason":"stolen","time":"2026-01-02T03:04:05Z"}`},
	} {
		if have, err := json.Marshal(c.v); err != nil || string(have) != c.want {
			t.Errorf("%s, %v\nwant\n%s", have, err, c.want)
		}
	}
}

func TestShardEqual(t *testing.T) {
	m := newManifest(t, newSigner(t), "L1")
	keys := keysOf(t, m, 0)
	shard := func(n int, key DeviceKey, hash []byte) *Shard {
		return &Shard{"L1", n, hash, []DeviceKey{keys[0], key}}
	}
	one := shard(0, keys[1], someHash)
	for name, c := range map[string]struct {
		other *Shard
		want  bool
	}{
		"the same":        {shard(0, keys[1], bytes.Clone(someHash)), true},
		"another number":  {shard(1, keys[1], someHash), false},
		"another key":     {shard(0, DeviceKey{keys[1].IMEI, newKey(t).Public()}, someHash), false},
		"another IMEI":    {shard(0, DeviceKey{keys[2].IMEI, keys[1].Key}, someHash), false},
		"another package": {shard(0, keys[1], someHash[1:]), false},
		"a key fewer":     {&Shard{"L1", 0, someHash, keys[:1]}, false},
	} {
		if one.Equal(c.other) != c.want || c.other.Equal(one) != c.want {
			t.Errorf("%s: not %v", name, c.want)
		}
	}
}

// put replaces what a store has, as whoever runs it may.
func put(t testing.TB, store Store, path string, jws []byte) {
	t.Helper()
	_, version, err := store.Read(t.Context(), path)
	if err == nil || errors.Is(err, ErrNotFound) {
		err = store.Update(t.Context(), path, jws, version)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// remove takes an object away, as whoever runs the store may.
func remove(t testing.TB, store *counting, path string) {
	t.Helper()
	if err := os.Remove(must[string](t)(store.Store.(*FileStore).file(path))); err != nil {
		t.Fatal(err)
	}
}

// Whatever bytes come, the parsers refuse or accept, and do not panic; what they accept holds together.
func FuzzVerify(f *testing.F) {
	key := newKey(f)
	s, err := NewSigner(key)
	if err != nil {
		f.Fatal(err)
	}
	jws, err := s.Sign(TypeManifest, newManifest(f, s, "L1"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(jws)
	v := NewVerifier(s.Public())
	f.Fuzz(func(t *testing.T, data []byte) {
		SignerOf(data)
		if _, err := v.Manifest("L1", data); err == nil && !bytes.Equal(bytes.TrimSpace(data), jws) {
			parts, ours := bytes.Split(data, []byte(".")), bytes.Split(jws, []byte("."))
			if len(parts) != 3 || !bytes.Equal(parts[1], ours[1]) {
				t.Errorf("another payload was believed: %s", data)
			}
		}
	})
}

func FuzzPayloads(f *testing.F) {
	s := newSigner(f)
	m := newManifest(f, s, "L1")
	shard, err := NewShard(m, 0, keysOf(f, m, 0), someHash)
	if err != nil {
		f.Fatal(err)
	}
	reissued := Revocation{m.IMEI(0), "x", time.Now().UTC(), &shard.Keys[0], someHash}
	part := &RevocationPart{Lot: "L1", Version: 1, Revoked: []Revocation{reissued}}
	for _, v := range []any{m, shard, &Revocations{Lot: "L1", Version: 1}, part} {
		b, err := json.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var anyM Manifest
		if ParseStrict(data, &anyM) == nil && anyM.Validate() == nil {
			for _, i := range []int{0, anyM.Devices() - 1} {
				if at, ok := anyM.Position(anyM.IMEI(i)); !ok || at != i {
					t.Errorf("device %d of %+v is at %d", i, anyM, at)
				}
			}
		}
		var anyS Shard
		if ParseStrict(data, &anyS) == nil && anyS.check(m, 0) == nil {
			if len(anyS.Package) != sha256.Size {
				t.Errorf("a shard with the hash %x was accepted", anyS.Package)
			}
			for _, k := range anyS.Keys {
				if key, err := unpack(m.Suite, pack(k.Key)); err != nil || !k.Key.(*ecdsa.PublicKey).Equal(key) {
					t.Errorf("%v became %v, %v", k.Key, key, err)
				}
			}
		}
		var anyR Revocations
		if ParseStrict(data, &anyR) == nil && anyR.check(m) == nil {
			for i := range m.Devices() {
				anyR.revokes(i)
			}
		}
		var anyP RevocationPart
		if ParseStrict(data, &anyP) == nil && anyP.check(m, 0) == nil {
			anyP.bitmap(m)
			for _, e := range anyP.Revoked {
				if (e.Key == nil) != (len(e.Package) == 0) || e.Key != nil && len(e.Package) != sha256.Size {
					t.Errorf("%+v was accepted", e)
				}
			}
		}
	})
}

func BenchmarkCachedDevice(b *testing.B) {
	s := newSigner(b)
	store, m := newLot(b, s, "L1")
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{})
	imei := m.IMEI(3)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Device(b.Context(), m, imei); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkShard256(b *testing.B) {
	s := newSigner(b)
	m := newManifest(b, s, "L1")
	m.Ranges, m.ShardSize = []Range{{tac(b, "35209900"), 0, 256}}, 256
	store, err := OpenFileStore(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	publish(b, store, s, m)
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{})
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.ReadShard(b.Context(), m, 0); err != nil {
			b.Fatal(err)
		}
	}
}

// A device that is cached costs its key, and what the caller asks with: the garbage of a million lookups a second is a matter of this number.
func TestCachedDeviceAllocations(t *testing.T) {
	s := newSigner(t)
	store, m := newLot(t, s, "L1")
	r := NewReader(store, NewVerifier(s.Public()), ReaderOptions{})
	imei := m.IMEI(3)
	n := testing.AllocsPerRun(100, func() {
		if _, err := r.Device(t.Context(), m, imei); err != nil {
			t.Fatal(err)
		}
	})
	if n > 12 {
		t.Errorf("%v allocations, not at most 12", n)
	}
}
