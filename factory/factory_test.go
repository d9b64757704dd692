package factory

import (
	"bytes"
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/directory/filestore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/kme"
)

func TestMain(m *testing.M) { softhsmtest.Main(m, 35) }

// fixtureKey is the fixture's, of all lines.
var fixtureKey = sync.OnceValue(func() *rsa.PublicKey {
	key, err := testkeys.RSA(3072)
	if err != nil {
		panic(err)
	}
	return &key.PublicKey
})

// newLine is a line on a new token, with one fixture, and an empty directory.
func newLine(t *testing.T) (line *Line, dir string, token *hsmkeys.FactoryToken) {
	t.Helper()
	tok := softhsmtest.Token(t)
	token = must(hsmkeys.OpenFactory(t.Context(), tok.URI, hsmkeys.Options{}))
	if _, err := NewLine(token, nil, State{}); err == nil || !strings.Contains(err.Error(), "factory init") {
		t.Errorf("a line without keys: %v", err)
	}
	if _, _, created, err := Init(t.Context(), token); err != nil || !created {
		t.Fatal(created, err)
	}
	token.Close()
	if _, err := EnrollFixture(t.Context(), tok.URI, hsmkeys.PIN(tok.SOPIN), "f1", fixtureKey(), 0); err != nil {
		t.Fatal(err)
	}
	token = must(hsmkeys.OpenFactory(t.Context(), tok.URI, hsmkeys.Options{}))
	t.Cleanup(func() { token.Close() })
	dir = t.TempDir()
	return must(NewLine(token, must(filestore.Open(dir)), State{Dir: t.TempDir()})), dir, token
}

func spec(t *testing.T, lot string, first, count int) LotSpec {
	t.Helper()
	tac, err := kme.ParseTAC("35209900")
	if err != nil {
		t.Fatal(err)
	}
	return LotSpec{
		Lot: lot, Range: directory.Range{TAC: tac, First: first, Count: count}, Bits: 2048, Suite: kme.SuiteECDSA,
		ShardSize: 4, Primes: hsmkeys.PrimesAuto, Validity: time.Hour,
	}
}

// removeObject takes an object out of the directory, as whoever runs it may.
func removeObject(t *testing.T, dir, path string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, filepath.FromSlash(path))); err != nil {
		t.Fatal(err)
	}
}

