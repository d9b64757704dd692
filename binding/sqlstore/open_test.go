package sqlstore

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/kmehsm/kmehsm/binding/storetest"
	"github.com/kmehsm/kmehsm/internal/certtest"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// Whatever leads to a host without TLS that proves its name is refused, before anything is sent to it.
func TestConnection(t *testing.T) {
	service := filepath.Join(t.TempDir(), "services")
	if err := os.WriteFile(service, []byte("[plain]\nhost=127.0.0.1\n[proved]\nhost=127.0.0.1\nsslmode=verify-full\n"),
		0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, environment string
		refused           bool
	}{
		{"postgres://u:hunter2@127.0.0.1:1/d", "", true},
		{"postgresql://u:hunter2@127.0.0.1:1/d", "", true},
		{"postgres://u:hunter2@127.0.0.1:1/d?sslmode=disable", "", true},
		{"postgres://u:hunter2@127.0.0.1:1/d?sslmode=allow", "", true},
		{"postgres://u:hunter2@127.0.0.1:1/d?sslmode=prefer", "", true},
		{"postgres://u:hunter2@127.0.0.1:1/d?sslmode=require", "", true},
		{"postgres://u:hunter2@127.0.0.1:1/d?sslmode=verify-ca", "", true},
		// sent as the name that it wants, and not verified
		{"postgres://u:hunter2@localhost:1/d?sslmode=require", "", true},
		{"postgres://u:hunter2@localhost:1/d?sslmode=verify-ca", "", true},
		{"postgres://u:hunter2@127.0.0.1:1/d?sslmode=verify-full", "", false},
		{"postgres://u:hunter2@127.0.0.1:1,127.0.0.2:1/d?sslmode=verify-full", "", false},
		{"postgres://u:hunter2@127.0.0.1:1/d?sslrootcert=system", "", false}, // which means verify-full
		{"postgres:///d?host=/nowhere", "", false},
		{"postgres:///d?host=/nowhere&sslmode=disable", "", false},
		{"postgres:///d?host=/nowhere,/elsewhere", "", false},
		{"postgres:///d?host=/nowhere,127.0.0.1&port=1", "", true}, // a second host
		{"postgres:///d?host=127.0.0.1,/nowhere&port=1", "", true},
		{"postgres:///d?host=nowhere", "", true}, // no folder: a host's name
		{"postgres://u:hunter2@/d", "PGHOST=127.0.0.1", true},
		{"postgres://u:hunter2@/d", "PGHOST=/nowhere", false},
		{"postgres://u:hunter2@/d", "PGHOST=/nowhere,127.0.0.1", true},
		{"postgres://u:hunter2@127.0.0.1:1/d", "PGSSLMODE=verify-full", false},
		// the string has the last word
		{"postgres://u:hunter2@127.0.0.1:1/d?sslmode=verify-full", "PGSSLMODE=disable", false},
		{"postgres:///d?service=plain", "PGSERVICEFILE=" + service, true},
		{"postgres:///d?service=proved&port=1", "PGSERVICEFILE=" + service, false},
	} {
		t.Run(c.name+" "+c.environment, func(t *testing.T) {
			for _, name := range []string{"PGHOST", "PGSSLMODE", "PGSERVICE", "PGSERVICEFILE", "PGPORT"} {
				t.Setenv(name, "")
			}
			if name, value, _ := strings.Cut(c.environment, "="); name != "" {
				t.Setenv(name, value)
			}
			s, err := Open(t.Context(), c.name, rowKey)
			if err == nil {
				s.Close()
				t.Fatal("there is no server")
			}
			if got := strings.Contains(err.Error(), "sslmode=verify-full") &&
				strings.Contains(err.Error(), "host=/"); got != c.refused {
				t.Errorf("refused %v, want %v: %v", got, c.refused, err)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error has the password: %v", err)
			}
		})
	}
}

