package memory

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

// What is added is there when the memory is opened again, for its manufacturer only; and the first of a name stays.
func TestMemory(t *testing.T) {
	dir := t.TempDir()
	tac := must.Get[kme.TAC](t)(kme.ParseTAC("35209900"))
	lot := func(name string, first int, modulus ...byte) *directory.Manifest {
		return &directory.Manifest{Lot: name, N: modulus,
			Ranges: []directory.Range{{TAC: tac, First: first, Count: 10}}}
	}
	if names, err := Names(t.Context(), dir, "one"); err != nil || len(names) > 0 {
		t.Errorf("without a memory: %q, %v", names, err)
	}
	if made, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(made) > 0 {
		t.Errorf("to ask has made %q, %v", made, err)
	}
	for _, step := range []struct {
		manufacturer string
		add          []*directory.Manifest
		want         string
	}{
		{"one", []*directory.Manifest{lot("L2", 10, 1, 2), nil, lot("L1", 0, 3)}, "L1 0-9 3; L2 10-19 258"},
		{"one", nil, "L1 0-9 3; L2 10-19 258"},
		{"one", []*directory.Manifest{lot("L1", 50, 9), lot("L3", 20, 4)}, "L1 0-9 3; L2 10-19 258; L3 20-29 4"},
		{"two", nil, ""},
		{"two", []*directory.Manifest{lot("L1", 30, 5)}, "L1 30-39 5"},
		{"one", nil, "L1 0-9 3; L2 10-19 258; L3 20-29 4"},
	} {
		m := must.Get[*Memory](t)(Open(t.Context(), dir, step.manufacturer))
		must.Do(t, m.Add(t.Context(), step.add))
		must.Do(t, m.Close())
		m = must.Get[*Memory](t)(Open(t.Context(), dir, step.manufacturer))
		var got, sorted []string
		for name, l := range m.Lots {
			r := l.Ranges[0]
			got = append(got, fmt.Sprintf("%s %d-%d %s", l.Name, r.First, r.First+r.Count-1, l.Modulus))
			sorted = append(sorted, name)
		}
		must.Do(t, m.Close())
		slices.Sort(got)
		slices.Sort(sorted)
		if got := strings.Join(got, "; "); got != step.want {
			t.Errorf("%s has %q, want %q", step.manufacturer, got, step.want)
		}
		if names := must.Get[[]string](t)(Names(t.Context(), dir, step.manufacturer)); !slices.Equal(names, sorted) {
			t.Errorf("the names of %s are %q, want %q", step.manufacturer, names, sorted)
		}
	}
}

// A damaged memory is not taken for an empty one: the error says what to do.
func TestDamaged(t *testing.T) {
	dir := t.TempDir()
	must.Do(t, os.WriteFile(filepath.Join(dir, file), []byte(strings.Repeat("no database ", 100)), 0o600))
	if names, err := Names(t.Context(), dir, "one"); err == nil ||
		!strings.Contains(err.Error(), "bring it back from a backup") {
		t.Errorf("%q, %v", names, err)
	}
}

func TestMissing(t *testing.T) {
	for _, c := range []struct{ made, published, want []string }{
		{nil, nil, nil},
		{nil, []string{"L1"}, nil},
		{[]string{"L1", "L2"}, []string{"L2", "L3", "L1"}, nil},
		{[]string{"L1", "L2", "L3"}, []string{"L2"}, []string{"lot L1 was made", "lot L3 was made"}},
	} {
		got := Missing(c.made, c.published)
		if !slices.EqualFunc(got, c.want, func(err error, want string) bool {
			return strings.HasPrefix(err.Error(), want+",")
		}) {
			t.Errorf("of %q, the directory has %q: %v, want %q", c.made, c.published, got, c.want)
		}
	}
}
