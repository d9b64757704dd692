package directory

import (
	"bytes"
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
	"maps"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/strict"
)

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
	sum := sha256.Sum256(fmt.Appendf(nil, `{"crv":"P-256","kty":"EC","x":"%s","y":"%s"}`,
		base64.RawURLEncoding.EncodeToString(point[1:33]), base64.RawURLEncoding.EncodeToString(point[33:])))
	var header map[string]string
	if err := json.Unmarshal(decode(parts[0]), &header); err != nil || len(header) != 3 || header["alg"] != "ES256" ||
		header["typ"] != "kme-lot-manifest+jws" ||
		header["kid"] != base64.RawURLEncoding.EncodeToString(sum[:]) || header["kid"] != s.KeyID() {
		t.Errorf("header %v, %v", header, err)
	}
	digest, sig := sha256.Sum256([]byte(parts[0]+"."+parts[1])), decode(parts[2])
	if len(sig) != 64 || !ecdsa.Verify(&key.PublicKey, digest[:], new(big.Int).SetBytes(sig[:32]),
		new(big.Int).SetBytes(sig[32:])) {
		t.Error("the signature does not verify")
	}
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if _, err := NewSigner(p384); err == nil {
		t.Error("a key on P-384 was taken")
	}
	if _, err := (&Signer{signer: faulty{key}, public: &key.PublicKey, root: &key.PublicKey}).Sign(TypeManifest,
		m); err == nil || !strings.Contains(err.Error(), "does not verify") {
		t.Errorf("a faulty signature was given out: %v", err)
	}
}