// The same with a server, whose certificate is for one name.
func TestPostgresTLS(t *testing.T) {
	dir := certtest.Make(t, "localhost", "other.example")
	ca := url.QueryEscape(filepath.Join(dir, "ca.pem"))
	elsewhere := url.QueryEscape(filepath.Join(certtest.Make(t), "ca.pem"))
	named := func(name string) *pgtest.Server {
		return pgtest.StartTLS(t, "127.0.0.1", filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key"))
	}
	server, other := named("localhost"), named("other.example")
	at := func(s *pgtest.Server, parameters string) string {
		return fmt.Sprintf("postgres://postgres@localhost:%d/postgres?connect_timeout=20&%s", s.Port, parameters)
	}
	s := openPG(t, at(server, "sslmode=verify-full&sslrootcert="+ca))
	var version string
	if err := s.read.QueryRowContext(t.Context(), "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid() "+
		"AND ssl").Scan(&version); err != nil || !strings.HasPrefix(version, "TLSv1.") {
		t.Errorf("connected by %q: %v", version, err)
	}
	for name, want := range map[string]string{
		at(server, "sslmode=verify-ca&sslrootcert="+ca):          "sslmode=verify-full",
		at(server, "sslmode=require"):                            "sslmode=verify-full",
		at(server, "sslmode=prefer"):                             "sslmode=verify-full",
		at(server, "sslmode=disable"):                            "sslmode=verify-full",
		at(server, "sslmode=verify-full&sslrootcert="+elsewhere): "unknown authority",
		at(other, "sslmode=verify-full&sslrootcert="+ca):         "valid for other.example, not localhost",
	} {
		if s, err := Open(t.Context(), name, rowKey); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
			if err == nil {
				s.Close()
			}
		}
	}
}

// limited makes the tables as one role and gives the connection string of another, the service's.
func limited(t *testing.T, server *pgtest.Server) (url string) {
	t.Helper()
	owner := server.Database(t)
	if err := Upgrade(t.Context(), owner, "service"); err != nil {
		t.Fatal(err)
	}
	return server.As(t, owner, "service")
}

func TestPostgresContractAsService(t *testing.T) {
	server := pgtest.Start(t)
	server.Exec(t, "CREATE ROLE service LOGIN")
	storetest.Run(t, func(t *testing.T) storetest.Store { return openPG(t, limited(t, server)) })
}

// The service's role may not touch what is in the ledger, whatever it sends.
func TestPostgresRoles(t *testing.T) {
	server := pgtest.Start(t)
	server.Exec(t, "CREATE ROLE service LOGIN")
	url := limited(t, server)
	s := openPG(t, url)
	b := newBinding(t, "001010000000001", "a")
	beginAttempt(t, s, b)
	if err := s.Establish(t.Context(), b, []byte("tag"), true, t0); err != nil {
		t.Fatal(err)
	}
	if warnings, err := s.Warnings(t.Context()); err != nil || len(warnings) > 0 {
		t.Error(warnings, err)
	}
	for _, statement := range []string{
		"DELETE FROM ledger", "DELETE FROM ledger WHERE false", "UPDATE ledger SET imei = imei", "TRUNCATE ledger",
		"DROP TABLE ledger", "ALTER TABLE ledger RENAME TO l", "ALTER TABLE ledger OWNER TO service",
		"CREATE RULE r AS ON INSERT TO ledger DO INSTEAD NOTHING",
		"CREATE TRIGGER t BEFORE INSERT ON ledger FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
		"DELETE FROM spent_rands", "UPDATE spent_rands SET imsi = imsi", "TRUNCATE spent_rands",
		"DROP TABLE spent_rands", "DELETE FROM lots", "DELETE FROM manufacturers", "TRUNCATE bindings",
		"DROP TABLE bindings", "CREATE TABLE mine (x INTEGER)", "DELETE FROM schema_version",
		"DROP SCHEMA public CASCADE", "CREATE ROLE more", "ALTER ROLE service SUPERUSER", "SET ROLE postgres",
	} {
		_, err := s.read.ExecContext(t.Context(), statement)
		if pg := (*pgconn.PgError)(nil); !errors.As(err, &pg) || pg.Code != "42501" {
			t.Errorf("%s: %v, want a refusal", statement, err)
		}
	}
	checkBinding(t, s, b)

	// A second upgrade takes back what was granted besides.
	server.ExecIn(t, url, "GRANT DELETE ON ledger TO service; GRANT ALL ON spent_rands TO PUBLIC")
	if warnings, err := s.Warnings(t.Context()); err != nil || len(warnings) != 1 ||
		!strings.Contains(warnings[0], "role service") || !strings.Contains(warnings[0], "on the table ledger") {
		t.Error(warnings, err)
	}
	if err := Upgrade(t.Context(), server.As(t, url, "postgres"), "service"); err != nil {
		t.Error(err)
	}
	if warnings, err := s.Warnings(t.Context()); err != nil || len(warnings) > 0 {
		t.Error(warnings, err)
	}
}

