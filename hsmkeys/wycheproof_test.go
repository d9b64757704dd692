package hsmkeys

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"maps"
	"os"
	"strconv"
	"testing"

	"github.com/miekg/pkcs11"
	"github.com/tink-crypto/tink-go/v2/kwp/subtle"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/kme"
)

// A vectorGroup is a group of cases of any of the files.
type vectorGroup struct {
	PublicKey  hexBytes `json:"publicKeyDer"`    // SubjectPublicKeyInfo
	PrivateKey hexBytes `json:"privateKeyPkcs8"` // PKCS #8
	Tests      []vectorCase
}

type vectorCase struct {
	ID                            int `json:"tcId"`
	Comment, Result               string
	Key, Msg, CT, Sig, Tag, Label hexBytes
}

// An outcome says whether our calls accept a case. Special is why they do otherwise than the case's result says.
type outcome struct {
	accepted bool
	special  string
}

// Why a case's own result does not say what our calls have to do with it.
const (
	smallExponent = "e = 3; Suite.CheckDevice refuses every device key whose e is not 65537"
	missingNull   = "DigestInfo without NULL; RFC 8017 section 8.2.2 compares with the one encoding, which has it"
	eightBytes    = "8 bytes; RFC 3394 wraps them, SP 800-38F does not, and a sealed KME has 32"
	withLabel     = "with a label, for one who expects that label; our label is empty"
	zerosAdded    = "a length that is no multiple of 8; SoftHSM unwraps it, but wraps it with zero bytes up to one"
	noKEKsLength  = "a KEK of another length than 32 bytes; SoftHSM takes it, and its CKA_VALUE_LEN is 0, as ever"
	shortHMACKey  = "a key of 16 bytes; SoftHSM refuses those shorter than the hash, and the ledger key has 32"
)

// Project Wycheproof's vectors on a token, through the calls that payloads, wraps and tags use.
//
// A valid case must be accepted, with the very value that it names, and an invalid one be refused. The counts are
// exact: a case that is left out fails the test.
func TestWycheproof(t *testing.T) {
	v := newVectorToken(t)
	const acc, ref = "valid, accepted", "invalid, refused"
	for _, file := range []struct {
		name string
		do   func(*testing.T, *vectorGroup, *vectorCase) outcome
		want map[string]int
	}{
		{"ecdsa_secp256r1_sha256_p1363", v.signature(kme.SuiteECDSA), map[string]int{acc: 169, ref: 83}},
		{"rsa_signature_2048_sha256", v.signature(kme.SuiteRSA), map[string]int{
			acc: 7, ref: 249, "valid, refused: " + smallExponent: 2, "acceptable, refused: " + missingNull: 1}},
		{"aes_kwp", v.lotWrap, map[string]int{acc: 33, ref: 177, "valid, accepted: " + zerosAdded: 44}},
		{"aes_wrap", v.sealed, map[string]int{acc: 36, ref: 126, "acceptable, refused: " + eightBytes: 3}},
		{"rsa_oaep_2048_sha1_mgf1sha1", v.transport, map[string]int{
			acc: 1, ref: 19, "valid, refused: " + withLabel: 7, "valid, accepted: " + noKEKsLength: 9}},
		{"hmac_sha256", v.tag, map[string]int{acc: 60, ref: 108, "valid, refused: " + shortHMACKey: 6}},
	} {
		t.Run(file.name, func(t *testing.T) {
			var vectors struct {
				NumberOfTests int
				TestGroups    []vectorGroup
			}
			data := must[[]byte](t)(os.ReadFile("testdata/wycheproof/" + file.name + "_test.json"))
			if err := json.Unmarshal(data, &vectors); err != nil {
				t.Fatal(err)
			}
			ran, counts := 0, map[string]int{}
			for _, g := range vectors.TestGroups {
				for _, c := range g.Tests {
					t.Run(strconv.Itoa(c.ID), func(t *testing.T) {
						o := file.do(t, &g, &c)
						what := c.Result + ", refused"
						if o.accepted {
							what = c.Result + ", accepted"
						}
						if o.special != "" {
							what += ": " + o.special
						} else if o.accepted != (c.Result == "valid") {
							t.Errorf("%q: %s", c.Comment, what)
						}
						counts[what]++
						ran++
					})
				}
			}
			if ran != vectors.NumberOfTests || !maps.Equal(counts, file.want) {
				t.Errorf("%d of %d cases: %v, want %v", ran, vectors.NumberOfTests, counts, file.want)
			}
		})
	}
}

