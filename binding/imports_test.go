package binding_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"fmt"
	"math/big"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/binding/imports"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// tampers are what can happen to a signed file on its way.
var tampers = []struct {
	name string
	do   func(jws []byte) []byte
	want string
}{
	{"another payload", func(b []byte) []byte { return replaceAt(b, slices.Index(b, '.')+20) }, "refused"},
	{"another signature", func(b []byte) []byte { return replaceAt(b, len(b)-20) }, "signature does not verify"},
	{"truncated", func(b []byte) []byte { return b[:len(b)-1] }, ""},
	{"its first half", func(b []byte) []byte { return b[:len(b)/2] }, "no compact JWS"},
	{"empty", func([]byte) []byte { return nil }, "no compact JWS"},
	{"no JWS", func([]byte) []byte { return []byte("{}") }, "no compact JWS"},
	{"twice", func(b []byte) []byte { return append(append(slices.Clone(b), '\n'), b...) }, "no compact JWS"},
}

func replaceAt(b []byte, i int) []byte {
	b = slices.Clone(b)
	if b[i] == 'A' {
		b[i] = 'B'
	} else {
		b[i] = 'A'
	}
	return b
}

func checkSays(t *testing.T, name string, err error, want string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: accepted", name)
	} else if !strings.Contains(err.Error(), want) {
		t.Errorf("%s: error %q does not say %q", name, err, want)
	}
}

// checkLeft insists on what is in the token and the database.
func checkLeft(t *testing.T, name string, r *harness, keys map[hsmkeys.Key]bool, manufacturers, lots int) {
	t.Helper()
	for k, want := range keys {
		if has := must[bool](t)(r.token.Has(t.Context(), k)); has != want {
			t.Errorf("%s: the token has %s: %v, want %v", name, k, has, want)
		}
	}
	if n := len(must[[]*registry.Manufacturer](t)(r.store.Manufacturers(t.Context()))); n != manufacturers {
		t.Errorf("%s: %d manufacturers, want %d", name, n, manufacturers)
	}
	if n := len(must[[]*registry.Lot](t)(r.store.Lots(t.Context()))); n != lots {
		t.Errorf("%s: %d lots, want %d", name, n, lots)
	}
}