// Every way that leads to the ledger is seen.
func TestPostgresRolesThatMayTooMuch(t *testing.T) {
	server := pgtest.Start(t)
	owner := server.Database(t)
	server.Exec(t, "CREATE ROLE fine LOGIN")
	if err := Upgrade(t.Context(), owner, "fine"); err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct{ make, want string }{ // ? is a new role, that may log in
		{"ALTER ROLE ? SUPERUSER", "superuser"},
		{"ALTER ROLE ? CREATEROLE", "may make roles"},
		{"GRANT postgres TO ?", "owns the table"},
		{"ALTER ROLE ? NOINHERIT; GRANT postgres TO ?", "owns the table"},
		{"ALTER SCHEMA public OWNER TO ?", "owns the schema public"},
		{"ALTER SCHEMA public OWNER TO pg_database_owner; ALTER DATABASE t1 OWNER TO ?", "owns the schema public"},
		{"GRANT pg_write_all_data TO ?", "more than SELECT and INSERT"},
		{"CREATE ROLE helpers; GRANT TRUNCATE ON ledger TO helpers; GRANT helpers TO ?", "on the table ledger"},
		{"CREATE ROLE others; GRANT UPDATE (rand) ON spent_rands TO others; GRANT others TO ?",
			"on the table spent_rands"},
		{"CREATE ROLE worse; GRANT DELETE ON ledger TO worse; ALTER ROLE ? NOINHERIT; GRANT worse TO ?",
			"on the table ledger"},
		{"CREATE ROLE maker CREATEROLE; GRANT maker TO ?", "may make roles"},
		{"GRANT pg_execute_server_program TO ?", "run programs"},
		{"GRANT pg_write_server_files TO ?", "write files"},
		{"ALTER SCHEMA public OWNER TO postgres; ALTER DATABASE t1 OWNER TO ?", "owns the database t1"},
		{"ALTER ROLE ? CREATEDB", ""},
	} {
		role := fmt.Sprint("r", i)
		server.ExecIn(t, owner, "CREATE ROLE "+role+" LOGIN; "+strings.ReplaceAll(c.make, "?", role))
		err := Upgrade(t.Context(), owner, role)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) ||
			!strings.Contains(err.Error(), role)) {
			t.Errorf("%s: %v, want %q", c.make, err, c.want)
		}
		server.ExecIn(t, owner, "GRANT SELECT ON schema_version TO "+role) // so that it may open the store
		s := openPG(t, server.As(t, owner, role))
		if warnings, err := s.Warnings(t.Context()); err != nil || (len(warnings) == 1) != (c.want != "") ||
			c.want != "" && !strings.Contains(warnings[0], c.want) {
			t.Errorf("%s: %q, %v, want %q", c.make, warnings, err, c.want)
		}
	}
	var granted int
	if err := openPG(t, owner).read.QueryRowContext(t.Context(),
		"SELECT count(*) FROM information_schema.role_table_grants WHERE grantee ~ '^r[0-9]+$' AND grantee <> 'r14' "+
			"AND table_name <> 'schema_version'").Scan(&granted); err != nil || granted > 0 {
		t.Errorf("roles that were refused have %d grants, %v", granted, err)
	}
	for role, want := range map[string]string{"nobody": `no role "nobody"`, "": `no role ""`,
		`fine"; DROP TABLE ledger; --`: "no role"} {
		if err := Upgrade(t.Context(), owner, role); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("role %q: %v", role, err)
		}
	}
}

