package factory

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/kme"
)

func TestMain(m *testing.M) { softhsmtest.Main(m, 32) }

// fixtureKey is the fixture's, of all lines.
var fixtureKey = sync.OnceValue(func() *rsa.PublicKey {
	key, err := rsa.GenerateKey(rand.Reader, 3072)
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
	if _, err := NewLine(token, nil); err == nil || !strings.Contains(err.Error(), "factory init") {
		t.Errorf("a line without keys: %v", err)
	}
	if _, _, created, err := Init(t.Context(), token); err != nil || !created {
		t.Fatal(created, err)
	}
	token.Close()
	if _, _, err := EnrollFixture(t.Context(), tok.URI, hsmkeys.PIN(tok.SOPIN), "f1", fixtureKey(), 0); err != nil {
		t.Fatal(err)
	}
	token = must(hsmkeys.OpenFactory(t.Context(), tok.URI, hsmkeys.Options{}))
	t.Cleanup(func() { token.Close() })
	dir = t.TempDir()
	return must(NewLine(token, must(directory.OpenFileStore(dir)))), dir, token
}

func spec(t *testing.T, lot string, first, count int) LotSpec {
	t.Helper()
	tac, err := kme.ParseTAC("35209900")
	if err != nil {
		t.Fatal(err)
	}
	return LotSpec{lot, directory.Range{TAC: tac, First: first, Count: count}, 2048, kme.SuiteECDSA, 4, hsmkeys.PrimesAuto, time.Hour}
}

// removeObject takes an object out of the directory, as whoever runs it may.
func removeObject(t *testing.T, dir, path string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, filepath.FromSlash(path))); err != nil {
		t.Fatal(err)
	}
}

