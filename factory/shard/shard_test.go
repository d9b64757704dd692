package shard

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// Every way in which package, directory and journal can stand to each other has its name, and whoever reads it is told
// what to do.
func TestStanding(t *testing.T) {
	m := &directory.Manifest{Lot: "L1", Suite: kme.SuiteECDSA, ShardSize: 2,
		Ranges: []directory.Range{{TAC: must(kme.ParseTAC("35209900")), Count: 2}}}
	makePackage := func() (file []byte, packed *directory.Shard) {
		var lines []handover.InjectionLine
		for i := range 2 {
			key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
			lines = append(lines, handover.NewInjectionLine(m.IMEI(i), "L1", 0, key.Public(), "a1", []byte{1}))
		}
		file, hash, err := handover.MarshalPackage(lines...)
		if err != nil {
			t.Fatal(err)
		}
		return file, must(handover.NewShard(m, 0, lines, hash))
	}
	whole, ours := makePackage()
	others, theirs := makePackage()
	cut := whole[:len(whole)/2]
	at := func(s State, of *directory.Shard) Entry { return Entry{Begun: true, State: s, Package: of.Package} }
	never, begun, planned := Entry{}, Entry{Begun: true}, at(Planned, ours)
	for name, c := range map[string]struct {
		file      []byte // nil if there is none
		published *directory.Shard
		entry     Entry
		want      Standing
	}{
		"never begun":                        {nil, nil, never, Unmade},
		"planned":                            {nil, nil, planned, Unmade},
		"cut before it was published":        {cut, nil, planned, Remnant},
		"damaged, from elsewhere":            {cut, nil, never, Stray},
		"killed before the journal":          {whole, nil, planned, Made},
		"put there before any run":           {whole, nil, never, Stray},
		"put there after a killed run":       {others, nil, planned, Stray},
		"put there, begun by an old journal": {whole, nil, begun, Stray},
		"killed before it was published":     {whole, nil, at(Generated, ours), Made},
		"published, and gone":                {whole, nil, at(Published, ours), Lost},
		"read back, and gone":                {whole, nil, at(Acknowledged, ours), Lost},
		"killed after it was published":      {whole, ours, at(Generated, ours), Unrecorded},
		"killed before it was read back":     {whole, ours, at(Published, ours), Unrecorded},
		"the journal lost":                   {whole, ours, never, Unrecorded},
		"begun anew with the journal lost":   {whole, ours, planned, Unrecorded},
		"another package in the journal":     {whole, ours, at(Acknowledged, theirs), Misrecorded},
		"done":                               {whole, ours, at(Acknowledged, ours), Agreed},
		"published, package missing":         {nil, ours, at(Acknowledged, ours), PackageMissing},
		"so, the journal lost":               {nil, ours, never, PackageMissing},
		"published, package cut":             {cut, ours, at(Acknowledged, ours), PackageDamaged},
		"published, another package":         {others, ours, at(Acknowledged, ours), PackageOther},
		"so, and the journal has that one":   {others, ours, at(Acknowledged, theirs), PackageOther},
		"unpublished, package missing":       {nil, nil, at(Generated, ours), RecordedBad},
		"unpublished, package cut":           {cut, nil, at(Published, ours), RecordedBad},
		"unpublished, another package":       {others, nil, at(Generated, ours), RecordedOther},
		"gone, another package in its place": {others, nil, at(Acknowledged, ours), RecordedOther},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, handover.InjectionFile(0))
		if c.file != nil {
			if err := os.WriteFile(path, c.file, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		v := Look(m, 0, dir, c.published, c.entry)
		if got := v.Standing(); got != c.want {
			t.Errorf("%s: %d, not %d", name, got, c.want)
		}
		what, remedy := v.Describe()
		if quiet := c.want == Agreed || c.want == Unmade; (what == "") != quiet || (remedy == "") != quiet {
			t.Errorf("%s: %q, %q", name, what, remedy)
		}
		if c.want >= PackageMissing && !strings.Contains(what, path) {
			t.Errorf("%s: %q does not name %s", name, what, path)
		}
	}
}

func TestParseRange(t *testing.T) {
	for text, want := range map[string][2]int{"": {0, 0}, "0-0": {0, 1}, "0-499": {0, 500}, "500-999": {500, 1000},
		"5": {-1}, "5-": {-1}, "-5": {-1}, "6-5": {-1}, "a-b": {-1}, "1-2-3": {-1}} {
		from, to, err := ParseRange(text)
		if err != nil {
			from, to = -1, 0
		}
		if got := [2]int{from, to}; got != want {
			t.Errorf("%q: %v, %v; want %v", text, got, err, want)
		}
	}
}