func TestEnroll(t *testing.T) {
	r, m, other := newHarness(t), newMaker(t), newMaker(t)
	// Everybody has read out what the key given says.
	enroll := func(jws, pem []byte) (*registry.Manufacturer, error) {
		readOut := ""
		if v, err := directory.ParseVerifier(pem); err == nil {
			readOut = v.KeyID()
		}
		return imports.Enroll(t.Context(), r.token, r.store, imports.Enrolment{JWS: jws, PEM: pem, Thumbprint: readOut,
			Directory: "file:" + m.dir})
	}
	good := m.sign(t, handover.TypeEnrolment, m.enrolment(t, r))
	transport := r.transport(t)
	elsewhere := vectors(t).lot(t, "lot-3072")

	for _, readOut := range []string{"", other.KeyID(), m.KeyID()[1:]} {
		_, err := imports.Enroll(t.Context(), r.token, r.store,
			imports.Enrolment{JWS: good, PEM: m.pem, Thumbprint: readOut, Directory: "file:" + m.dir})
		checkSays(t, "another thumbprint read out", err, "read it out again")
	}
	type refusal struct {
		name string
		jws  []byte
		pem  []byte
		want string
	}
	cases := []refusal{
		{"another manufacturer's key given", good, other.pem, "pinned"},
		{"signed by another", other.sign(t, handover.TypeEnrolment, m.enrolment(t, r)), m.pem, "pinned"},
		{"a file of another kind", m.sign(t, handover.TypeGrant, m.enrolment(t, r)), m.pem, "its type is"},
		{"no PEM", good, nil, "no PEM"},
		{"a PEM of another kind of key", good, must[[]byte](t)(pemkey.Encode(transport)), "not an ECDSA public key"},
	}
	for _, tamper := range tampers {
		cases = append(cases, refusal{tamper.name, tamper.do(good), m.pem, tamper.want})
	}
	for _, c := range []struct {
		name   string
		change func(e *handover.Enrolment)
		want   string
	}{
		{"for another transport key", func(e *handover.Enrolment) {
			e.TransportKey = pemkey.Thumbprint(&elsewhere.PublicKey)
			e.Wrapped = must[[]byte](t)(rsa.EncryptOAEP(sha1.New(), rand.Reader, &elsewhere.PublicKey, m.kek, nil))
		}, "keysvc transport new"},
		{"wrapped under another transport key than it says", func(e *handover.Enrolment) {
			key := must[*rsa.PrivateKey](t)(testkeys.RSA(3072))
			e.Wrapped = must[[]byte](t)(rsa.EncryptOAEP(sha1.New(), rand.Reader, &key.PublicKey, m.kek, nil))
		}, "unwrap the KEK"},
		{"for another operator's KEK", func(e *handover.Enrolment) {
			e.Operator = "op-2"
		}, "does not fit the operator"},
		{"with another KEK id", func(e *handover.Enrolment) {
			e.KEK = other.kekKey().HexID()
		}, "does not fit the operator"},
		{"naming another manufacturer", func(e *handover.Enrolment) {
			e.Manufacturer = other.KeyID()
		}, "is of manufacturer"},
		{"damaged before it was signed", func(e *handover.Enrolment) { e.Wrapped[7] ^= 1 }, "unwrap the KEK"},
		{"cut before it was signed", func(e *handover.Enrolment) { e.Wrapped = e.Wrapped[:100] }, ""},
		{"without a key", func(e *handover.Enrolment) { e.Wrapped = nil }, ""},
	} {
		e := m.enrolment(t, r)
		c.change(e)
		cases = append(cases, refusal{c.name, m.sign(t, handover.TypeEnrolment, e), m.pem, c.want})
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := enroll(c.jws, c.pem)
			checkSays(t, c.name, err, c.want)
			none := map[hsmkeys.Key]bool{}
			for _, maker := range []*maker{m, other} {
				for _, name := range []string{operator, "op-2"} {
					none[hsmkeys.Key{Role: hsmkeys.RoleKEK, Manufacturer: maker.KeyID(), Name: name}] = false
				}
			}
			checkLeft(t, c.name, r, none, 0, 0)
		})
	}

	got := must[*registry.Manufacturer](t)(enroll(good, m.pem))
	if got.KeyID != m.KeyID() || got.PEM != string(m.pem) || got.Operator != operator ||
		got.Directory != "file:"+m.dir || got.Enrolled.IsZero() {
		t.Errorf("enrolled %+v", got)
	}
	checkLeft(t, "enrolled", r, map[hsmkeys.Key]bool{m.kekKey(): true}, 1, 0)
	if left := must[[]*rsa.PublicKey](t)(r.token.TransportKeys(t.Context())); len(left) != 0 {
		t.Errorf("%d transport keys outlive their enrolment", len(left))
	}
	must[*registry.Manufacturer](t)(enroll(good, m.pem)) // as who was told nothing of the first time does
	_, err := enroll(other.sign(t, handover.TypeEnrolment, &handover.Enrolment{Manufacturer: other.KeyID(),
		Operator:     operator,
		TransportKey: pemkey.Thumbprint(transport), KEK: other.kekKey().HexID(), Algorithm: handover.RSAOAEP,
		Wrapped: []byte{1}}), other.pem)
	checkSays(t, "for a transport key that another enrolment has used", err, "keysvc transport new")
	checkLeft(t, "enrolled again", r, map[hsmkeys.Key]bool{m.kekKey(): true, other.kekKey(): false}, 1, 0)

	// Enrolling again replaces the KEK: a grant under the new one can be imported, and one under the old cannot.
	l := m.newLot(t, "L1", kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), 1, newDevices(t, 1)...)
	old := m.sign(t, handover.TypeGrant, m.grant(t, l))
	rand.Read(m.kek)
	r.readers[m.KeyID()] = m.reader(t)
	must[*registry.Manufacturer](t)(enroll(m.sign(t, handover.TypeEnrolment, m.enrolment(t, r)), m.pem))
	if _, err := imports.ImportLot(t.Context(), r.token, r.store, old, nil); err == nil {
		t.Error("a grant under the replaced KEK was imported")
	}
	checkLeft(t, "a grant under the replaced KEK", r, map[hsmkeys.Key]bool{m.lotKey("L1"): false}, 1, 0)
	r.take(t, m, l)
	checkLeft(t, "a grant under the new KEK", r, map[hsmkeys.Key]bool{m.lotKey("L1"): true}, 1, 1)
}

