package factory

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory/inspect"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/kme"
)

func TestVerifyLot(t *testing.T) {
	line, dir, _ := newLine(t)
	if _, err := line.CreateLot(t.Context(), spec(t, "L1", 0, 30)); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	provision(t, line, out)
	if err := line.Revoke(t.Context(), "L1", []kme.IMEI{must(line.Lot(t.Context(), "L1")).IMEI(3)}, "stolen",
		nil); err != nil {
		t.Fatal(err)
	}
	verify := func(t *testing.T) *inspect.Verification {
		t.Helper()
		v, err := inspect.Lot(t.Context(), line.guard.Store, line.verifier, "L1", out, nil)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	if v := verify(t); !v.OK() || v.Lots != 1 || v.Devices != 30 || v.Packages != 8 || v.Revoked != 1 {
		t.Errorf("%+v", v)
	}
	at := func(path string) string { return filepath.Join(dir, "lots", "L1", filepath.FromSlash(path)) }
	pkg := func(n int) string { return filepath.Join(out, "L1", handover.InjectionFile(n)) }
	read := func(path string) []byte { return must(os.ReadFile(path)) }
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	for name, c := range map[string]struct {
		path, want string
		change     func([]byte) []byte // nil for none: the file is removed
	}{
		"a shard is missing":       {at("shards/000002"), "lots/L1/shards/000002: it is not published", nil},
		"a shard is tampered with": {at("shards/000002"), "lots/L1/shards/000002 is refused", flip},
		"another shard in its place": {at("shards/000002"), "it is shard 3", func([]byte) []byte {
			return read(at("shards/000003"))
		}},
		"revocations":          {at("revocations"), "lots/L1/revocations is refused", flip},
		"revocations withheld": {at("revocations"), "lots/L1/revocations: not in the directory", nil},
		"revocations overdue": {at("revocations"), "the list was to be replaced by", func([]byte) []byte {
			late := must(line.Revocations(t.Context(), must(line.Lot(t.Context(), "L1"))))
			late.ThisUpdate, late.NextUpdate = time.Unix(1, 0), time.Unix(2, 0)
			return must(line.signer.Sign(directory.TypeRevocations, late))
		}},
		"manifest":             {at("manifest"), "lots/L1/manifest is refused", flip},
		"a package is missing": {pkg(4), "no such injection package", nil},
		"a package is cut":     {pkg(4), "damaged", func(b []byte) []byte { return b[:len(b)/2] }},
		"a package of other keys": {pkg(0), "is not the package of the published keys", func(b []byte) []byte {
			lines := bytes.SplitAfter(b, []byte("\n"))
			one, two := bytes.Index(lines[0], []byte(`"x":"`)), bytes.Index(lines[1], []byte(`"x":"`))
			end := bytes.Index(lines[0][one:], []byte("}"))
			key := bytes.Clone(lines[0][one : one+end])
			copy(lines[0][one:one+end], lines[1][two:two+end])
			copy(lines[1][two:two+end], key)
			return b
		}},
	} {
		t.Run(name, func(t *testing.T) {
			was := read(c.path)
			defer os.WriteFile(c.path, was, 0o600)
			if c.change == nil {
				os.Remove(c.path)
			} else if err := os.WriteFile(c.path, c.change(bytes.Clone(was)), 0o600); err != nil {
				t.Fatal(err)
			}
			if v := verify(t); len(v.Problems) != 1 || !strings.Contains(v.Problems[0], c.want) {
				t.Errorf("%q does not say %q", v.Problems, c.want)
			}
		})
	}
	t.Run("a shard too many", func(t *testing.T) {
		path := at("shards/000008")
		defer os.Remove(path)
		if err := os.WriteFile(path, read(at("shards/000007")), 0o600); err != nil {
			t.Fatal(err)
		}
		if v := verify(t); len(v.Problems) != 1 ||
			!strings.Contains(v.Problems[0], "shards/000008: the lot has no such shard") {
			t.Errorf("%q", v.Problems)
		}
	})
	t.Run("another manufacturer's key", func(t *testing.T) {
		key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		if v, err := inspect.Lot(t.Context(), line.guard.Store, directory.NewVerifier(&key.PublicKey), "L1", "",
			nil); err != nil || v.OK() || v.Devices != 0 {
			t.Errorf("%+v, %v", v, err)
		}
	})
	if v := verify(t); !v.OK() {
		t.Errorf("the cases left %q", v.Problems)
	}
	if _, err := inspect.Lot(t.Context(), line.guard.Store, line.verifier, "L9", "", nil); !errors.Is(err,
		directory.ErrNotFound) {
		t.Error(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if v, err := inspect.Lot(ended, line.store, line.verifier, "L1", "", nil); err == nil && v.Devices == 30 {
		t.Error("an ended context was not heeded")
	}
}

// A byte of one device's wrapped key is changed, so that the package still reads well: whoever looks at the package
// refuses it, names it, and says which file is the right one.
func TestChangedWrappedKey(t *testing.T) {
	line, dir, _ := newLine(t)
	m := must(line.CreateLot(t.Context(), spec(t, "L1", 0, 8)))
	out, returned := t.TempDir(), m.IMEI(5)
	provision(t, line, out)
	reissued := must(line.Reissue(t.Context(), "L1", returned, "return 1", "", out))
	verify := func(t *testing.T) []string {
		t.Helper()
		return must(inspect.Lot(t.Context(), line.guard.Store, line.verifier, "L1", out, nil)).Problems
	}
	reconcile := func(t *testing.T) (found []string) {
		t.Helper()
		for _, d := range must(keeping(line, out).Reconcile(t.Context(), "L1", out, true)).Differences {
			found = append(found, d.What+": "+d.Remedy)
		}
		return found
	}
	provisionAgain := func(t *testing.T) []string {
		t.Helper()
		if _, err := keeping(line, out).Provision(t.Context(), "L1", options(out, 1)); err != nil {
			return []string{err.Error()}
		}
		return nil
	}
	reissueAgain := func(t *testing.T) []string {
		t.Helper()
		if _, err := line.Reissue(t.Context(), "L1", returned, "return 1", "", out); err != nil {
			return []string{err.Error()}
		}
		return nil
	}
	type looks map[string]func(*testing.T) []string
	pkg := filepath.Join(out, "L1", handover.InjectionFile(1))
	shard := filepath.Join(dir, filepath.FromSlash(directory.ShardPath("L1", 1)))
	for _, c := range []struct {
		name, path string
		lost       bool // by the directory: only the journal knows of the package
		looks      looks
	}{
		{"a shard's", pkg, false, looks{"verify": verify, "reconcile": reconcile, "provision": provisionAgain}},
		{"a shard's that is not published", pkg, true, looks{"reconcile": reconcile, "provision": provisionAgain}},
		{"a reissued device's", reissued, false,
			looks{"verify": verify, "reconcile": reconcile, "reissue": reissueAgain}},
	} {
		signed := must(os.ReadFile(shard))
		if c.lost {
			os.Remove(shard)
		}
		was := must(os.ReadFile(c.path))
		at := bytes.Index(was, []byte(`"wrapped":"`)) + 40
		changed := bytes.Clone(was)
		if changed[at] = 'A'; was[at] == 'A' {
			changed[at] = 'B'
		}
		if err := os.WriteFile(c.path, changed, 0o600); err != nil {
			t.Fatal(err)
		}
		for name, found := range c.looks {
			t.Run(c.name+"/"+name, func(t *testing.T) {
				want := fmt.Sprintf("bring back the file whose SHA-256 is %x", sha256.Sum256(was))
				if got := found(t); len(got) != 1 || !strings.Contains(got[0], c.path) ||
					!strings.Contains(got[0], want) {
					t.Errorf("%q does not name the file and say %q", got, want)
				}
				if !bytes.Equal(must(os.ReadFile(c.path)), changed) {
					t.Error("the package is not as it was left")
				}
			})
		}
		if err := errors.Join(os.WriteFile(c.path, was, 0o600), os.WriteFile(shard, signed, 0o644)); err != nil {
			t.Fatal(err)
		}
		for name, found := range (looks{"verify": verify, "reconcile": reconcile, "provision": provisionAgain,
			"reissue": reissueAgain}) {
			if got := found(t); len(got) != 0 {
				t.Errorf("%s package, as it was, %s: %q", c.name, name, got)
			}
		}
	}
}

// The manifest beside the packages has the modulus that a fixture injects.
func TestChangedManifestFile(t *testing.T) {
	line, _, _ := newLine(t)
	must(line.CreateLot(t.Context(), spec(t, "L1", 0, 8)))
	out := t.TempDir()
	provision(t, line, out)
	path := filepath.Join(out, "L1", handover.ManifestFile)
	was := must(os.ReadFile(path))
	verify := func() []string {
		return must(inspect.Lot(t.Context(), line.guard.Store, line.verifier, "L1", out, nil)).Problems
	}
	reconcile := func(repair bool) *Reconciliation {
		return must(keeping(line, out).Reconcile(t.Context(), "L1", out, repair))
	}
	if found := verify(); len(found) != 0 {
		t.Fatal(found)
	}
	for _, changed := range [][]byte{bytes.Replace(was, []byte("."), []byte("A."), 1), append(bytes.Clone(was), '\n'),
		nil} {
		if err := os.WriteFile(path, changed, 0o600); err != nil {
			t.Fatal(err)
		}
		if found := verify(); len(found) != 1 || !strings.Contains(found[0], path) {
			t.Errorf("verify: %q", found)
		}
		if r := reconcile(false); len(r.Differences) != 1 || !strings.Contains(r.Differences[0].What, path) {
			t.Errorf("reconcile: %+v", r)
		}
		if r := reconcile(true); r.Open() != 0 || !bytes.Equal(must(os.ReadFile(path)), was) {
			t.Errorf("repaired: %+v", r)
		}
	}
}

// A lot that is revoked gets no keys and no new ones, and is granted to nobody; whoever verifies it is told. Doing it
// again changes nothing.
func TestRevokedLot(t *testing.T) {
	line, _, _ := newLine(t)
	ctx, out := t.Context(), t.TempDir()
	for i, lot := range []string{"L1", "L2"} {
		must(line.CreateLot(ctx, spec(t, lot, 10*i, 8)))
	}
	provision(t, line, out)
	m := must(line.Lot(ctx, "L1"))
	if err := line.RevokeLot(ctx, "L9", "x"); err == nil || !strings.Contains(err.Error(), "no lot L9") {
		t.Error(err)
	}
	for range 2 {
		if err := line.RevokeLot(ctx, "L1", "its key has leaked"); err != nil {
			t.Fatal(err)
		}
	}
	if list := must(line.Revocations(ctx, m)); list.Version != 2 || list.Whole == nil {
		t.Errorf("%+v", list)
	}
	for what, err := range map[string]error{
		"provision": second(line.Provision(ctx, "L1", options(out, 1))),
		"grant":     line.Grant(ctx, "L1", "op", nil),
		"reissue":   second(line.Reissue(ctx, "L1", m.IMEI(0), "return 1", "", out)),
	} {
		if err == nil || !strings.Contains(err.Error(), "lot L1 is revoked since") ||
			!strings.Contains(err.Error(), "its key has leaked") {
			t.Errorf("%s: %v", what, err)
		}
	}
	v := must(inspect.Lot(ctx, line.guard.Store, line.verifier, "L1", out, nil))
	if !v.OK() || len(v.RevokedLots) != 1 || v.RevokedLots[0].Lot != "L1" ||
		v.RevokedLots[0].Reason != "its key has leaked" {
		t.Errorf("%+v", v)
	}
	if v = must(inspect.All(ctx, line.guard.Store, line.verifier, nil, nil)); len(v.RevokedLots) != 1 {
		t.Errorf("%+v", v)
	}
	if err := line.Grant(ctx, "L2", "op", nil); err == nil || !strings.Contains(err.Error(), "not enrolled") {
		t.Errorf("the other lot: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

func damaged(t *testing.T, m *directory.Manifest, out string) string {
	t.Helper()
	if err := os.WriteFile(filepath.Join(out, "L1", handover.ReissueFile(m.IMEI(0), 1)), []byte("{}\n"),
		0o600); err != nil {
		t.Fatal(err)
	}
	return out
}

// What only shows among lots is signed here by hand, since the line would make none of it.
func TestAudit(t *testing.T) {
	line, dir, _ := newLine(t)
	audit := func() *inspect.Verification {
		t.Helper()
		v, err := inspect.All(t.Context(), line.guard.Store, line.verifier, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	if v := audit(); !v.OK() || v.Lots != 0 {
		t.Errorf("an empty directory: %+v", v)
	}
	var primes []*big.Int
	prime := func() (p *big.Int) {
		if len(primes) == 0 {
			primes = must(testkeys.RSA(2048)).Primes
		}
		p, primes = primes[0], primes[1:]
		return p
	}
	p := prime()
	shared := directory.DeviceKey{Key: &must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)).PublicKey}
	publish := func(lot string, first int, n *big.Int, key *directory.DeviceKey) {
		t.Helper()
		s := spec(t, lot, first, 4)
		m := s.manifest(line.Manufacturer())
		m.N, m.Mechanism, m.Created = n.Bytes(), "CKM_RSA_PKCS_KEY_PAIR_GEN", time.Now().UTC().Truncate(time.Second)
		keys := make([]directory.DeviceKey, 4)
		for i := range keys {
			keys[i] = directory.DeviceKey{IMEI: m.IMEI(i),
				Key: &must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)).PublicKey}
		}
		if key != nil {
			keys[1].Key = key.Key
		}
		shard := must(directory.NewShard(m, 0, keys, make([]byte, sha256.Size)))
		if err := errors.Join(
			directory.Publish(t.Context(), line.store, directory.ManifestPath(lot), line.signer,
				directory.TypeManifest, m),
			line.beginRevocations(t.Context(), m, time.Hour),
			directory.Publish(t.Context(), line.store, directory.ShardPath(lot, 0), line.signer, directory.TypeShard,
				shard)); err != nil {
			t.Fatal(err)
		}
	}
	exact := func(p *big.Int) *big.Int { // a modulus of 2048 bits with this prime
		for {
			if n := new(big.Int).Mul(p, prime()); n.BitLen() == 2048 {
				return n
			}
		}
	}
	publish("good1", 0, exact(prime()), nil)
	publish("good2", 10, exact(prime()), nil)
	if v := audit(); !v.OK() || v.Lots != 2 || v.Devices != 8 {
		t.Errorf("%+v", v)
	}
	publish("prime1", 20, exact(p), nil)
	publish("prime2", 30, exact(p), nil)
	publish("key1", 40, exact(prime()), &shared)
	publish("key2", 50, exact(prime()), &shared)
	publish("range", 3, exact(prime()), nil)
	small := new(big.Int)
	for kept := prime(); small.BitLen() != 2048; { // the other prime of 2,039 bits would take long to find
		small.Mul(big.NewInt(641), must(rand.Prime(rand.Reader, 1015)))
		small.Mul(small, kept)
	}
	publish("small", 60, small, nil)
	if err := os.Mkdir(filepath.Join(dir, "lots", "good1~"), 0o755); err != nil {
		t.Fatal(err)
	}
	v := audit()
	all := strings.Join(v.Problems, "\n")
	for _, want := range []string{
		"lot prime1: its modulus shares a prime", "lot prime2: its modulus shares a prime",
		"35209900000041 of lot key1 and 35209900000051 of lot key2 have one key",
		"lots good1 and range: both have IMEIs from 35209900000003 on", "lot small: ",
		`what is no lot's, remove it: the name "good1~"`,
	} {
		if !strings.Contains(all, want) {
			t.Errorf("%q does not say %q", all, want)
		}
	}
	if len(v.Problems) != 6 {
		t.Errorf("%d problems: %s", len(v.Problems), all)
	}
}