// A list of revoked devices is signed anew, for as long as before or for another time; a lot that has none gets one only
// where that is said.
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
	if _, err := line.Refresh(ctx, "L1", 0, false); !errors.Is(err, directory.ErrNotFound) || !strings.Contains(err.Error(), "--begin") {
		t.Errorf("a list that is not there was signed anew: %v", err)
	}
	for _, err := range []error{second(line.Grant(ctx, "L1", "op")), second(line.Lot(ctx, "L9")), second(line.Refresh(ctx, "L9", 0, true))} {
		if err == nil {
			t.Error("what needs a list was done without, or a lot that is not there")
		}
	}
	if list, err := line.Refresh(ctx, "L1", 0, true); err != nil || list.Version != 1 || list.NextUpdate.Sub(list.ThisUpdate) != directory.DefaultValidity {
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

// Packages are for one fixture. With several, who provisions says which; each has an injection key of its own.
func TestFixtures(t *testing.T) {
	ctx := t.Context()
	tok := softhsmtest.Token(t)
	officer := hsmkeys.PIN(tok.SOPIN)
	onLine := func(f func(line *Line)) {
		t.Helper()
		token := must(hsmkeys.OpenFactory(ctx, tok.URI, hsmkeys.Options{}))
		defer token.Close()
		f(must(NewLine(token, must(directory.OpenFileStore(t.TempDir())))))
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
	enrol := func(name string, key *rsa.PublicKey, generation int) (*directory.FixtureEnrolment, bool) {
		t.Helper()
		e, created, err := EnrollFixture(ctx, tok.URI, officer, name, key, generation)
		if err != nil {
			t.Fatal(err)
		}
		return e, created
	}
	second := must(rsa.GenerateKey(rand.Reader, 3072))
	a, _ := enrol("a", fixtureKey(), 0)
	onLine(func(line *Line) {
		if k := must(line.injection(ctx, "")); k.HexID() != a.KeyID {
			t.Errorf("the only fixture: %s", k)
		}
	})
	b, created := enrol("b", &second.PublicKey, 0)
	if again, madeAgain := enrol("b", &second.PublicKey, 0); !created || madeAgain || again.KeyID != b.KeyID || a.KeyID == b.KeyID {
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
		for name, want := range map[string]string{"": "--fixture", "c": "no fixture c"} {
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
		"a key that is too short": {"a", &must(rsa.GenerateKey(rand.Reader, 2048)).PublicKey, 0, "3072"},
	} {
		if _, _, err := EnrollFixture(ctx, tok.URI, officer, c.name, c.key, c.generation); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, _, err := EnrollOperator(ctx, tok.URI, officer, "op", fixtureKey(), 0); err == nil || !strings.Contains(err.Error(), "enrolled already") {
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

	// Interrupted after the manifest was out: the next run publishes the list, if it is the same lot and there is no more of it.
	list := directory.RevocationsPath("L3")
	exists := func(what string, s LotSpec) {
		t.Helper()
		if _, err := line.CreateLot(ctx, s); err == nil || !strings.Contains(err.Error(), "lot L3 exists") {
			t.Errorf("%s: %v", what, err)
		}
	}
	exists("a lot that has its list", spec(t, "L3", 20, 10))
	removeObject(t, dir, list)
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

func (r *repeating) EnsureLotKey(ctx context.Context, k hsmkeys.Key, bits int, p hsmkeys.Primes) (*rsa.PublicKey, string, error) {
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
	if _, err := line.CreateLot(t.Context(), spec(t, "L2", 10, 10)); err == nil || !strings.Contains(err.Error(), "is that of lot L1") {
		t.Error(err)
	}
	if len(r.gone) != 1 || r.gone[0] != line.lotKey("L2") {
		t.Errorf("removed %v", r.gone)
	}
}

// options keep the journal beside the packages.
func options(out string, workers int) ProvisionOptions {
	return ProvisionOptions{State: filepath.Join(out, "state"), Out: out, Workers: workers}
}

func provision(t *testing.T, line *Line, out string) Progress {
	t.Helper()
	p, err := line.Provision(t.Context(), "L1", options(out, 3))
	if err != nil {
		t.Fatal(err)
	}
	if p.Done != p.Total {
		t.Errorf("%+v", p)
	}
	return p
}

// checkLot compares what is published with the injection packages, device by device.
func checkLot(t *testing.T, line *Line, out string) {
	t.Helper()
	m, err := line.Lot(t.Context(), "L1")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[kme.IMEI]bool{}
	j := must(openJournal(t.Context(), filepath.Join(out, "state"), line.Manufacturer()))
	entries, err := j.entries(t.Context(), "L1")
	if err := errors.Join(err, j.close()); err != nil {
		t.Fatal(err)
	}
	for n := range m.Shards() {
		if entries[n].state != acknowledged {
			t.Errorf("shard %d: the journal has %+v", n, entries[n])
		}
		published, err := line.reader.ReadShard(t.Context(), m, n)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(out, "L1", InjectionFile(n))
		lines, packed, err := ReadPackage(m, n, path)
		if err != nil {
			t.Fatal(err)
		}
		hash := sha256.Sum256(must(os.ReadFile(path)))
		if !packed.Equal(published) || !bytes.Equal(published.Package, hash[:]) || entries[n].pkg != string(hash[:]) {
			t.Errorf("shard %d: package, directory and journal differ", n)
		}
		for _, l := range lines {
			if seen[l.IMEI] {
				t.Errorf("%s twice", l.IMEI)
			}
			seen[l.IMEI] = true
		}
	}
	if len(seen) != m.Devices() {
		t.Errorf("%d devices, want %d", len(seen), m.Devices())
	}
}

func TestProvision(t *testing.T) {
	line, dir, _ := newLine(t)
	if _, err := line.CreateLot(t.Context(), spec(t, "L1", 0, 30)); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	var reports []Progress
	o := options(out, 3)
	o.Report = func(p Progress) { reports = append(reports, p) }
	p, err := line.Provision(t.Context(), "L1", o)
	if err != nil || p.Total != 30 || p.Generated != 30 || p.Done != 30 || p.Made != 30 || len(reports) != 16 || reports[15] != p {
		t.Fatal(p, reports, err)
	}
	if p.HSM <= 0 || p.HSM > 1 || p.Publish <= 0 || p.Publish > 1 {
		t.Errorf("shares %+v", p)
	}
	checkLot(t, line, out)
	if p := provision(t, line, out); p.Made != 0 {
		t.Errorf("a second run made %d keys", p.Made)
	}
	for _, path := range []string{"L1/" + InjectionFile(0), "L1/" + ManifestFile} {
		if info, err := os.Stat(filepath.Join(out, path)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", path, info, err)
		}
	}

	pkg := func(n int) string { return filepath.Join(out, "L1", InjectionFile(n)) }
	shard := func(n int) string {
		return filepath.Join(dir, filepath.FromSlash(directory.ShardPath("L1", n)))
	}
	read := func(path string) []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	refused := func(t *testing.T, want string) {
		t.Helper()
		p, err := line.Provision(t.Context(), "L1", options(out, 1))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
		if p.Made != 0 {
			t.Errorf("%d keys were made", p.Made)
		}
	}
	// Each case harms a file, expects a refusal, and puts back what was there.
	harm := func(t *testing.T, path, want string, change func([]byte) []byte) {
		t.Helper()
		was := read(path)
		if now := change(bytes.Clone(was)); now == nil {
			os.Remove(path)
		} else if err := os.WriteFile(path, now, 0o600); err != nil {
			t.Fatal(err)
		}
		refused(t, want)
		if err := os.WriteFile(path, was, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	truncate := func(b []byte) []byte { return b[:len(b)/2] }
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	remove := func([]byte) []byte { return nil }

	t.Run("published, package lost", func(t *testing.T) { harm(t, pkg(2), "bring it back", remove) })
	t.Run("published, package truncated", func(t *testing.T) { harm(t, pkg(2), "damaged", truncate) })
	t.Run("published, package of another shard", func(t *testing.T) {
		harm(t, pkg(2), "not of this lot and shard", func([]byte) []byte { return read(pkg(3)) })
	})
	t.Run("published, package of another lot", func(t *testing.T) {
		harm(t, pkg(2), "not of this lot and shard", func(b []byte) []byte {
			return bytes.Replace(b, []byte(`"lot":"L1"`), []byte(`"lot":"L2"`), 1)
		})
	})
	t.Run("shard tampered with", func(t *testing.T) { harm(t, shard(2), "refused", flip) })
	t.Run("shard truncated", func(t *testing.T) { harm(t, shard(2), "refused", truncate) })
	t.Run("another shard in its place", func(t *testing.T) { harm(t, shard(2), "it is shard 3", func([]byte) []byte { return read(shard(3)) }) })
	t.Run("manifest tampered with", func(t *testing.T) {
		harm(t, filepath.Join(dir, "lots", "L1", "manifest"), "refused", flip)
	})
	checkLot(t, line, out)

	forget := func() { // as on a machine that has lost its journal
		if err := os.RemoveAll(filepath.Join(out, "state")); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("lost by the directory", func(t *testing.T) {
		was := read(pkg(5))
		os.Remove(shard(5))
		if p := provision(t, line, out); p.Made != 0 || !bytes.Equal(read(pkg(5)), was) {
			t.Errorf("a whole package was not published as it is: %+v", p)
		}
		checkLot(t, line, out)
	})
	t.Run("lost by the directory, package lost", func(t *testing.T) {
		signed := read(shard(5))
		os.Remove(shard(5))
		harm(t, pkg(5), "the journal knows of its keys", remove)
		harm(t, pkg(5), "the journal knows of its keys", truncate)
		if err := os.WriteFile(shard(5), signed, 0o644); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("journal lost", func(t *testing.T) {
		forget()
		if p := provision(t, line, out); p.Made != 0 || p.Done != 30 {
			t.Errorf("%+v", p)
		}
		checkLot(t, line, out)
	})
	t.Run("journal lost, nothing published, no package", func(t *testing.T) {
		forget()
		os.Remove(shard(5))
		os.Remove(pkg(5))
		if p := provision(t, line, out); p.Made != 4 {
			t.Errorf("%+v", p)
		}
		checkLot(t, line, out)
	})
	t.Run("journal lost, not published, package damaged", func(t *testing.T) {
		forget()
		signed := read(shard(5))
		os.Remove(shard(5))
		harm(t, pkg(5), "remove the file", truncate)
		if err := os.WriteFile(shard(5), signed, 0o644); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("planned, package damaged", func(t *testing.T) {
		provision(t, line, out)
		j := must(openJournal(t.Context(), filepath.Join(out, "state"), line.Manufacturer()))
		if err := errors.Join(j.exec("UPDATE shard SET state = ?, package = NULL WHERE number = 5", planned), j.close()); err != nil {
			t.Fatal(err)
		}
		os.Remove(shard(5))
		if err := os.WriteFile(pkg(5), truncate(read(pkg(5))), 0o600); err != nil {
			t.Fatal(err)
		}
		if p := provision(t, line, out); p.Made != 4 {
			t.Errorf("%+v", p)
		}
		checkLot(t, line, out)
	})
	t.Run("keys swapped after publication", func(t *testing.T) {
		other := t.TempDir()
		p := &provisioning{Line: line, m: must(line.Lot(t.Context(), "L1")), injection: must(line.injection(t.Context(), ""))}
		if _, err := p.makeShard(t.Context(), 1, filepath.Join(other, "p")); err != nil {
			t.Fatal(err)
		}
		harm(t, pkg(1), "is not the package of the published keys", func([]byte) []byte { return read(filepath.Join(other, "p")) })
	})
	t.Run("the journal has another package", func(t *testing.T) {
		state := filepath.Join(out, "state")
		j := must(openJournal(t.Context(), state, line.Manufacturer()))
		if err := errors.Join(j.exec("UPDATE shard SET package = x'00' WHERE number = 5"), j.close()); err != nil {
			t.Fatal(err)
		}
		refused(t, "factory reconcile L1 --repair")
		must(line.Reconcile(t.Context(), "L1", state, out, true))
		provision(t, line, out)
		checkLot(t, line, out)
	})
	t.Run("folder not writable", func(t *testing.T) {
		if _, err := line.Provision(t.Context(), "L1", options("/dev/null/x", 1)); err == nil || !strings.Contains(err.Error(), "cannot be made") {
			t.Error(err)
		}
	})
	t.Run("unknown lot", func(t *testing.T) {
		if _, err := line.Provision(t.Context(), "L9", options(out, 1)); err == nil || !strings.Contains(err.Error(), "lot create") {
			t.Error(err)
		}
	})
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// An interrupted run finishes what it has begun, and the next goes on.
func TestProvisionInterrupted(t *testing.T) {
	line, _, _ := newLine(t)
	if _, err := line.CreateLot(t.Context(), spec(t, "L1", 0, 40)); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o := options(out, 2)
	o.Report = func(Progress) { cancel() }
	first, err := line.Provision(ctx, "L1", o)
	if !errors.Is(err, ErrInterrupted) || first.Made == 0 || first.Done == first.Total {
		t.Fatal(first, err)
	}
	if second := provision(t, line, out); first.Made+second.Made != 40 {
		t.Errorf("%+v and then %+v", first, second)
	}
	checkLot(t, line, out)
}

// failing is a token that fails after some devices.
type failing struct {
	Token
	left int
}

func (f *failing) MakeDeviceKey(ctx context.Context, s kme.Suite, k hsmkeys.Key) (crypto.PublicKey, []byte, error) {
	if f.left--; f.left < 0 {
		return nil, nil, errors.New("the token has gone")
	}
	return f.Token.MakeDeviceKey(ctx, s, k)
}

func TestProvisionTokenFails(t *testing.T) {
	line, _, token := newLine(t)
	if _, err := line.CreateLot(t.Context(), spec(t, "L1", 0, 40)); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	line.token = &failing{token, 10}
	p, err := line.Provision(t.Context(), "L1", options(out, 1))
	if err == nil || !strings.Contains(err.Error(), "gone") || p.Done != 8 {
		t.Error(p, err)
	}
	line.token = token
	if p := provision(t, line, out); p.Made != 32 {
		t.Errorf("%+v", p)
	}
	checkLot(t, line, out)
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
			if _, err := line.Grant(ctx, c.lot, c.operator); err == nil || !strings.Contains(err.Error(), c.want) {
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
	if _, err := line.Grant(ctx, "L1", "op"); err == nil || !strings.Contains(err.Error(), "sealed") {
		t.Errorf("a sealed lot: %v", err)
	}
	// The key in the token is not the manifest's: nobody is granted a lot that cannot work.
	if err := token.RemoveLotKey(ctx, line.lotKey("L1")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := token.EnsureLotKey(ctx, line.lotKey("L1"), 2048, hsmkeys.PrimesAuto); err != nil {
		t.Fatal(err)
	}
	if _, err := line.Grant(ctx, "L1", "op"); err == nil || !strings.Contains(err.Error(), "not this modulus's key") {
		t.Errorf("another key than %x: %v", new(big.Int).SetBytes(m.N).Bytes()[:4], err)
	}
}

// away is a directory that cannot be reached for a while.
type away struct {
	directory.Store
	mu    sync.Mutex
	until time.Time // guarded by mu
	err   error
}

func (a *away) Create(ctx context.Context, path string, data []byte) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if time.Now().Before(a.until) {
		return fmt.Errorf("create %s: %w", path, a.err)
	}
	return a.Store.Create(ctx, path, data)
}

// The token does not wait for the directory: all keys are made while it is away, and published when it is back. The
// real fault, a sealed Vault, is in package proof.
func TestProvisionDirectoryAway(t *testing.T) {
	line, _, _ := newLine(t)
	if _, err := line.CreateLot(t.Context(), spec(t, "L1", 0, 120)); err != nil {
		t.Fatal(err)
	}
	store, out := &away{Store: line.store, until: time.Now().Add(time.Hour), err: directory.ErrUnavailable}, t.TempDir()
	line.store = store
	o := options(out, 2)
	o.Patience = time.Minute
	waited := false
	o.Report = func(p Progress) {
		waited = waited || p.Waiting != ""
		if p.Done > 0 && p.Generated < p.Total {
			t.Errorf("published with the directory away: %+v", p)
		}
		if p.Generated == p.Total {
			store.mu.Lock()
			store.until = time.Time{}
			store.mu.Unlock()
		}
	}
	p, err := line.Provision(t.Context(), "L1", o)
	if err != nil || p.Done != 120 || p.Waiting != "" || !waited {
		t.Errorf("%+v, waited %v, %v", p, waited, err)
	}
	checkLot(t, line, out)

	// Away for longer than anybody waits; what was made is published by the next run, as it is.
	if _, err := line.CreateLot(t.Context(), spec(t, "L2", 200, 20)); err != nil {
		t.Fatal(err)
	}
	store.until, o.Patience, o.Report = time.Now().Add(time.Hour), time.Millisecond, nil
	if p, err = line.Provision(t.Context(), "L2", o); !errors.Is(err, directory.ErrUnavailable) || p.Generated != 20 || p.Done != 0 {
		t.Errorf("%+v, %v", p, err)
	}
	store.until = time.Time{}
	if p, err = line.Provision(t.Context(), "L2", o); err != nil || p.Made != 0 || p.Done != 20 {
		t.Errorf("%+v, %v", p, err)
	}
	// What no waiting helps against ends the run at once.
	if _, err := line.CreateLot(t.Context(), spec(t, "L3", 300, 400)); err != nil {
		t.Fatal(err)
	}
	store.until, store.err, o.Patience = time.Now().Add(time.Hour), errors.New("forbidden"), time.Hour
	if p, err = line.Provision(t.Context(), "L3", o); err == nil || !strings.Contains(err.Error(), "forbidden") || p.Generated == 400 {
		t.Errorf("%+v, %v", p, err)
	}
}

// Two machines, each with a journal and a folder of its own, share a lot.
func TestProvisionShardRanges(t *testing.T) {
	line, _, _ := newLine(t)
	m, err := line.CreateLot(t.Context(), spec(t, "L1", 0, 40))
	if err != nil {
		t.Fatal(err)
	}
	var both sync.WaitGroup
	for i, r := range [][2]int{{0, 4}, {4, 10}} {
		out := t.TempDir()
		both.Go(func() {
			o := options(out, 2)
			o.From, o.To = r[0], r[1]
			p, err := line.Provision(t.Context(), "L1", o)
			if want := (r[1] - r[0]) * 4; err != nil || p.Done != want || p.Total != want {
				t.Errorf("machine %d: %+v, %v", i, p, err)
			}
		})
	}
	both.Wait()
	for n := range m.Shards() {
		if _, err := line.reader.ReadShard(t.Context(), m, n); err != nil {
			t.Error(err)
		}
	}
	for _, r := range [][2]int{{-1, 2}, {3, 3}, {5, 2}, {9, 11}} {
		o := options(t.TempDir(), 1)
		o.From, o.To = r[0], r[1]
		if _, err := line.Provision(t.Context(), "L1", o); err == nil || !strings.Contains(err.Error(), "shards 0 to 9") {
			t.Errorf("%v: %v", r, err)
		}
	}
}