// A list of revoked devices is signed anew, for as long as before or for another time; a lot that has none gets
// one only where that is said.
func TestRefresh(t *testing.T) {
	line, dir, _ := newLine(t)
	ctx := t.Context()
	must(line.CreateLot(ctx, spec(t, "L1", 0, 8)))
	for _, c := range []struct {
		validity, want time.Duration
		version        int
	}{{0, time.Hour, 2}, {3 * time.Hour, 3 * time.Hour, 3}, {0, 3 * time.Hour, 4}} {
		list, err := line.Refresh(ctx, "L1", c.validity, false)
		if err != nil || list.Version != c.version || list.NextUpdate.Sub(list.ThisUpdate) != c.want {
			t.Errorf("%+v, %v", list, err)
		}
	}
	removeObject(t, dir, directory.RevocationsPath("L1"))
	removeObject(t, line.state.Dir, directory.RevocationsPath("L1")) // the line's copy
	if _, err := line.Refresh(ctx, "L1", 0, false); !errors.Is(err, directory.ErrNotFound) ||
		!strings.Contains(err.Error(), "--begin") {
		t.Errorf("a list that is not there was signed anew: %v", err)
	}
	for _, err := range []error{line.Grant(ctx, "L1", "op", nil), second(line.Lot(ctx, "L9")),
		second(line.Refresh(ctx, "L9", 0, true))} {
		if err == nil {
			t.Error("what needs a list was done without, or a lot that is not there")
		}
	}
	if list, err := line.Refresh(ctx, "L1", 0, true); err != nil || list.Version != 1 ||
		list.NextUpdate.Sub(list.ThisUpdate) != directory.DefaultValidity {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestInitAgain(t *testing.T) {
	line, _, token := newLine(t)
	pem, keyID, created, err := Init(t.Context(), token)
	if err != nil || created || keyID != line.Manufacturer() || !bytes.Contains(pem, []byte("PUBLIC KEY")) {
		t.Error(string(pem), keyID, created, err)
	}
}

// Packages are for one fixture. With several, whoever provisions says which; each has an injection key of its own.
func TestFixtures(t *testing.T) {
	ctx := t.Context()
	tok := softhsmtest.Token(t)
	officer := hsmkeys.PIN(tok.SOPIN)
	onLine := func(f func(line *Line)) {
		t.Helper()
		token := must(hsmkeys.OpenFactory(ctx, tok.URI, hsmkeys.Options{}))
		defer token.Close()
		f(must(NewLine(token, must(filestore.Open(t.TempDir())), State{Dir: t.TempDir()})))
	}
	token := must(hsmkeys.OpenFactory(ctx, tok.URI, hsmkeys.Options{}))
	if _, _, _, err := Init(ctx, token); err != nil {
		t.Fatal(err)
	}
	token.Close()
	onLine(func(line *Line) {
		if _, err := line.injection(ctx, ""); err == nil || !strings.Contains(err.Error(), "factory fixture enroll") {
			t.Errorf("without a fixture: %v", err)
		}
	})
	enrol := func(name string, key *rsa.PublicKey, generation int) (*Enrolled, bool) {
		t.Helper()
		e, err := EnrollFixture(ctx, tok.URI, officer, name, key, generation)
		if err != nil {
			t.Fatal(err)
		}
		return e, e.Created
	}
	second := must(testkeys.RSA(3072))
	a, _ := enrol("a", fixtureKey(), 0)
	onLine(func(line *Line) {
		if k := must(line.injection(ctx, "")); k.HexID() != a.KeyID {
			t.Errorf("the only fixture: %s", k)
		}
	})
	b, created := enrol("b", &second.PublicKey, 0)
	if again, madeAgain := enrol("b", &second.PublicKey, 0); !created || madeAgain || again.KeyID != b.KeyID ||
		a.KeyID == b.KeyID {
		t.Errorf("created %v, again %v, keys %s and %s", created, madeAgain, a.KeyID, b.KeyID)
	}
	next, created := enrol("b", &second.PublicKey, 2)
	if !created || next.KeyID == b.KeyID {
		t.Errorf("the second generation: %v, %s", created, next.KeyID)
	}
	onLine(func(line *Line) {
		if k := must(line.injection(ctx, "b")); k.HexID() != next.KeyID {
			t.Errorf("fixture b has %s", k)
		}
		for name, want := range map[string]string{"": "say which, of a, b", "c": "no fixture c"} {
			if _, err := line.injection(ctx, name); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("fixture %q: %v", name, err)
			}
		}
	})
	for name, c := range map[string]struct {
		name       string
		key        *rsa.PublicKey
		generation int
		want       string
	}{
		"a bad name":              {"../a", fixtureKey(), 0, "not valid"},
		"another fixture's key":   {"b", fixtureKey(), 0, "enrolled already"},
		"a generation left out":   {"a", fixtureKey(), 3, "the next is 2"},
		"a key that is too short": {"a", &must(testkeys.RSA(2048)).PublicKey, 0, "3072"},
	} {
		if _, err := EnrollFixture(ctx, tok.URI, officer, c.name, c.key, c.generation); err == nil ||
			!strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := EnrollOperator(ctx, tok.URI, officer, "op", fixtureKey(), 0); err == nil ||
		!strings.Contains(err.Error(), "enrolled already") {
		t.Errorf("a fixture's key as an operator's: %v", err)
	}
}

func TestCreateLot(t *testing.T) {
	ctx := t.Context()
	line, dir, token := newLine(t)
	m, err := line.CreateLot(ctx, spec(t, "L1", 10, 10))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := line.Lot(ctx, "L1"); err != nil || fmt.Sprint(got) != fmt.Sprint(m) {
		t.Errorf("published %v, %v; made %v", got, err, m)
	}
	if err := token.ProveLotKey(ctx, line.lotKey("L1"), m.PublicKey()); err != nil {
		t.Error(err)
	}
	x931 := spec(t, "L2", 100, 10)
	x931.Primes = hsmkeys.PrimesX931
	for name, c := range map[string]struct {
		spec LotSpec
		want string
	}{
		"the same lot":     {spec(t, "L1", 100, 10), "exists"},
		"overlapping":      {spec(t, "L2", 19, 10), "in lot L1 already"},
		"a bad name":       {spec(t, "../L2", 100, 10), "not valid"},
		"no devices":       {spec(t, "L2", 100, 0), "one device at least"},
		"beyond the TAC":   {spec(t, "L2", 999_999, 2), "serial numbers"},
		"X9.31 on SoftHSM": {x931, "X9.31"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := line.CreateLot(ctx, c.spec); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v does not say %q", err, c.want)
			}
		})
	}
	if has, err := token.Has(ctx, line.lotKey("L2")); has || err != nil {
		t.Errorf("a refused lot has a key: %v, %v", has, err)
	}

	// Interrupted after the key was made: the next run publishes that key.
	pub, _, err := token.EnsureLotKey(ctx, line.lotKey("L3"), 2048, hsmkeys.PrimesAuto)
	if err != nil {
		t.Fatal(err)
	}
	if m, err = line.CreateLot(ctx, spec(t, "L3", 20, 10)); err != nil || !m.PublicKey().Equal(pub) {
		t.Errorf("the interrupted lot's key was not taken: %v", err)
	}

	// Interrupted after the manifest was out: the next run publishes the list, if it is the same
	// lot and there is no more of it.
	list := directory.RevocationsPath("L3")
	exists := func(what string, s LotSpec) {
		t.Helper()
		if _, err := line.CreateLot(ctx, s); err == nil || !strings.Contains(err.Error(), "lot L3 exists") {
			t.Errorf("%s: %v", what, err)
		}
	}
	exists("a lot that has its list", spec(t, "L3", 20, 10))
	removeObject(t, dir, list)
	removeObject(t, line.state.Dir, list) // the line's copy
	exists("another lot of this name", spec(t, "L3", 20, 11))
	if again, err := line.CreateLot(ctx, spec(t, "L3", 20, 10)); err != nil || !again.PublicKey().Equal(pub) {
		t.Errorf("the interrupted lot got no list: %v", err)
	}
	if l := must(line.Revocations(ctx, m)); l.Version != 1 || l.NextUpdate.Sub(l.ThisUpdate) != time.Hour {
		t.Errorf("%+v", l)
	}
	if err := line.Revoke(ctx, "L3", []kme.IMEI{m.IMEI(1)}, "stolen", nil); err != nil {
		t.Fatal(err)
	}
	removeObject(t, dir, list)
	exists("a lot whose list was taken away", spec(t, "L3", 20, 10))

	// What is published is not published again with other content.
	m.ShardSize++
	err = directory.Publish(ctx, line.store, directory.ManifestPath("L3"), line.signer, directory.TypeManifest, m)
	if !errors.As(err, new(*directory.ConflictError)) {
		t.Error(err)
	}
}