// A vectorToken has a case's keys in the places of our own, as session objects.
type vectorToken struct {
	*OperatorToken
	// has the objects: a session of the pool ends with the first call that fails, and its objects with it
	s *p11.Session
}

func newVectorToken(t *testing.T) *vectorToken {
	token := newOperatorOn(t, softhsmtest.Token(t))
	s := must[*p11.Session](t)(token.hsm.OpenSession())
	t.Cleanup(func() { s.Close() })
	token.hsm.Forget()
	return &vectorToken{token, s}
}

// create makes an object that ends with the test.
func (v *vectorToken) create(t *testing.T, parts ...ck.Attributes) pkcs11.ObjectHandle {
	t.Helper()
	h := must[pkcs11.ObjectHandle](t)(v.s.Create(ck.Join(append([]ck.Attributes{{ck.Attr(pkcs11.CKA_TOKEN, false)}},
		parts...)...)))
	t.Cleanup(func() {
		if err := v.s.Destroy(h); err != nil {
			t.Error(err)
		}
	})
	return h
}

// stand makes an object that find gives as k, until the test ends.
func (v *vectorToken) stand(t *testing.T, k Key, class uint, parts ...ck.Attributes) pkcs11.ObjectHandle {
	t.Helper()
	h := v.create(t, parts...)
	at := p11.Object{Class: class, ID: string(k.ID())}
	known, err := v.hsm.Remembered(at, func() (pkcs11.ObjectHandle, error) { return h, nil })
	if err != nil || known != h {
		t.Fatalf("%s is known already: %v", k, err)
	}
	t.Cleanup(v.hsm.Forget)
	return h
}

func secretValue(keyType uint, value []byte) ck.Attributes {
	return ck.Attributes{
		ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), ck.Attr(pkcs11.CKA_KEY_TYPE, keyType),
		ck.Attr(pkcs11.CKA_VALUE, value),
	}
}

// readable is the template of an unwrapped secret whose value can be read, as that of none of ours can.
var readable = ck.Attributes{
	ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), ck.Attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
	ck.Attr(pkcs11.CKA_TOKEN, false), ck.Attr(pkcs11.CKA_SENSITIVE, false), ck.Attr(pkcs11.CKA_EXTRACTABLE, true),
}

// unwrapped is the value that a wrapped secret has; ok is false if the token refuses it.
func (v *vectorToken) unwrapped(
	t *testing.T, m uint, key pkcs11.ObjectHandle, ct []byte,
) ([]byte, bool) {
	t.Helper()
	var value []byte
	ok := false
	if len(ct) == 0 { // C_UnwrapKey of miekg/pkcs11 would panic, so each of our calls refuses it before
		return nil, false
	}
	err := v.hsm.With(t.Context(), "test", func(s *p11.Session) error {
		h, err := s.Unwrap(m, key, ct, readable)
		if err != nil {
			return err
		}
		ok = true
		a, err := s.Get(h, pkcs11.CKA_VALUE)
		if err != nil {
			return err
		}
		value = a[0]
		return s.Destroy(h)
	})
	if ok && err != nil {
		t.Error(err)
	}
	return value, ok
}