func TestImportLot(t *testing.T) {
	r, m, other := newHarness(t), newMaker(t), newMaker(t)
	importLot := func(jws []byte) (*registry.Lot, error) {
		return imports.ImportLot(t.Context(), r.token, r.store, jws, nil)
	}
	l := m.newLot(t, "L2", kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), 10, newDevices(t, 10)...)
	good := m.sign(t, handover.TypeGrant, m.grant(t, l))

	_, err := importLot(good)
	checkSays(t, "before any manufacturer", err, "keysvc enroll")
	r.enroll(t, other)
	_, err = importLot(good)
	checkSays(t, "of a manufacturer who is not enrolled", err, "not enrolled")
	r.enroll(t, m)
	// What others have: IMEIs just below and just above those of L2.
	below := other.newLot(t, "L1", kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), 5, newDevices(t, 5)...)
	above := m.newLot(t, "L1", kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), 20, newDevices(t, 5)...)
	r.take(t, other, below)
	r.take(t, m, above)

	type refusal struct {
		name string
		jws  []byte
		want string
	}
	overlapping := func(lot, name string, m *maker, first, count int) refusal {
		l := m.newLot(t, lot, kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), first, newDevices(t, count)...)
		return refusal{"IMEIs of another lot, " + name, m.sign(t, handover.TypeGrant, m.grant(t, l)),
			"settle it with whoever made them"}
	}
	cases := []refusal{
		{"signed by a manufacturer who is not enrolled", newMaker(t).sign(t, handover.TypeGrant, m.grant(t, l)),
			"not enrolled"},
		{"signed by another manufacturer", other.sign(t, handover.TypeGrant, m.grant(t, l)), "wrapped under key"},
		{"a file of another kind", m.sign(t, handover.TypeEnrolment, m.grant(t, l)), "its type is"},
		overlapping("L2-1", "another manufacturer's last", m, 9, 2),
		overlapping("L2-2", "its own manufacturer's first", m, 15, 6),
		overlapping("L2-3", "around both", m, 1, 50),
		overlapping("L2-4", "within one", other, 21, 1),
	}
	for _, tamper := range tampers {
		cases = append(cases, refusal{tamper.name, tamper.do(good), tamper.want})
	}
	for _, c := range []struct {
		name   string
		change func(g *handover.Grant)
		want   string
	}{
		{"for another operator", func(g *handover.Grant) { g.Operator = "op-2" }, `"op-2"`},
		{"under another KEK", func(g *handover.Grant) { g.KEK = other.kekKey().HexID() }, "wrapped under key"},
		{"under another KEK than it says", func(g *handover.Grant) { g.Wrapped = other.wrap(t, l.key) }, ""},
		{"another lot's key", func(g *handover.Grant) {
			g.Wrapped = m.wrap(t, must[*rsa.PrivateKey](t)(testkeys.RSA(2048)))
		}, "lot L2"},
		{"a key of another length", func(g *handover.Grant) {
			g.Wrapped = m.wrap(t, vectors(t).lot(t, "lot-3072"))
		}, ""},
		{"damaged before it was signed", func(g *handover.Grant) { g.Wrapped[100] ^= 1 }, ""},
		{"cut before it was signed", func(g *handover.Grant) { g.Wrapped = g.Wrapped[:len(g.Wrapped)-8] }, ""},
		{"cut within a block", func(g *handover.Grant) { g.Wrapped = g.Wrapped[:len(g.Wrapped)-1] }, "AES-KWP"},
		{"without a key", func(g *handover.Grant) { g.Wrapped = nil }, ""},
		{"another lot's manifest", func(g *handover.Grant) {
			g.Manifest = string(m.sign(t, directory.TypeManifest, above.Manifest))
		}, `manifest of lot "L1"`},
		{"another manufacturer's manifest", func(g *handover.Grant) {
			g.Manifest = string(other.sign(t, directory.TypeManifest, l.Manifest))
		}, "pinned"},
		{"a manifest that names another manufacturer", func(g *handover.Grant) {
			manifest := *l.Manifest
			manifest.Manufacturer = other.KeyID()
			g.Manifest = string(m.sign(t, directory.TypeManifest, manifest))
		}, "names manufacturer"},
		{"a tampered manifest", func(g *handover.Grant) {
			g.Manifest = string(replaceAt([]byte(g.Manifest), len(g.Manifest)-20))
		}, "does not verify"},
		{"without a manifest", func(g *handover.Grant) { g.Manifest = "" }, ""},
		{"a manifest with another modulus", func(g *handover.Grant) {
			manifest := *l.Manifest
			manifest.N = must[*rsa.PrivateKey](t)(testkeys.RSA(2048)).N.Bytes()
			g.Manifest = string(m.sign(t, directory.TypeManifest, manifest))
		}, "lot L2"},
		{"a modulus with a small factor", func(g *handover.Grant) {
			manifest := *l.Manifest
			n := new(big.Int).SetBytes(manifest.N)
			n.Sub(n, new(big.Int).Mod(n, big.NewInt(30)))
			manifest.N = n.Add(n, big.NewInt(15)).Bytes()
			g.Manifest = string(m.sign(t, directory.TypeManifest, manifest))
		}, "lot L2 is refused: the modulus is weak"},
		{"a name that could not be a path", func(g *handover.Grant) {
			manifest := *l.Manifest
			manifest.Lot, g.Lot = "../L2", "../L2"
			g.Manifest = string(m.sign(t, directory.TypeManifest, manifest))
		}, "not valid"},
	} {
		g := m.grant(t, l)
		c.change(g)
		cases = append(cases, refusal{c.name, m.sign(t, handover.TypeGrant, g), c.want})
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := importLot(c.jws)
			checkSays(t, c.name, err, c.want)
			keys := map[hsmkeys.Key]bool{other.lotKey("L1"): true, m.lotKey("L1"): true}
			for _, maker := range []*maker{m, other} {
				for _, name := range []string{"L2", "../L2", "L2-1", "L2-2", "L2-3", "L2-4"} {
					keys[maker.lotKey(name)] = false
				}
			}
			checkLeft(t, c.name, r, keys, 2, 2)
		})
	}

	want := &registry.Lot{Manufacturer: m.KeyID(), Manifest: l.Manifest}
	for range 2 { // the same grant again changes nothing
		got := must[*registry.Lot](t)(importLot(good))
		if got.Manufacturer != want.Manufacturer || !reflect.DeepEqual(got.Manifest, want.Manifest) {
			t.Errorf("imported %+v", got)
		}
		checkLeft(t, "imported", r, map[hsmkeys.Key]bool{m.lotKey("L2"): true}, 2, 3)
	}
	// A lot is what its first manifest says.
	longer := *l
	manifest := *l.Manifest
	manifest.Ranges = []directory.Range{{TAC: l.Ranges[0].TAC, First: 30, Count: 1}}
	longer.Manifest = &manifest
	_, err = importLot(m.sign(t, handover.TypeGrant, m.grant(t, &longer)))
	checkSays(t, "the same lot with another manifest", err, "another manifest")
	checkLeft(t, "the same lot with another manifest", r, map[hsmkeys.Key]bool{m.lotKey("L2"): true}, 2, 3)
}

