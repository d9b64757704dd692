// Package tables has the tables of the store, and their rows: what they have of a binding, and their MACs.
package tables

import (
	"context"
	"crypto/hmac"
	"errors"
	"fmt"
	"strings"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/rowmac"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
)

// A Table has rows with a MAC, the column mac, over all other columns.
type Table struct {
	Name      string
	Columns   []string // in the order that the MAC has them; mac is not among them
	key       int      // how many of the first make the primary key
	SelectAll string   // from the table: all columns, and mac
	Insert    string
	replace   string // what makes insert replace the row of the same key
	put       string // both
}

func newTable(name string, key int, columns ...string) *Table {
	t := &Table{Name: name, Columns: columns, key: key}
	all := append(columns[:len(columns):len(columns)], "mac")
	var set []string
	for _, c := range all[key:] {
		set = append(set, c+" = excluded."+c)
	}
	list := strings.Join(all, ", ")
	t.SelectAll = "SELECT " + list + " FROM " + name + " "
	t.Insert = "INSERT INTO " + name + " (" + list + ") VALUES (" + Marks(1, len(all)) + ")"
	t.replace = " ON CONFLICT (" + strings.Join(columns[:key], ", ") + ") DO UPDATE SET " + strings.Join(set, ", ")
	t.put = t.Puts(1)
	return t
}

// Puts is put for n rows of different keys.
func (t *Table) Puts(n int) string {
	text, width := t.Insert, len(t.Columns)+1
	for i := 1; i < n; i++ {
		text += ", (" + Marks(1+i*width, width) + ")"
	}
	return text + t.replace
}

// Marks are those of n parameters.
func Marks(first, n int) string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprint("$", first+i)
	}
	return strings.Join(all, ", ")
}

var (
	Manufacturers = newTable("manufacturers", 1, "key_id", "pem", "operator", "directory", "tacs", "enrolled_at",
		"withdrawn", "decided_by", "decided_because", "decided_at", "seq")
	Lots = newTable("lots", 2, "manufacturer", "lot", "manifest", "imported_at",
		"withdrawn", "decided_by", "decided_because", "decided_at", "seq")
	Attempts   = newTable("attempts", 2, "imsi", "id", "origin", "expires_at", "seq")
	SpentRANDs = newTable("spent_rands", 2, "imsi", "rand")
	Ledger     = newTable("ledger", 2, "chain", "seq", "at", "event", "subject", "imei", "tag", "actor", "detail")
	Bindings   = newTable("bindings", 2, "imsi", "state", "imei", "manufacturer", "lot", "device_key",
		"sealed", "nw_sig",
		"attempt_id", "payload_sha256", "established_at", "activated_at", "revoked_at", "origin", "expires_at",
		"sent", "seq")
	Equipment = newTable("equipment", 1, "prefix", "status", "reason", "listed_at", "change", "seq")
	Sightings = newTable("sightings", 3, "imsi", "imei", "evidence", "first_at", "last_at")
)

// All are the tables that have rows with a MAC of their own, in an order that their references allow.
var All = []*Table{Manufacturers, Lots, Attempts, SpentRANDs, Bindings, Equipment, Sightings}

// A Key makes the MACs of rows.
type Key struct{ *rowmac.Key }

// Add makes a row; Put replaces the one of the same key too. ints are int64.
func (k Key) Add(ctx context.Context, q sqlconn.Conn, t *Table, values ...any) error {
	return q.Do(ctx, t.Insert, append(values, k.Of(t.Name, values...))...)
}

func (k Key) Put(ctx context.Context, q sqlconn.Conn, t *Table, values ...any) error {
	return q.Do(ctx, t.put, append(values, k.Of(t.Name, values...))...)
}

// A Row is one as the database has it.
type Row []any

func (r Row) Text(i int) string { s, _ := r[i].(string); return s }
func (r Row) Int(i int) int64   { n, _ := r[i].(int64); return n }
func (r Row) Bytes(i int) []byte {
	b, _ := r[i].([]byte)
	return b
}

// Each gives those rows of a table that the service wrote, and fails with a *binding.DamagedRow for the first other
// one. What each gets is good until it returns.
func (k Key) Each(
	ctx context.Context, q sqlconn.Conn, t *Table, each func(r Row) error, where string, args ...any,
) error {
	return Scan(ctx, q, len(t.Columns)+1, func(values Row) error {
		if err := k.Check(t, values); err != nil {
			return err
		}
		return each(values[:len(t.Columns)])
	}, t.SelectAll+where, args...)
}

// Scan gives rows of so many columns, each good until f returns.
func Scan(ctx context.Context, q sqlconn.Conn, columns int, f func(values Row) error, text string, args ...any) error {
	values, pointers := make(Row, columns), make([]any, columns)
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

// Check fails with a *binding.DamagedRow unless the MAC that a row ends with is its own.
func (k Key) Check(t *Table, values Row) error {
	n := len(t.Columns)
	if !hmac.Equal(values.Bytes(n), k.Of(t.Name, values[:n]...)) {
		return Damaged(t, values, Changed)
	}
	return nil
}

// Changed is what a damaged row is whose MAC is not its own.
const Changed = "was changed or made up by somebody else"

// Damaged is a *binding.DamagedRow about a row of which the key is known at least.
func Damaged(t *Table, values Row, what string) error {
	var key []string
	for i := range t.key {
		if b, ok := values[i].([]byte); ok {
			key = append(key, fmt.Sprintf("%x", b))
		} else {
			key = append(key, fmt.Sprint(values[i]))
		}
	}
	return &binding.DamagedRow{Table: t.Name, Key: strings.Join(key, " "), What: what}
}

// IsDamaged says whether an error is a *binding.DamagedRow.
func IsDamaged(err error) bool {
	return errors.As(err, new(*binding.DamagedRow))
}
