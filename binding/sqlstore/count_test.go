package sqlstore

import (
	"strings"
	"testing"
	"time"
)

// A count reads an index of all bindings, and rows of pending ones alone. KMEHSM_ROWS and KMEHSM_FILLED make it one of
// a large database, and tell what it takes.
func TestCountByIndex(t *testing.T) {
	dir, n := large(t, 2000)
	s := filled(t, dir, n)
	plan := ""
	err := s.chains.Reads("explain").Each(t.Context(), func(scan func(...any) error) error {
		var id, parent, unused int64
		var what string
		err := scan(&id, &parent, &unused, &what)
		plan += what + "\n"
		return err
	}, "EXPLAIN QUERY PLAN "+countBindings, int64(0))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(plan) {
		if strings.HasPrefix(line, "SCAN bindings") && !strings.Contains(line, "COVERING INDEX") {
			t.Errorf("the count reads whole rows:\n%s", plan)
		}
	}
	began := time.Now()
	all, err := s.Count(t.Context(), began)
	if err != nil || all["ACTIVE"] != int64(n) || all["PENDING"] != 0 || all["REVOKED"] != 0 {
		t.Errorf("%v, %v", all, err)
	}
	t.Logf("%d bindings counted in %s", n, time.Since(began).Round(time.Millisecond))
}
