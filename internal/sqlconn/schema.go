package sqlconn

import "fmt"

// A Schema is what a program knows about a database's tables.
type Schema struct {
	// Migrations make an empty database what the program knows, one after the other. The version of a schema is how
	// many they are. One that was released is never changed.
	Migrations []string
	// Least is the lowest version that a program must know to work with a database of this one. Programs of lower ones
	// refuse it. A migration that only adds what they need not know leaves it as it is.
	Least int
}

// First makes a schema that has one version.
func First(migration string) Schema { return Schema{Migrations: []string{migration}, Least: 1} }

// leasts is above any version. A database has version and least in one number, as SQLite's user_version is one: 2003
// is version 3, for programs that know version 2 at least.
const leasts = 1000

// Number marks a database that has this schema.
func (s Schema) Number() int { return s.Least*leasts + len(s.Migrations) }

// Lacks gives the migrations that a database with a number lacks: none if it has a later schema. It fails if the
// program cannot work with it.
func (s Schema) Lacks(number int) ([]string, error) {
	have, least := number%leasts, number/leasts
	if number < 0 {
		return nil, fmt.Errorf("its schema has the number %d, which no release gives: it is another program's, or was "+
			"damaged; bring it back from a backup", number)
	}
	if least > len(s.Migrations) {
		return nil, fmt.Errorf("its schema has version %d, and only a program that knows version %d can work with it: "+
			"this one knows version %d; use the release that upgraded it, or a newer one; to go back, restore the "+
			"copy that was made before the upgrade", have, least, len(s.Migrations))
	}
	return s.Migrations[min(have, len(s.Migrations)):], nil
}

// Newer gives the version of a database with a number, if the program knows only lower ones; else 0.
func (s Schema) Newer(number int) int {
	if have := number % leasts; have > len(s.Migrations) {
		return have
	}
	return 0
}