// repeating is a token whose random numbers repeat: the second lot gets the key of the first.
type repeating struct {
	Token
	first hsmkeys.Key
	gone  []hsmkeys.Key
}

func (r *repeating) EnsureLotKey(
	ctx context.Context, k hsmkeys.Key, bits int, p hsmkeys.Primes,
) (*rsa.PublicKey, string, error) {
	return r.Token.EnsureLotKey(ctx, r.first, bits, p)
}

func (r *repeating) RemoveLotKey(_ context.Context, k hsmkeys.Key) error {
	r.gone = append(r.gone, k)
	return nil
}

func TestRepeatedModulus(t *testing.T) {
	line, _, token := newLine(t)
	if _, err := line.CreateLot(t.Context(), spec(t, "L1", 0, 10)); err != nil {
		t.Fatal(err)
	}
	r := &repeating{Token: token, first: line.lotKey("L1")}
	line.token = r
	if _, err := line.CreateLot(t.Context(), spec(t, "L2", 10, 10)); err == nil ||
		!strings.Contains(err.Error(), "is that of lot L1") {
		t.Error(err)
	}
	if len(r.gone) != 1 || r.gone[0] != line.lotKey("L2") {
		t.Errorf("removed %v", r.gone)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestGrantAndSeal(t *testing.T) {
	ctx := t.Context()
	line, _, token := newLine(t)
	m, err := line.CreateLot(ctx, spec(t, "L1", 0, 4))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ lot, operator, want string }{
		"unknown lot":         {"L2", "op", "lot create"},
		"operator's bad name": {"L1", "../op", "not valid"},
		"not enrolled":        {"L1", "op", "operator enroll"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := line.Grant(ctx, c.lot, c.operator, nil); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v does not say %q", err, c.want)
			}
		})
	}
	if err := line.Seal(ctx, "L2"); err == nil {
		t.Error("an unknown lot was sealed")
	}
	if err := line.Seal(ctx, "L1"); err != nil {
		t.Fatal(err)
	}
	if err := line.Grant(ctx, "L1", "op", nil); err == nil || !strings.Contains(err.Error(), "sealed") {
		t.Errorf("a sealed lot: %v", err)
	}
	// The key in the token is not the manifest's: nobody is granted a lot that cannot work.
	if err := token.RemoveLotKey(ctx, line.lotKey("L1")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := token.EnsureLotKey(ctx, line.lotKey("L1"), 2048, hsmkeys.PrimesAuto); err != nil {
		t.Fatal(err)
	}
	if err := line.Grant(ctx, "L1", "op", nil); err == nil || !strings.Contains(err.Error(), "not this modulus's key") {
		t.Errorf("another key than %x: %v", new(big.Int).SetBytes(m.N).Bytes()[:4], err)
	}
}

