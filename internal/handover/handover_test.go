package handover

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	return must.Get[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
}

func TestInjection(t *testing.T) {
	imei, _ := kme.ParseIMEI("35209900000001")
	key := newKey(t)
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	line := NewInjectionLine(imei, "L1", 0, key.Public(), "a1b2", []byte{1, 2, 3})
	file, _, err := MarshalPackage(line, line)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(
		`{"imei":"35209900000001","lot":"L1","shard":0,"public_key":{"kty":"EC","kid":"35209900000001","crv":"P-256","x":"%s","y":"%s"},"device_key":{"alg":"A256KWP","kid":"a1b2","wrapped":"AQID"}}`,
		base64.RawURLEncoding.EncodeToString(point[1:33]), base64.RawURLEncoding.EncodeToString(point[33:]))
	if string(file) != want+"\n"+want+"\n" {
		t.Errorf("%s\nwant\n%s", file, want)
	}
	n := 0
	for got, err := range ReadInjection(bytes.NewReader(file)) {
		if err != nil || got.IMEI != imei || string(got.DeviceKey.Wrapped) != "\x01\x02\x03" {
			t.Error(got, err)
		}
		n++
	}
	if n != 2 {
		t.Errorf("%d lines", n)
	}
	for name, bad := range map[string]string{
		"truncated":         want[:len(want)-5],
		"empty line":        "",
		"another IMEI":      strings.Replace(want, `"imei":"35209900000001"`, `"imei":"35209900000002"`, 1),
		"no IMEI":           strings.Replace(want, `"imei":"35209900000001",`, ``, 1),
		"an unknown field":  strings.Replace(want, `"shard"`, `"x":1,"shard"`, 1),
		"a bad lot":         strings.Replace(want, `"L1"`, `"../x"`, 1),
		"another algorithm": strings.Replace(want, `A256KWP`, `A256KW`, 1),
		"padded base64":     strings.Replace(want, `AQID`, `AQIDBA==`, 1),
		"a point off the curve": strings.Replace(want, base64.RawURLEncoding.EncodeToString(point[33:]),
			base64.RawURLEncoding.EncodeToString(point[1:33]), 1),
		"no wrapped key": strings.Replace(want, `AQID`, ``, 1),
		"too long":       want + strings.Repeat(" ", maxLine),
	} {
		t.Run(name, func(t *testing.T) {
			n := 0
			var last error
			for _, err := range ReadInjection(strings.NewReader(want + "\n" + bad + "\n" + want + "\n")) {
				n++
				last = err
			}
			if n != 2 || last == nil || !strings.Contains(last.Error(), "line 2") {
				t.Errorf("after %d lines: %v", n, last)
			}
		})
	}
}