// What a manufacturer has signed is believed, but not followed blindly: a file that does not hold together is refused.
func TestInvalidFiles(t *testing.T) {
	r, m := newHarness(t), newMaker(t)
	for _, c := range []struct {
		name   string
		change func(e *handover.Enrolment)
		want   string
	}{
		{"an enrolment by another algorithm", func(e *handover.Enrolment) {
			e.Algorithm = "RSA-OAEP-256"
		}, "RSA-OAEP-256"},
		{"an enrolment without an algorithm", func(e *handover.Enrolment) { e.Algorithm = "" }, handover.RSAOAEP},
		{"an enrolment of a name that could not be a path", func(e *handover.Enrolment) {
			e.Operator = "../op"
		}, "not valid"},
		{"an enrolment of no name", func(e *handover.Enrolment) { e.Operator = "" }, "not valid"},
	} {
		e := m.enrolment(t, r)
		c.change(e)
		e.KEK = hsmkeys.Key{Role: hsmkeys.RoleKEK, Manufacturer: m.KeyID(), Name: e.Operator}.HexID()
		_, err := imports.Enroll(t.Context(), r.token, r.store,
			imports.Enrolment{JWS: m.sign(t, handover.TypeEnrolment, e), PEM: m.pem, Thumbprint: m.KeyID()})
		checkSays(t, c.name, err, c.want)
	}
	r.enroll(t, m)
	for i, algorithm := range []string{"", "A256KW"} {
		l := m.newLot(t, fmt.Sprint("L", i), kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), i, newDevices(t, 1)...)
		g := m.grant(t, l)
		g.Algorithm = algorithm
		_, err := imports.ImportLot(t.Context(), r.token, r.store, m.sign(t, handover.TypeGrant, g), nil)
		checkSays(t, "a grant by algorithm "+algorithm, err, handover.A256KWP)
	}
}