// wrap wraps a secret.
func (v *vectorToken) wrap(t *testing.T, m uint, key pkcs11.ObjectHandle, value []byte) (ct []byte, err error) {
	t.Helper()
	h := v.create(t, secretValue(pkcs11.CKK_GENERIC_SECRET, value),
		ck.Attributes{ck.Attr(pkcs11.CKA_EXTRACTABLE, true)})
	err = v.hsm.With(t.Context(), "test", func(s *p11.Session) (err error) {
		ct, err = s.Wrap(m, key, h, make([]byte, keyspec.WrappedRoom))
		return err
	})
	return ct, err
}

// wrapped unwraps a case's ciphertext, and wraps its message: both have to give the other one, or neither.
func (v *vectorToken) wrapped(t *testing.T, m uint, key pkcs11.ObjectHandle, c *vectorCase) (o outcome) {
	t.Helper()
	value, ok := v.unwrapped(t, m, key, c.CT)
	if ok && !bytes.Equal(value, c.Msg) {
		t.Errorf("unwraps to %x, want %x", value, c.Msg)
	}
	o.accepted = ok
	ct, err := v.wrap(t, m, key, c.Msg)
	if wraps := err == nil && bytes.Equal(ct, c.CT); wraps == ok {
		return o
	}
	zeros := append(bytes.Clone(c.Msg), make([]byte, 7)...)
	zeros = zeros[:len(zeros)/8*8]
	if value, _ := v.unwrapped(t, m, key, ct); len(zeros) > len(c.Msg) && bytes.Equal(value, zeros) {
		o.special = zerosAdded
	} else {
		t.Errorf("unwraps: %v, but wraps to %x, %v; want %x", ok, ct, err, c.CT)
	}
	return o
}

// signature validates KME_SIG as OpenPayload does, and as it does in software.
func (v *vectorToken) signature(suite kme.Suite) func(*testing.T, *vectorGroup, *vectorCase) outcome {
	return func(t *testing.T, g *vectorGroup, c *vectorCase) outcome {
		pub := must[any](t)(x509.ParsePKIXPublicKey(g.PublicKey))
		sig, formed := []byte(c.Sig), true
		if len(sig) == suite.SignatureSize() { // a payload has no other; to the token go the others as they are
			if formed = keyop.WellFormed(pub, sig); !formed {
				sig = keyop.StandIn(suite)
			}
		}
		var verified bool
		if err := v.hsm.With(t.Context(), "test", func(s *p11.Session) (err error) {
			verified, err = keyop.VerifyKME(s, suite, pub, c.Msg, sig)
			return err
		}); err != nil {
			t.Errorf("not refused but failed, which tells a caller more: %v", err)
		}
		o := outcome{accepted: formed && verified}
		if software := suite.Verify(pub, c.Msg, c.Sig); software != o.accepted {
			t.Errorf("in software: %v", software)
		}
		switch key, _ := pub.(*rsa.PublicKey); {
		case key != nil && key.E == 3 && suite.CheckDevice(pub) != nil:
			o.special = smallExponent
		case c.Result == "acceptable":
			o.special = missingNull
		}
		return o
	}
}

// lotWrap is AES-KWP as it carries lot keys and device keys. No case holds a private key, so none is taken as one.
func (v *vectorToken) lotWrap(t *testing.T, _ *vectorGroup, c *vectorCase) outcome {
	kek := v.stand(t, testKEK, pkcs11.CKO_SECRET_KEY, secretValue(pkcs11.CKK_AES, c.Key), ck.Guarded(false),
		ck.Use(ck.Usages, pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP))
	if taken, err := v.UnwrapLotKey(t.Context(), testLot, testKEK, c.CT, new(rsa.PublicKey)); taken || err == nil {
		t.Error("taken as a lot key")
	}
	return v.wrapped(t, v.hsm.KWP(), kek, c)
}

