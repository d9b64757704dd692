package sqlstore

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sightings"
	"github.com/kmehsm/kmehsm/internal/pgtest"
)

// BenchmarkPostgresDisk says what KMEHSM_ATTACHES whole attaches add to each table and index of a database of
// KMEHSM_ROWS bindings, in bytes an attach: at once, and when VACUUM has run and as many again have used what it made
// free; and what one sighting adds. docs/capacity.md has the figures.
func BenchmarkPostgresDisk(b *testing.B) {
	_, rows := large(b, 20_000)
	attaches := must(strconv.Atoi(cmp.Or(os.Getenv("KMEHSM_ATTACHES"), "4000")))
	s := filledAs(b, pgtest.Start(b).Database(b), rows)
	do := func(text string) { must(s.read.ExecContext(b.Context(), text)) }
	do("VACUUM ANALYZE")
	at, first := time.Now(), rand.IntN(1<<30)
	attach := func() {
		of := devices(first, attaches, rows, at)
		for len(of) > 0 { // the steps of a device come one soon after the other
			now := of[:min(64, len(of))]
			of = of[len(now):]
			for _, st := range steps[1:] {
				must(st.by32(b.Context(), s, now))
			}
		}
		first += attaches
	}
	see := func(evidence sightings.Evidence) {
		var seen []sightings.Sighting
		for i, d := range devices(first, attaches, rows, at) {
			seen = append(seen, sightings.Sighting{IMSI: d.imsi, IMEI: d.imei, Evidence: evidence, First: at, Last: at})
			if len(seen) == 64 || i == attaches-1 {
				must(s.See(b.Context(), seen))
				seen = nil
			}
		}
	}
	for b.Loop() {
		before := relations(b, s)
		for _, p := range []struct {
			what string
			do   func()
		}{
			{"attaches", attach},
			{"as many again, after VACUUM", func() { do("VACUUM"); attach() }},
			{"PROVEN sightings", func() { see(sightings.Shown) }},
			{"as many ASSERTED", func() { see(sightings.Asserted) }},
			{"both an hour later", func() { at = at.Add(time.Hour); see(sightings.Asserted); see(sightings.Shown) }},
			{"VACUUM FULL", func() { do("VACUUM FULL") }},
		} {
			p.do()
			after := relations(b, s)
			report(b, p.what, before, after, float64(attaches))
			fmt.Printf("all: %d bytes a binding\n", sum(after)/int64(must(s.Count(b.Context(), at))[binding.Active]))
			before = after
		}
	}
}

// relations are the bytes of each table, without its indexes, and of each index.
func relations(b *testing.B, s *Store) map[string]int64 {
	b.Helper()
	rows := must(s.read.QueryContext(b.Context(), `SELECT c.relname, pg_relation_size(c.oid)
		FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
		WHERE n.nspname = current_schema() AND c.relkind IN ('r', 'i')`))
	defer rows.Close()
	all := map[string]int64{}
	for rows.Next() {
		var name string
		var n int64
		if err := rows.Scan(&name, &n); err != nil {
			b.Fatal(err)
		}
		all[name] = n
	}
	if err := rows.Err(); err != nil {
		b.Fatal(err)
	}
	return all
}

func sum(of map[string]int64) (n int64) {
	for _, v := range of {
		n += v
	}
	return n
}

func report(b *testing.B, what string, before, after map[string]int64, n float64) {
	b.Helper()
	var lines []string
	for name, now := range after {
		if d := now - before[name]; d != 0 {
			lines = append(lines, fmt.Sprintf("%-22s %7.0f", name, float64(d)/n))
		}
	}
	slices.Sort(lines)
	fmt.Printf("%s: %.0f bytes each\n  %s\n", what, float64(sum(after)-sum(before))/n, strings.Join(lines, "\n  "))
}