// overtaken is a registry in which something happens between ImportLot's first look and its entry.
type overtaken struct {
	registry.Store
	meanwhile func()
}

func (o overtaken) Lots(ctx context.Context) ([]*registry.Lot, error) {
	lots, err := o.Store.Lots(ctx)
	o.meanwhile()
	return lots, err
}

// Of two lots with the same IMEIs that are imported at once one is refused, and its key does not stay in the token.
func TestImportOvertaken(t *testing.T) {
	r, a, b := newHarness(t), newMaker(t), newMaker(t)
	r.enroll(t, a)
	r.enroll(t, b)
	first := a.newLot(t, "L1", kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), 1, newDevices(t, 1)...)
	second := b.newLot(t, "L1", kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), 1, newDevices(t, 1)...)
	store := overtaken{r.store, func() { r.take(t, a, first) }}
	_, err := imports.ImportLot(t.Context(), r.token, store, b.sign(t, handover.TypeGrant, b.grant(t, second)), nil)
	checkSays(t, "a lot whose IMEIs were taken meanwhile", err, "settle it with whoever made them")
	checkLeft(t, "a lot whose IMEIs were taken meanwhile", r,
		map[hsmkeys.Key]bool{a.lotKey("L1"): true, b.lotKey("L1"): false}, 2, 1)
}