// A role that may not make tables opens what is up to date, and else says what to do.
func TestPostgresUpgrade(t *testing.T) {
	server := pgtest.Start(t)
	server.Exec(t, "CREATE ROLE service LOGIN")
	owner := server.Database(t)
	url := server.As(t, owner, "service")
	refused := func(what string) {
		t.Helper()
		if s, err := Open(t.Context(), url, rowKey); err == nil ||
			!strings.Contains(err.Error(), "keysvc store upgrade") {
			t.Errorf("%s: %v", what, err)
			if err == nil {
				s.Close()
			}
		}
	}
	refused("an empty database")
	openPG(t, owner)
	refused("tables that nothing was granted of")
	if err := Upgrade(t.Context(), url, "service"); err == nil {
		t.Error("the service's role has upgraded")
	}
	for range 2 { // and again
		if err := Upgrade(t.Context(), owner, "service"); err != nil {
			t.Fatal(err)
		}
		openPG(t, url)
	}
	defer func(now sqlconn.Schema) { known = now }(known)
	known = next("CREATE TABLE next (x INTEGER NOT NULL)", "CREATE TABLE after (x INTEGER NOT NULL)")
	refused("an older schema")
	if err := Upgrade(t.Context(), owner, "service"); err != nil {
		t.Fatal(err)
	}
	openPG(t, url)
	if err := Upgrade(t.Context(), "sqlite:"+path(t), "service"); err == nil ||
		!strings.Contains(err.Error(), "SQLite") {
		t.Error(err)
	}
}

// next is the schema of the next release.
func next(migrations ...string) sqlconn.Schema {
	return sqlconn.Schema{Migrations: slices.Concat(known.Migrations, migrations), Least: known.Least}
}

// Two releases use one store. What the newer has only added, the older serves from, and says what it cannot do. What it
// cannot work with is not done while it is connected, and refuses it then.
func TestSchemas(t *testing.T)         { schemas(t, "sqlite:"+path(t)) }
func TestPostgresSchemas(t *testing.T) { schemas(t, pgtest.Start(t).Database(t)) }