func TestPartiesFiles(t *testing.T) {
	key := newKey(t)
	e := NewFixtureEnrolment("f1", "a1", []byte{1}, &key.PublicKey)
	data, err := e.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	back, err := ParseFixtureEnrolment(data)
	if err != nil {
		t.Fatal(err)
	}
	if v, err := back.Verifier(); err != nil || v.KeyID() != directory.NewVerifier(&key.PublicKey).KeyID() ||
		back.KeyID != "a1" {
		t.Error(back, err)
	}
	for name, bad := range map[string]string{
		"truncated": string(data[:len(data)/2]), "empty": "", "no kid": strings.Replace(string(data), `"a1"`, `""`, 1),
		"another algorithm": strings.Replace(string(data), `"RSA-OAEP"`, `"RSA1_5"`, 1),
		"no key":            strings.Replace(string(data), `"AQ"`, `""`, 1),
		"an unknown field":  strings.Replace(string(data), `{`, `{"x":1,`, 1),
		"another type":      strings.Replace(string(data), TypeFixtureEnrolment, TypeTransportKey, 1),
		"a bad name":        strings.Replace(string(data), `"f1"`, `"../f1"`, 1),
	} {
		if _, err := ParseFixtureEnrolment([]byte(bad)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	transport := &must.Get[*rsa.PrivateKey](t)(testkeys.RSA(2048)).PublicKey
	file := must.Get[[]byte](t)(NewReceiver(TypeTransportKey, transport, "0123"))
	pub, err := ParseReceiver(TypeTransportKey, file, pemkey.Thumbprint(transport))
	if err != nil || !pub.Equal(transport) {
		t.Error(pub, err)
	}
	fixture := must.Get[[]byte](t)(pemkey.Encode(transport))
	for name, bad := range map[string]string{
		"truncated": string(file[:len(file)/2]), "empty": "", "a bare public key": string(fixture),
		"a fixture's enrolment": string(data), "another type": strings.Replace(string(file), TypeTransportKey,
			TypeFixtureEnrolment, 1),
		"an unknown field": strings.Replace(string(file), `{`, `{"x":1,`, 1),
		"another kid": strings.Replace(string(file), pemkey.Thumbprint(transport),
			directory.NewVerifier(&key.PublicKey).KeyID(), 1),
		"for signatures": strings.Replace(string(file), `"enc"`, `"sig"`, 1),
		"for RSA1_5":     strings.Replace(string(file), `"RSA-OAEP"`, `"RSA1_5"`, 1),
	} {
		if _, err := ParseReceiver(TypeTransportKey, []byte(bad), pemkey.Thumbprint(transport)); err == nil {
			t.Errorf("a transport key, %s: accepted", name)
		}
	}
	for _, readOut := range []string{"", directory.NewVerifier(&key.PublicKey).KeyID(),
		pemkey.Thumbprint(transport) + "A"} {
		if _, err := ParseReceiver(TypeTransportKey, file, readOut); err == nil ||
			!strings.Contains(err.Error(), "read it out again") {
			t.Errorf("thumbprint %q: %v", readOut, err)
		}
	}
	good := Enrolment{Manufacturer: "m", Operator: "op", TransportKey: "t", KEK: "k", Algorithm: RSAOAEP,
		Wrapped: []byte{1}}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for _, change := range []func(*Enrolment){
		func(e *Enrolment) { e.Manufacturer = "" }, func(e *Enrolment) { e.Operator = "../x" }, func(e *Enrolment) {
			e.TransportKey = ""
		},
		func(e *Enrolment) { e.KEK = "" }, func(e *Enrolment) { e.Algorithm = "" }, func(e *Enrolment) {
			e.Wrapped = nil
		},
	} {
		bad := good
		if change(&bad); bad.Validate() == nil {
			t.Errorf("%+v is valid", bad)
		}
	}
	grant := Grant{Operator: "op", KEK: "k", Lot: "L1", Algorithm: A256KWP, Wrapped: []byte{1}, Manifest: "a.b.c"}
	if err := grant.Validate(); err != nil {
		t.Error(err)
	}
	for _, change := range []func(*Grant){
		func(g *Grant) { g.Operator = "" }, func(g *Grant) { g.KEK = "" }, func(g *Grant) { g.Lot = "a/b" },
		func(g *Grant) { g.Algorithm = "A256KW" }, func(g *Grant) { g.Wrapped = nil }, func(g *Grant) {
			g.Manifest = ""
		},
	} {
		bad := grant
		if change(&bad); bad.Validate() == nil {
			t.Errorf("%+v is valid", bad)
		}
	}
}

// Whatever bytes come, the parsers refuse or accept, and do not panic.
func FuzzParse(f *testing.F) {
	key := newKey(f)
	enrolment, err := NewFixtureEnrolment("f1", "a1", []byte{1}, &key.PublicKey).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	transport := &must.Get[*rsa.PrivateKey](f)(testkeys.RSA(2048)).PublicKey
	f.Add(enrolment)
	f.Add(must.Get[[]byte](f)(NewReceiver(TypeTransportKey, transport, "0123")))
	f.Fuzz(func(t *testing.T, data []byte) {
		ParseFixtureEnrolment(data)
		ParseReceiver(TypeTransportKey, data, "")
		ParseReceiver(TypeRestoreKey, data, "")
	})
}

func FuzzReadInjection(f *testing.F) {
	imei, _ := kme.ParseIMEI("35209900000001")
	file, _, err := MarshalPackage(NewInjectionLine(imei, "L1", 0, newKey(f).Public(), "a1", []byte{1}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(file)
	f.Fuzz(func(t *testing.T, data []byte) {
		for line, err := range ReadInjection(bytes.NewReader(data)) {
			if err == nil && (line.PublicKey.IMEI != line.IMEI || len(line.DeviceKey.Wrapped) == 0) {
				t.Errorf("%+v was accepted", line)
			}
		}
	})
}
