package report_test

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/report"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/kme"
)

// pages is a store that has only bindings.
type pages struct {
	binding.Store
	all []*binding.Binding
}

func (p pages) Bindings(_ context.Context, q binding.BindingQuery) (page []*binding.Binding, err error) {
	for _, b := range p.all {
		if q.Has(b.IMSI.String()) && len(page) < q.Limit {
			page = append(page, b)
		}
	}
	return page, nil
}

// A selection has the bindings of all pages that it asks for, and its limit counts only these.
func TestSelection(t *testing.T) {
	day := func(n int) time.Time { return time.Date(2026, 1, n, 0, 0, 0, 0, time.UTC) }
	var store pages
	add := func(b binding.Binding) {
		b.IMSI = must.Get[kme.IMSI](t)(kme.ParseIMSI(fmt.Sprintf("26201%010d", len(store.all))))
		store.all = append(store.all, &b)
	}
	add(binding.Binding{State: binding.Pending, Established: day(5)})
	add(binding.Binding{State: binding.Active, Established: day(1), Activated: day(3)})
	add(binding.Binding{State: binding.Revoked, Established: day(1), Activated: day(2), Revoked: day(4)})
	for range 2000 {
		add(binding.Binding{State: binding.Active, Established: day(1), Activated: day(1)})
	}
	add(binding.Binding{State: binding.Active, Established: day(4), Activated: day(4)})
	limited := func(n int) binding.BindingQuery { return binding.BindingQuery{Limit: n} }
	for name, c := range map[string]struct {
		q    report.Selection
		want string // how many, and the number of the last one
	}{
		"all":                 {report.Selection{}, "2004, 2003"},
		"a state":             {report.Selection{State: binding.Revoked}, "1, 2"},
		"since a time":        {report.Selection{Since: day(4)}, "3, 2003"},
		"at that time":        {report.Selection{Since: day(5)}, "1, 0"},
		"since, and a state":  {report.Selection{Since: day(3), State: binding.Active}, "2, 2003"},
		"a limit":             {report.Selection{BindingQuery: limited(2)}, "2, 1"},
		"a limit of a state":  {report.Selection{BindingQuery: limited(1), State: binding.Active}, "1, 1"},
		"a limit over a page": {report.Selection{BindingQuery: limited(1500)}, "1500, 1499"},
		"none":                {report.Selection{Since: day(9)}, "0, -1"},
	} {
		n, last := 0, -1
		for b, err := range c.q.Each(t.Context(), store) {
			if err != nil {
				t.Fatal(err)
			}
			n, last = n+1, must.Get[int](t)(strconv.Atoi(b.IMSI.String()[5:]))
		}
		if got := fmt.Sprintf("%d, %d", n, last); got != c.want {
			t.Errorf("%s: %s; want %s", name, got, c.want)
		}
	}
}

// A count has all states, also those that there are none of.
func TestCount(t *testing.T) {
	var store pages
	for i, s := range []binding.State{binding.Active, binding.Revoked, binding.Active} {
		imsi := must.Get[kme.IMSI](t)(kme.ParseIMSI(fmt.Sprintf("26201%010d", i)))
		store.all = append(store.all, &binding.Binding{IMSI: imsi, State: s})
	}
	counted := 0
	states, n, err := report.Selection{}.Count(t.Context(), store, func(n int) { counted = n })
	if want := "map[ACTIVE:2 PENDING:0 REVOKED:1]"; err != nil || n != 3 || counted != 3 || fmt.Sprint(states) != want {
		t.Errorf("%d of %v, %d were told of, %v", n, states, counted, err)
	}
	if _, _, err := (report.Selection{}).Count(t.Context(), failing{}, func(int) {}); err == nil {
		t.Error("a count of a store that is away")
	}
}

// failing is a store that is away.
type failing struct{ binding.Store }

func (failing) Bindings(context.Context, binding.BindingQuery) ([]*binding.Binding, error) {
	return nil, errors.New("away")
}

func TestParseSince(t *testing.T) {
	now := time.Date(2026, 2, 1, 12, 0, 0, 0, time.UTC)
	for text, want := range map[string]string{
		"24h": "2026-01-31T12:00:00Z", "0s": "2026-02-01T12:00:00Z", "2026-01-31": "2026-01-31T00:00:00Z",
		"2026-01-31T06:00:00+01:00": "2026-01-31T05:00:00Z", "-1h": "", "24": "", "yesterday": "", "2026-13-01": "",
	} {
		got, err := report.ParseSince(text, now)
		if (err != nil) != (want == "") || err == nil && got.UTC().Format(time.RFC3339) != want {
			t.Errorf("%s: %s, %v; want %s", text, got, err, want)
		}
	}
}