func schemas(t *testing.T, name string) {
	postgres := !strings.HasPrefix(name, "sqlite:")
	opened := func() *Store {
		t.Helper()
		s, err := Open(t.Context(), name, rowKey)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	// written has each store read what the other has written.
	written := func(imsi string, by, other *Store) {
		t.Helper()
		b := newBinding(t, imsi, "a"+imsi)
		beginAttempt(t, by, b)
		if err := by.Establish(t.Context(), b, []byte(imsi), true, t0); err != nil {
			t.Fatal(err)
		}
		checkBinding(t, by, b)
		checkBinding(t, other, b)
	}
	as := func(s sqlconn.Schema) { known = s }
	older := known
	defer as(older)
	running := opened()
	newer := next("ALTER TABLE bindings ADD COLUMN note TEXT NOT NULL DEFAULT ''; CREATE TABLE notes (n BIGINT)")
	as(newer)
	upgraded := opened()
	if warnings, err := upgraded.Warnings(t.Context()); err != nil || strings.Contains(fmt.Sprint(warnings), "newer") {
		t.Errorf("the newer release: %q, %v", warnings, err)
	}
	as(older)
	restarted := opened()
	for i, s := range []*Store{running, restarted} {
		written(fmt.Sprint("00101000000000", i), s, upgraded)
		written(fmt.Sprint("00101000000001", i), upgraded, s)
		warnings, err := s.Warnings(t.Context())
		if err != nil || !strings.Contains(fmt.Sprint(warnings), "a newer release has upgraded the store to schema "+
			"version 2, and this one knows 1") {
			t.Errorf("the older release: %q, %v", warnings, err)
		}
	}
	if r, err := running.Verify(t.Context(), func(int, int) {}); err != nil || len(r.Damaged) > 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := running.Copy(t.Context(), open(t, path(t)), func(int) {}); err == nil ||
		!strings.Contains(err.Error(), "would not have all of it") {
		t.Errorf("a copy by the older release: %v", err)
	}
	if postgres {
		if err := Upgrade(t.Context(), name, "postgres"); err == nil ||
			!strings.Contains(err.Error(), "has version 2 already, and this program knows 1") {
			t.Errorf("an upgrade by the older release: %v", err)
		}
	}

	newest := next("", "ALTER TABLE sightings RENAME TO seen")
	newest.Least = 3
	as(newest)
	if postgres {
		if s, err := Open(t.Context(), name, rowKey); err == nil || !strings.Contains(err.Error(), "stop it first") {
			t.Fatalf("while an older release is connected: %v", err)
		} else if s != nil {
			s.Close()
		}
	}
	for _, s := range []*Store{running, restarted, upgraded} {
		s.Close()
	}
	as(older)
	forgotten := opened() // is not closed: SQLite does not know of it
	if postgres {
		forgotten.Close()
	}
	as(newest)
	opened()
	as(older)
	const refusal = "its schema has version 3, and only a program that knows version 3 can work with it: this one " +
		"knows version 1; use the release that upgraded it, or a newer one"
	if s, err := Open(t.Context(), name, rowKey); err == nil || !strings.Contains(err.Error(), refusal) {
		t.Errorf("an older release: %v", err)
	} else if s != nil {
		s.Close()
	}
	if _, err := forgotten.Warnings(t.Context()); !postgres && (err == nil || !strings.Contains(err.Error(), refusal)) {
		t.Errorf("one that runs is ready: %v", err)
	}
	if err := forgotten.Note(t.Context(), "TRIED", "s", ""); !postgres && (err == nil ||
		!strings.Contains(err.Error(), refusal)) {
		t.Errorf("one that runs changes the database: %v", err)
	}
}

// An upgrade does not wait for whoever reads a table while calls wait behind it: it lets them pass, and tries again.
func TestPostgresUpgradeWaits(t *testing.T) {
	server := pgtest.Start(t)
	owner := server.Database(t)
	s := openPG(t, owner)
	reading, err := s.read.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer reading.Rollback()
	if _, err := reading.ExecContext(t.Context(), "SELECT * FROM bindings"); err != nil {
		t.Fatal(err)
	}
	older := known
	defer func() { known = older }()
	known = next("ALTER TABLE bindings ADD COLUMN note TEXT NOT NULL DEFAULT ''")
	server.Exec(t, "CREATE ROLE service LOGIN")
	upgraded := make(chan error, 1)
	go func() { upgraded <- Upgrade(t.Context(), owner, "service") }()
	waits := func() (waits bool) {
		if err := s.read.QueryRowContext(t.Context(), "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)").
			Scan(&waits); err != nil {
			t.Fatal(err)
		}
		return waits
	}
	for range 2 {
		testproc.Await(t, "it waits for the table", waits)
		testproc.Await(t, "it lets calls pass", func() bool { return !waits() })
	}
	b := newBinding(t, "001010000000001", "a")
	beginAttempt(t, s, b)
	if err := s.Establish(t.Context(), b, []byte("tag"), true, t0); err != nil {
		t.Fatal(err)
	}
	checkBinding(t, s, b)
	if len(upgraded) > 0 {
		t.Fatal("the table was changed under who reads it")
	}
	if err := reading.Rollback(); err != nil {
		t.Error(err)
	}
	if err := <-upgraded; err != nil {
		t.Error(err)
	}
}

// A server ends the connections of a program that has just ended a moment later. An upgrade waits for that.
func TestPostgresUpgradeSoonAfterAnOlderOne(t *testing.T) {
	server := pgtest.Start(t)
	server.Exec(t, "CREATE ROLE service LOGIN")
	owner := server.Database(t)
	older, err := Open(t.Context(), owner, rowKey)
	if err != nil {
		t.Fatal(err)
	}
	defer older.Close()
	defer func(now sqlconn.Schema) { known = now }(known)
	known = next("CREATE TABLE next (x INTEGER NOT NULL)")
	known.Least = len(known.Migrations)
	upgraded := make(chan error, 1)
	go func() { upgraded <- Upgrade(t.Context(), owner, "service") }()
	select {
	case err := <-upgraded:
		t.Errorf("it has not waited: %v", err)
	case <-time.After(500 * time.Millisecond):
		older.Close()
		if err := <-upgraded; err != nil {
			t.Error(err)
		}
	}
}