// A grant is on record when it is given out; one that is refused is not.
func TestGrantRecorded(t *testing.T) {
	ctx, tok := t.Context(), softhsmtest.Token(t)
	token := must(hsmkeys.OpenFactory(ctx, tok.URI, hsmkeys.Options{}))
	_, _, _, err := Init(ctx, token)
	if err := errors.Join(err, token.Close()); err != nil {
		t.Fatal(err)
	}
	must(EnrollOperator(ctx, tok.URI, hsmkeys.PIN(tok.SOPIN), "op", fixtureKey(), 0))
	token = must(hsmkeys.OpenFactory(ctx, tok.URI, hsmkeys.Options{}))
	defer token.Close()
	line := must(NewLine(token, must(filestore.Open(t.TempDir())), State{Dir: t.TempDir()}))
	for i, lot := range []string{"L1", "L2"} {
		must(line.CreateLot(ctx, spec(t, lot, 4*i, 4)))
	}
	if err := line.Seal(ctx, "L2"); err != nil {
		t.Fatal(err)
	}
	// One that cannot be given out is not on record either.
	full := errors.New("the disk is full")
	if err := line.Grant(ctx, "L1", "op", func([]byte) error { return full }); !errors.Is(err, full) {
		t.Error(err)
	}
	if left, err := os.ReadDir(line.state.Dir); err != nil || slices.ContainsFunc(left, func(e os.DirEntry) bool {
		return e.Name() == "grants"
	}) {
		t.Errorf("%v is left of a grant that failed: %v", left, err)
	}
	var grants [][]byte
	keep := func(jws []byte) error {
		if lots, err := line.state.GrantedLots("op"); err != nil || !slices.Contains(lots, "L1") {
			t.Errorf("given out before it was on record: %v", err)
		}
		grants = append(grants, jws)
		return nil
	}
	for range 2 {
		if err := line.Grant(ctx, "L1", "op", keep); err != nil {
			t.Fatal(err)
		}
	}
	if bytes.Equal(grants[0], grants[1]) || !line.sameGrant(grants[0], grants[1]) ||
		line.sameGrant(grants[0][:len(grants[0])-1], grants[1]) {
		t.Error("the same grant is told by its signature, or one that is damaged is the same")
	}
	// A later one that fails does not forget the first.
	if err := line.Grant(ctx, "L1", "op", func([]byte) error { return full }); !errors.Is(err, full) {
		t.Error(err)
	}
	var g handover.Grant
	if err := line.verifier.Verify(handover.TypeGrant, "the grant", grants[0], &g); err != nil || g.Lot != "L1" ||
		g.Operator != "op" {
		t.Errorf("%+v, %v", g, err)
	}
	if granted, err := line.state.Grants("L1"); err != nil || len(granted) != 1 || granted[0].Operator != "op" {
		t.Error(granted, err)
	}
	if err := line.Grant(ctx, "L2", "op", nil); err == nil {
		t.Error("a sealed lot was granted")
	}
	if lots, err := line.state.GrantedLots("op"); err != nil || !slices.Equal(lots, []string{"L1"}) {
		t.Error(lots, err)
	}
	// What cannot be put on record is not given out.
	if err := os.RemoveAll(line.state.path("grants")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(line.state.path("grants"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err = line.Grant(ctx, "L1", "op", func([]byte) error { t.Error("a grant without a record"); return nil })
	if err == nil {
		t.Error("what cannot be put on record was granted")
	}
}