// A TAC is pinned to a manufacturer: no other has a lot of it, and it has no lot of another TAC.
func TestPinnedTACs(t *testing.T) {
	r, one, two := newHarness(t), newMaker(t), newMaker(t)
	tac := func(s string) kme.TAC { return must[kme.TAC](t)(kme.ParseTAC(s)) }
	key := vectors(t).lot(t, "lot-2048")
	enroll := func(m *maker, tacs ...kme.TAC) (*registry.Manufacturer, error) {
		return imports.Enroll(t.Context(), r.token, r.store,
			imports.Enrolment{JWS: m.sign(t, handover.TypeEnrolment, m.enrolment(t, r)), PEM: m.pem,
				Thumbprint: m.KeyID(), Directory: "file:" + m.dir, TACs: tacs})
	}
	refused := func(what string, err error, want string) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", what, err, want)
		}
	}
	grant := func(m *maker, name, of string) error {
		was := testTAC
		testTAC = of
		l := m.newLot(t, name, kme.SuiteECDSA, key, 1, newDevices(t, 1)...)
		testTAC = was
		_, err := imports.ImportLot(t.Context(), r.token, r.store, m.sign(t, handover.TypeGrant, m.grant(t, l)), nil)
		return err
	}
	must[*registry.Manufacturer](t)(enroll(one, tac("35000001"), tac("35000002")))
	if m := must[*registry.Manufacturer](t)(enroll(one)); len(m.TACs) != 2 {
		t.Errorf("enrolled again, it has %v", m.TACs)
	}
	must[*registry.Manufacturer](t)(enroll(two))
	refused("another's lot", grant(two, "A", "35000002"), "pinned to manufacturer "+one.KeyID())
	refused("a lot of a TAC that is not its own", grant(one, "B", "35000003"), "--tac")
	_, err := enroll(two, tac("35000004"), tac("35000001"))
	refused("another's TAC", err, "pinned to manufacturer "+one.KeyID())
	for m, lot := range map[*maker][2]string{one: {"C", "35000001"}, two: {"D", "35000003"}} {
		if err := grant(m, lot[0], lot[1]); err != nil {
			t.Error(err)
		}
	}
	_, err = enroll(one, tac("35000003"))
	refused("a TAC of another's lot", err, "lot D of manufacturer "+two.KeyID())
	for _, m := range must[[]*registry.Manufacturer](t)(r.store.Manufacturers(t.Context())) {
		if want := map[string]int{one.KeyID(): 2, two.KeyID(): 0}[m.KeyID]; len(m.TACs) != want {
			t.Errorf("%s has %v", m.KeyID, m.TACs)
		}
	}
	v := must[registry.Verdict](t)(imports.NewVerdict(true, "somebody", "its key is lost"))
	must[registry.Verdict](t)(imports.Distrust(t.Context(), r.store, one.KeyID(), v))
	if err := grant(two, "E", "35000002"); err != nil {
		t.Errorf("a TAC of a manufacturer that is distrusted: %v", err)
	}
	again := must[registry.Verdict](t)(imports.NewVerdict(false, "somebody", "it was found"))
	_, err = imports.Trust(t.Context(), r.store, one.KeyID(), again)
	refused("trusted again, with a TAC of another's lot", err, "lot E of manufacturer "+two.KeyID())
}

// A manufacturer's lots have its TACs alone, also those that were taken before it was pinned; and a TAC that was pinned
// to another while a manufacturer was distrusted stays that one's.
func TestPinnedLater(t *testing.T) {
	r, one, two := newHarness(t), newMaker(t), newMaker(t)
	other := must[kme.TAC](t)(kme.ParseTAC("35000001"))
	own := must[kme.TAC](t)(kme.ParseTAC(testTAC))
	enroll := func(m *maker, tacs ...kme.TAC) error {
		_, err := imports.Enroll(t.Context(), r.token, r.store,
			imports.Enrolment{JWS: m.sign(t, handover.TypeEnrolment, m.enrolment(t, r)), PEM: m.pem,
				Thumbprint: m.KeyID(), Directory: "file:" + m.dir, TACs: tacs})
		return err
	}
	if err := enroll(one); err != nil {
		t.Fatal(err)
	}
	l := one.newLot(t, "L1", kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), 1, newDevices(t, 1)...)
	must[*registry.Lot](t)(imports.ImportLot(t.Context(), r.token, r.store,
		one.sign(t, handover.TypeGrant, one.grant(t, l)), nil))
	checkSays(t, "pinned to another TAC than its lot has", enroll(one, other), "lot L1 has TAC "+testTAC)
	if err := enroll(one, own, other); err != nil {
		t.Fatal(err)
	}
	checkSays(t, "with fewer TACs than its lots have", enroll(one, other), "lot L1 has TAC "+testTAC)

	must[registry.Verdict](t)(imports.Distrust(t.Context(), r.store, one.KeyID(), verdict(t, true, "its key is lost")))
	if err := enroll(two, other); err != nil {
		t.Fatal(err)
	}
	_, err := imports.Trust(t.Context(), r.store, one.KeyID(), verdict(t, false, "it was found"))
	checkSays(t, "trusted again", err, "TAC 35000001 is pinned to manufacturer "+two.KeyID())
}
