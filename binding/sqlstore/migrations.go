package sqlstore

import _ "embed"

// The migrations make an empty database what this program knows, one after the other, on SQLite and PostgreSQL alike. One that was
// released is never changed.
var (
	//go:embed schema1.sql
	schema1 string
	//go:embed schema2.sql
	schema2 string
	//go:embed schema3.sql
	schema3 string
	//go:embed schema4.sql
	schema4 string

	migrations = []string{schema1, schema2, schema3, schema4}
)