// An object has one form. Go's decoders of base64url and JSON take others of the same content.
func TestJWSHasOneForm(t *testing.T) {
	key := newKey(t)
	s := must.Get[*Signer](t)(NewSigner(key))
	m := newManifest(t, s, "L1")
	jws := string(must.Get[[]byte](t)(s.Sign(TypeManifest, m)))
	v := NewVerifier(s.Public())
	must.Do(t, v.Verify(TypeManifest, "it", []byte(jws), new(Manifest)))
	first, last := strings.Index(jws, "."), strings.LastIndex(jws, ".")
	forms := map[string]string{"the bits that 64 bytes leave over": jws[:len(jws)-1] + string(jws[len(jws)-1]+1)}
	for name, at := range map[string]int{"header": first, "payload": last, "signature": len(jws)} {
		for _, c := range []string{"\n", "\r", "="} {
			forms[fmt.Sprintf("%q in its %s", c, name)] = jws[:at-4] + c + jws[at-4:]
			forms[fmt.Sprintf("%q behind its %s", c, name)] = jws[:at] + c + jws[at:]
		}
	}
	header := fmt.Sprintf(`{"alg":"ES256","kid":%q,"typ":%q}`, s.KeyID(), TypeManifest)
	payload := string(must.Get[[]byte](t)(json.Marshal(m)))
	signed := func(header, payload string) string {
		return string(sign(t, json.RawMessage(header), []byte(payload), es256(t, key)))
	}
	must.Do(t, v.Verify(TypeManifest, "it", []byte(signed(header, payload)), new(Manifest)))
	forms["a field twice"] = signed(header, strings.Replace(payload, "{", `{"lot":"L2",`, 1))
	forms["a range's field twice"] = signed(header, strings.Replace(payload, `"first"`, `"count":1,"first"`, 1))
	forms["a field in another case"] = signed(header, strings.Replace(payload, `"lot"`, `"Lot"`, 1))
	forms["a header twice"] = signed(strings.Replace(header, "{", `{"kid":"x",`, 1), payload)
	for name, form := range forms {
		if err := v.Verify(TypeManifest, "it", []byte(form), new(Manifest)); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if err := new(strict.Base64).UnmarshalText([]byte("AA\nAA")); err == nil {
		t.Error("a line break in a field: taken")
	}
}

// After a rotation readers go on with the key that they have pinned; what was signed before stays good; and nobody but
// the manufacturer introduces a key.
func TestSuccession(t *testing.T) {
	key, second, third, intruder := newKey(t), newKey(t), newKey(t), newKey(t)
	s := must.Get[*Signer](t)(NewSigner(key))
	m := newManifest(t, s, "L1")
	s2 := must.Get[*Signer](t)(s.Succeed(second))
	s3 := must.Get[*Signer](t)(s2.Succeed(third))
	v := NewVerifier(s.Public())
	for i, signer := range []*Signer{s3, s, s2, s3, s2} {
		jws := must.Get[[]byte](t)(signer.Sign(TypeManifest, m))
		if _, err := v.Manifest("L1", jws); err != nil {
			t.Errorf("%d: %v", i, err)
		}
		if by, err := SignerOf(jws); err != nil || by != s.KeyID() || signer.KeyID() != s.KeyID() ||
			!signer.Public().Equal(&key.PublicKey) {
			t.Errorf("%d: signed by %q, %v", i, by, err)
		}
	}
	if s3.SigningKeyID() != pemkey.Thumbprint(&third.PublicKey) {
		t.Error("the third key does not sign")
	}
	if _, err := NewVerifier(&second.PublicKey).Manifest("L1",
		must.Get[[]byte](t)(s2.Sign(TypeManifest, m))); err == nil {
		t.Error("a later key, pinned as if it were another manufacturer, was believed")
	}

	jwk := func(k *ecdsa.PrivateKey) jose.JSONWebKey {
		return jose.JSONWebKey{Key: k.Public(), KeyID: pemkey.Thumbprint(k.Public())}
	}
	statement := func(by *ecdsa.PrivateKey, typ Type, payload any) string {
		return string(sign(t, map[string]any{"alg": "ES256", "kid": pemkey.Thumbprint(by.Public()), "typ": string(typ)},
			payload, es256(t, by)))
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
		"good":                   {[]string{own}, second, ""},
		"no chain":               {nil, second, "pinned"},
		"an empty chain":         {[]string{}, second, "no list"},
		"no list":                {own, second, "no list"},
		"a list of other things": {[]any{own, 1}, second, "no list"},
		"far too long":           {long, second, "no list"},
		"the intruder's " +
			"statement": {[]string{statement(intruder, TypeSuccession, Succession{s.KeyID(), 2, jwk(intruder)})},
			intruder, "pinned"},
		"under our name": {
			[]string{string(sign(t, map[string]any{"alg": "ES256", "kid": s.KeyID(), "typ": string(TypeSuccession)},
				Succession{s.KeyID(), 2, jwk(intruder)}, es256(t, intruder)))}, intruder, "does not verify"},
		"a statement about another key": {[]string{own}, intruder, "pinned"},
		"another type of object": {[]string{statement(key, TypeManifest, Succession{s.KeyID(), 2, jwk(second)})},
			second, "type"},
		"another manufacturer": {[]string{statement(key, TypeSuccession, Succession{"other", 2, jwk(second)})},
			second, "does not introduce"},
		"another generation": {[]string{statement(key, TypeSuccession, Succession{s.KeyID(), 3, jwk(second)})},
			second, "does not introduce"},
		"a key of another kind": {[]string{statement(key, TypeSuccession,
			Succession{s.KeyID(), 2, jose.JSONWebKey{Key: &rsa.PublicKey{N: new(big.Int).SetBytes(m.N), E: 65537}}})},
			second, "does not introduce"},
		"a step left out": {[]string{statement(second, TypeSuccession,
			Succession{s.KeyID(), 3, jwk(third)})}, third, "pinned"},
		"in another order": {[]string{statement(second, TypeSuccession,
			Succession{s.KeyID(), 3, jwk(third)}), own}, third, "pinned"},
		"statements beside the first": {[]string{own}, key, "pinned"},
		"garbage":                     {[]string{"x"}, second, "compact JWS"},
	} {
		t.Run(name, func(t *testing.T) {
			header := map[string]any{"alg": "ES256", "kid": pemkey.Thumbprint(c.by.Public()),
				"typ":        string(TypeManifest),
				"succession": c.chain}
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

// What whoever runs the store could put in the place of a shard. The reader refuses each, and
// says of which object and why.
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
		maps.Copy(h, header)
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
		"good": {signed, ""},
		"a swapped key": {bytes.Join([][]byte{parts[0], bytes.Split(swapped, []byte("."))[1], parts[2]},
			[]byte(".")), "does not verify"},
		"another manufacturer's": {sign(t, with("kid", pemkey.Thumbprint(&intruder.PublicKey)), good,
			es256(t, intruder)),
			"pinned"},
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
		"a key in the header": {sign(t, with("jwk", jose.JSONWebKey{Key: intruder.Public()}), good, own),
			"headers"},
		"another header":    {sign(t, with("iat", 1), good, own), "headers"},
		"a critical header": {sign(t, with("crit", []string{"b64"}), good, own), "refused"},
		"another lot's":     {sign(t, header, shard(func(s *Shard) { s.Lot = "L2" }), own), `lot "L2"`},
		"another shard":     {sign(t, header, shard(func(s *Shard) { s.Number = 0 }), own), "shard 0"},
		"in another order": {sign(t, header, shard(func(s *Shard) {
			s.Keys[0], s.Keys[1] = s.Keys[1], s.Keys[0]
		}), own), "key 0 is that of"},
		"a device missing": {sign(t, header, shard(func(s *Shard) { s.Keys = s.Keys[:3] }), own), "3 keys"},
		"of no package": {sign(t, header, shard(func(s *Shard) {
			s.Package = nil
		}), own), "package has 0 bytes"},
		"a hash cut short": {sign(t, header, shard(func(s *Shard) {
			s.Package = s.Package[:31]
		}), own), "package has 31 bytes"},
		"a hash too long": {sign(t, header, shard(func(s *Shard) {
			s.Package = append(bytes.Clone(s.Package), 0)
		}), own), "package has 33 bytes"},
		"a hash that is no base64": {sign(t, header,
			bytes.Replace(payload, []byte(`"package":"-`), []byte(`"package":"+`), 1), own), "base64url"},
		"one key twice": {sign(t, header, shard(func(s *Shard) {
			s.Keys[1].Key = s.Keys[0].Key
		}), own), "have one key"},
		"a key of the other suite": {sign(t, header, shard(func(s *Shard) {
			s.Keys[0].Key = &rsa.PublicKey{N: new(big.Int).SetBytes(m.N), E: 65537}
		}), own), "suite"},
		"a private key": {sign(t, header, bytes.Replace(payload, first, private, 1), own), "not a valid public key"},
		"an unknown field": {sign(t, header, bytes.Replace(payload, []byte(`{"lot"`), []byte(`{"x":1,"lot"`), 1), own),
			"unknown field"},
		"two documents": {sign(t, header, append(bytes.Clone(payload), "{}"...), own), "more than one"},
		"no JSON":       {sign(t, header, []byte("x"), own), "parsed"},
	} {
		t.Run(name, func(t *testing.T) {
			store := newMemory()
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
	store := newMemory()
	other, err := s.Sign(TypeManifest, newManifest(t, s, "L2"))
	if err == nil {
		err = store.Create(t.Context(), ManifestPath("L1"), other)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewReader(store, NewVerifier(s.Public()), ReaderOptions{}).Manifest(t.Context(), "L1"); err == nil ||
		!strings.Contains(err.Error(), `manifest of lot "L2"`) {
		t.Error(err)
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
