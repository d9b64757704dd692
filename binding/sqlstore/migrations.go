package sqlstore

import _ "embed"

// The migrations make an empty database what this program knows, one after the other, on SQLite and PostgreSQL alike. One that was
// released is never changed.
var (
	//go:embed schema.sql
	schema string

	migrations = []string{schema}
)
