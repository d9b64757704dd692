package sqlstore

import (
	"context"
	"crypto/hmac"
	"fmt"
	"strings"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
)

// A table has rows with a MAC, the column mac, over all other columns.
type table struct {
	name      string
	columns   []string // in the order that the MAC has them; mac is not among them
	key       int      // how many of the first make the primary key
	selectAll string   // from the table: all columns, and mac
	insert    string
	replace   string // what makes insert replace the row of the same key
	put       string // both
}

func newTable(name string, key int, columns ...string) *table {
	t := &table{name: name, columns: columns, key: key}
	all := append(columns[:len(columns):len(columns)], "mac")
	var set []string
	for _, c := range all[key:] {
		set = append(set, c+" = excluded."+c)
	}
	list := strings.Join(all, ", ")
	t.selectAll = "SELECT " + list + " FROM " + name + " "
	t.insert = "INSERT INTO " + name + " (" + list + ") VALUES (" + marks(1, len(all)) + ")"
	t.replace = " ON CONFLICT (" + strings.Join(columns[:key], ", ") + ") DO UPDATE SET " + strings.Join(set, ", ")
	t.put = t.puts(1)
	return t
}

// puts is put for n rows of different keys.
func (t *table) puts(n int) string {
	text, width := t.insert, len(t.columns)+1
	for i := 1; i < n; i++ {
		text += ", (" + marks(1+i*width, width) + ")"
	}
	return text + t.replace
}

// marks are those of n parameters.
func marks(first, n int) string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprint("$", first+i)
	}
	return strings.Join(all, ", ")
}

var (
	manufacturers = newTable("manufacturers", 1, "key_id", "pem", "operator", "directory", "tacs", "enrolled_at",
		"withdrawn", "decided_by", "decided_because", "decided_at", "seq")
	lots = newTable("lots", 2, "manufacturer", "lot", "manifest", "imported_at",
		"withdrawn", "decided_by", "decided_because", "decided_at", "seq")
	attempts   = newTable("attempts", 2, "imsi", "id", "origin", "expires_at", "seq")
	spentRANDs = newTable("spent_rands", 2, "imsi", "rand")
	ledger     = newTable("ledger", 2, "chain", "seq", "at", "event", "subject", "imei", "tag", "actor", "detail")
	bindings   = newTable("bindings", 2, "imsi", "state", "imei", "manufacturer", "lot", "device_key",
		"sealed", "nw_sig",
		"attempt_id", "payload_sha256", "established_at", "activated_at", "revoked_at", "origin", "expires_at",
		"sent", "seq")
	equipment     = newTable("equipment", 1, "prefix", "status", "reason", "listed_at", "change", "seq")
	sightingTable = newTable("sightings", 3, "imsi", "imei", "evidence", "first_at", "last_at")
)

// add makes a row; put replaces the one of the same key too. ints are int64.
func (s *Store) add(ctx context.Context, tx *txn, t *table, values ...any) error {
	return tx.Do(ctx, t.insert, append(values, s.macs.Of(t.name, values...))...)
}

func (s *Store) put(ctx context.Context, tx *txn, t *table, values ...any) error {
	return tx.Do(ctx, t.put, append(values, s.macs.Of(t.name, values...))...)
}

// A row is one as the database has it.
type row []any

func (r row) text(i int) string { s, _ := r[i].(string); return s }
func (r row) int(i int) int64   { n, _ := r[i].(int64); return n }
func (r row) bytes(i int) []byte {
	b, _ := r[i].([]byte)
	return b
}

// rows gives those of a table that the service wrote, and fails with a *binding.DamagedRow for the first other one.
// What each gets is good until it returns.
func (s *Store) rows(
	ctx context.Context, q sqlconn.Conn, t *table, each func(r row) error, where string, args ...any,
) error {
	return scan(ctx, q, len(t.columns)+1, func(values row) error {
		if err := s.checkMAC(t, values); err != nil {
			return err
		}
		return each(values[:len(t.columns)])
	}, t.selectAll+where, args...)
}

// scan gives rows of so many columns, each good until f returns.
func scan(ctx context.Context, q sqlconn.Conn, columns int, f func(values row) error, text string, args ...any) error {
	values, pointers := make(row, columns), make([]any, columns)
	for i := range values {
		pointers[i] = &values[i]
	}
	return q.Each(ctx, func(scan func(...any) error) error {
		if err := scan(pointers...); err != nil {
			return err
		}
		return f(values)
	}, text, args...)
}

// checkMAC is about a row with its MAC.
func (s *Store) checkMAC(t *table, values row) error {
	n := len(t.columns)
	if !hmac.Equal(values.bytes(n), s.macs.Of(t.name, values[:n]...)) {
		return damaged(t, values, changed)
	}
	return nil
}

const changed = "was changed or made up by somebody else"

func damaged(t *table, values row, what string) error {
	var key []string
	for i := range t.key {
		if b, ok := values[i].([]byte); ok {
			key = append(key, fmt.Sprintf("%x", b))
		} else {
			key = append(key, fmt.Sprint(values[i]))
		}
	}
	return &binding.DamagedRow{Table: t.name, Key: strings.Join(key, " "), What: what}
}

func asInt(b bool) int64 {
	if b {
		return 1
	}
	return 0
}
