package main

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/tools/bench/measure"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

// An error in one part is told in the end, and leaves what the others have found; a part that cannot be measured here
// is no error.
func TestParts(t *testing.T) {
	b := &bench{ctx: t.Context(), dir: t.TempDir(), pairs: 1, each: time.Second}
	failure := errors.New("the second fails")
	parts := []part{
		{name: "first", do: func(r *report) error { r.HSMCalls = map[string]int{"ping": 2}; return nil }},
		{name: "second", do: func(*report) error { return failure }},
		{name: "third", do: func(*report) error { return leftOut("it is not there") }},
		{name: "fourth", do: func(r *report) error { r.HSMDepth = map[string]int{"ping": 2}; return nil }},
	}
	if err := b.run(parts, ""); !errors.Is(err, failure) || strings.Contains(err.Error(), "not there") {
		t.Errorf("the error is %v", err)
	}
	read := func() *report {
		r, err := readReport(filepath.Join(b.dir, "bench.json"))
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := read(); r.HSMCalls["ping"] != 2 || r.HSMDepth["ping"] != 2 {
		t.Errorf("what the others have found is lost: %+v", r)
	}
	parts[3].do = func(r *report) error { r.HSMDepth["ping"]++; return nil }
	if err := b.run(parts, "fourth"); err != nil {
		t.Fatal(err)
	}
	if r := read(); r.HSMCalls["ping"] != 2 || r.HSMDepth["ping"] != 3 {
		t.Errorf("one part alone does not keep the others: %+v", r)
	}
	if err := b.run(parts, "fifth"); err == nil || !strings.Contains(err.Error(), `no part "fifth"`) {
		t.Errorf("of a part that is not there: %v", err)
	}
}

func TestRows(t *testing.T) {
	measured := measured{Ratio: measure.Ratio{Token: 1000, Service: 500, Share: 0.5}, HalfRate: 250, P50: 1, HalfP99: 9}
	r := &report{Attach: map[string]*attachment{"2048": {measured: measured}}, RPC: rpc{"prepare_per_second": 7}}
	var text strings.Builder
	for _, row := range r.rows() {
		text.WriteString(row.name + " " + row.value + "\n")
	}
	for _, want := range []string{"attach, 2048 bits: share", "**0.500**", "0.0 / 9.0", "PrepareVector, bound: a"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, &text)
		}
	}
	for _, not := range []string{"socket", "an empty one", "PostgreSQL"} {
		if strings.Contains(text.String(), not) {
			t.Errorf("%q was not measured:\n%s", not, &text)
		}
	}
}