// sealed is AES key wrap as it seals KMEs.
func (v *vectorToken) sealed(t *testing.T, _ *vectorGroup, c *vectorCase) outcome {
	storage := v.stand(t, keyspec.Storage, pkcs11.CKO_SECRET_KEY, secretValue(pkcs11.CKK_AES, c.Key),
		ck.Guarded(false),
		ck.Use(ck.Usages, pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP))
	o := v.wrapped(t, pkcs11.CKM_AES_KEY_WRAP, storage, c)
	ours := append([]byte{1}, c.CT...) // the first generation's
	switch _, err := v.EncryptRANDs(t.Context(), ours, make([]RAND, 1)); {
	case (err == nil) != (o.accepted && len(ours) == keyop.SealedSize):
		t.Errorf("as a sealed KME: %v", err)
	case err == nil:
		checkSealed(t, v.OperatorToken, ours, c.Msg)
		secret := must[kme.Secret](t)(kme.NewSecret(c.Msg))
		var ct []byte
		if err := v.hsm.With(t.Context(), "test", func(s *p11.Session) (err error) {
			ct, err = keyop.Seal(s, 1, storage, secret)
			return err
		}); err != nil || !bytes.Equal(ct, ours) {
			t.Errorf("seals to %x, %v", ct, err)
		}
	}
	if c.Result == "acceptable" {
		o.special = eightBytes
	}
	return o
}

// transport is RSA-OAEP as it brings KEKs.
func (v *vectorToken) transport(t *testing.T, g *vectorGroup, c *vectorCase) outcome {
	key := must[any](t)(x509.ParsePKCS8PrivateKey(g.PrivateKey)).(*rsa.PrivateKey)
	h := v.create(t, rsaPrivate(key), ck.Guarded(false), ck.Use(ck.PrivateUsages, pkcs11.CKA_UNWRAP),
		ck.Attributes{ck.Attr(pkcs11.CKA_LABEL, keyspec.TransportLabel+"of a case"),
			ck.Attr(pkcs11.CKA_TOKEN, true)})
	value, ok := v.unwrapped(t, keyspec.OAEP, h, c.CT)
	if ok && !bytes.Equal(value, c.Msg) {
		t.Errorf("decrypts to %x, want %x", value, c.Msg)
	}
	err := v.UnwrapKEK(t.Context(), testKEK, &key.PublicKey, c.CT)
	if ok != (err == nil) {
		t.Errorf("as a KEK: %v", err)
	}
	o := outcome{accepted: err == nil}
	switch {
	case c.Result == "valid" && len(c.Label) > 0:
		o.special = withLabel
	case c.Result == "valid" && len(c.Msg) != 32:
		o.special = noKEKsLength
	case o.accepted: // what it unwraps says which key it is
		kwp := must[*subtle.KWP](t)(subtle.NewKWP(c.Msg))
		lot := must[[]byte](t)(kwp.Wrap(g.PrivateKey))
		if taken, err := v.UnwrapLotKey(t.Context(), testLot, testKEK, lot, &key.PublicKey); !taken || err != nil {
			t.Errorf("the KEK is not the message: %v", err)
		}
		if err := v.RemoveLotKey(t.Context(), testLot); err != nil {
			t.Error(err)
		}
	}
	return o
}

// tag is HMAC-SHA-256 as it tags KMEs. Ours are never cut: one that is shorter must be the beginning of ours.
func (v *vectorToken) tag(t *testing.T, _ *vectorGroup, c *vectorCase) outcome {
	ledger := v.create(t, secretValue(pkcs11.CKK_GENERIC_SECRET, c.Key), ck.Guarded(false),
		ck.Use(ck.Usages, pkcs11.CKA_SIGN))
	var tag []byte
	err := v.hsm.With(t.Context(), "test", func(s *p11.Session) (err error) {
		// SoftHSM takes no null pointer for an empty message
		tag, err = keyop.HMAC(s, ledger, append([]byte{}, c.Msg...))
		return err
	})
	switch {
	case ck.IsCKR(err, pkcs11.CKR_KEY_SIZE_RANGE) && len(c.Key) == 16:
		return outcome{special: shortHMACKey}
	case err != nil:
		t.Error(err)
	}
	return outcome{accepted: err == nil && bytes.HasPrefix(tag, c.Tag)}
}
