package postgres

import (
	"context"
	"database/sql"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// tooFew is what is said of fewer standbys than a server waits for.
const tooFew = "no change of the store is confirmed: its server waits for %d of the standbys that its setting " +
	"synchronous_standby_names names, and %d of them are connected"

// with is a connection string with other parameters.
func with(t *testing.T, name string, change func(url.Values)) string {
	t.Helper()
	u := must.Get[*url.URL](t)(url.Parse(name))
	q := u.Query()
	change(q)
	u.RawQuery = q.Encode()
	return u.String()
}

// The first server of a connection string has lost its power: it answers nothing, and refuses nothing. It is asked
// once.
func TestPostgresSilentServer(t *testing.T) {
	dir := t.TempDir()
	silent := must.Get[net.Listener](t)(net.Listen("unix", filepath.Join(dir, ".s.PGSQL.5432")))
	defer silent.Close()
	var asked atomic.Int64
	go func() {
		for {
			if _, err := silent.Accept(); err != nil {
				return
			}
			asked.Add(1)
		}
	}()
	name := with(t, pgtest.Start(t).Database(t), func(q url.Values) {
		q.Set("host", dir+","+q.Get("host"))
		q.Set("port", "5432,"+q.Get("port"))
		q.Del("connect_timeout")
	})
	ctx, cancel := context.WithTimeout(t.Context(), testproc.Patience)
	defer cancel()
	connect := func() error {
		asked.Store(0)
		db, err := Open(ctx, name, sqlconn.First(table))
		if err != nil {
			return err
		}
		defer db.Close()
		for range 3 {
			conn, err := db.Conn(ctx)
			if err != nil {
				return err
			}
			defer conn.Close()
		}
		if n := asked.Load(); n != 1 {
			return fmt.Errorf("the server that is silent was asked %d times, for 3 connections", n)
		}
		return nil
	}
	// A busy machine may need more time for a connection than each server has.
	for try := 1; ; try++ {
		err := connect()
		if err == nil {
			return
		}
		if try == 10 || ctx.Err() != nil {
			t.Fatal(err)
		}
	}
}

// A file of passwords that every user may read is refused.
func TestPostgresOpenPasswords(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pgpass")
	must.Do(t, os.WriteFile(path, nil, 0o600))
	t.Setenv("PGPASSFILE", path)
	const name = "postgres://keysvc@/keysvc?host=/run"
	if _, _, err := parse(name); err != nil {
		t.Error(err)
	}
	must.Do(t, os.Chmod(path, 0o644))
	if _, _, err := parse(name); err == nil || !strings.Contains(err.Error(), "chmod 0600") {
		t.Errorf("passwords that all may read: %v", err)
	}
}

// A server that takes no changes has old rows: it is not used, also if the connection string does not ask for another.
func TestPostgresReadOnly(t *testing.T) {
	server := pgtest.Start(t)
	name := with(t, server.Database(t), func(q url.Values) { q.Del("target_session_attrs") })
	db := must.Get[*DB](t)(Open(t.Context(), name, sqlconn.First(table)))
	defer db.Close()
	server.Exec(t, "ALTER SYSTEM SET default_transaction_read_only = on")
	server.Exec(t, "SELECT pg_reload_conf()")
	testproc.Await(t, "a server that takes no changes is refused", func() bool {
		other, err := Open(t.Context(), name, sqlconn.First(table))
		if err == nil {
			other.Close()
		}
		return err != nil && strings.Contains(err.Error(), "read only")
	})
}

// The tables are changed to what a program cannot work with, while that has no connection. It does not go on with
// them when it has one again.
func TestPostgresChangedMeanwhile(t *testing.T) {
	server := pgtest.Start(t)
	name := server.Database(t)
	old := must.Get[*DB](t)(Open(t.Context(), name, sqlconn.First(table)))
	defer old.Close()
	server.Exec(t, "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity "+
		"WHERE application_name LIKE 'kmehsm,%'")
	must.Do(t, must.Get[*DB](t)(Open(t.Context(), name, sqlconn.Schema{
		Migrations: []string{table, "ALTER TABLE count RENAME n TO m"}, Least: 2})).Close())
	old.PingContext(t.Context()) // by the connection that has ended
	if _, err := Number(t.Context(), old); err == nil || !strings.Contains(err.Error(), "knows version 1") {
		t.Errorf("a program that cannot work with the tables has a connection: %v", err)
	}
}

// A server that waits for a standby that is away confirms nothing, although it can be read: whoever asks is told.
func TestPostgresNoStandby(t *testing.T) {
	server := pgtest.Start(t)
	db := must.Get[*DB](t)(Open(t.Context(), server.Database(t), sqlconn.First(table)))
	defer db.Close()
	if what, err := db.Unsynchronised(t.Context()); what != "" || err != nil {
		t.Errorf("a server without standbys: %q, %v", what, err)
	}
	server.Set(t, "synchronous_standby_names", "*")
	if what, err := db.Unsynchronised(t.Context()); !strings.Contains(what, fmt.Sprintf(tooFew, 1, 0)) || err != nil {
		t.Errorf("a server that waits for a standby: %q, %v", what, err)
	}
}

// Standbys beside those that the server waits for are named, and no base backup is taken for a standby: also to the
// service's role, which PostgreSQL does not tell what each standby is.
func TestPostgresWhichStandbys(t *testing.T) {
	server := pgtest.Start(t)
	name := server.Database(t)
	server.Exec(t, "CREATE ROLE service LOGIN")
	db := must.Get[*DB](t)(connect(server.As(t, name, "service"), sqlconn.First(table)))
	defer db.Close()
	for _, c := range []struct {
		names     string
		connected []string
		want      string
	}{
		{"", []string{"pg_basebackup"}, ""},
		{"*", []string{"pg_basebackup"}, fmt.Sprintf(tooFew, 1, 0)},
		{"", []string{"far"}, "its standbys are asynchronous"},
		{"near", []string{"far"}, fmt.Sprintf(tooFew, 1, 0)},
		{`"Near", nearer`, []string{"near", "far", "farther"}, "asynchronous: far, farther"},
		{`"near,""1"""`, []string{`near,"1"`}, ""},
		{"ANY 1 (near, far)", []string{"near"}, ""},
		{`"first"`, []string{"first"}, ""},
		{"First 1 (near)", []string{"first", "near"}, "asynchronous: first"},
		// All of them, and too few.
		{"FIRST 2 (*)", []string{"near"}, fmt.Sprintf(tooFew, 2, 1)},
		{"any 2(near, far)", []string{"near", "farther"}, fmt.Sprintf(tooFew, 2, 1)},
		{"2 (near, far, farther)", []string{"far"}, fmt.Sprintf(tooFew, 2, 1)},
		{"FIRST 2 (*)", []string{"near", "far"}, ""},
		{"ANY 2 (near, far)", []string{"near", "far"}, ""},
		// More than the server waits for: the others may lack what was confirmed.
		{"ANY 1 (near, far)", []string{"near", "far"}, "it waits for 1 of these standbys, and each other one is " +
			"asynchronous: far, near"},
		{"*", []string{"near", "far"}, "it waits for 1 of these standbys"},
		{"FIRST 2 (*)", []string{"near", "far", "farther"}, "it waits for 2 of these standbys"},
	} {
		server.Set(t, "synchronous_standby_names", c.names)
		var standbys []*pgconn.PgConn
		for _, as := range c.connected { // what is connected for replication counts, whatever it reads
			standbys = append(standbys, must.Get[*pgconn.PgConn](t)(pgconn.Connect(t.Context(), with(t, name,
				func(q url.Values) { q.Set("replication", "true"); q.Set("application_name", as) }))))
		}
		what, err := db.Unsynchronised(t.Context())
		if err != nil || (what == "") != (c.want == "") || !strings.Contains(what, c.want) {
			t.Errorf("%q, with %q: %q, %v", c.names, c.connected, what, err)
		}
		for _, s := range standbys {
			must.Do(t, s.Close(t.Context()))
		}
		testproc.Await(t, "no standby is connected", func() bool {
			var n int
			err := db.QueryRowContext(t.Context(), "SELECT count(*) FROM pg_stat_replication").Scan(&n)
			return n == 0 && err == nil
		})
	}
}

// Somebody ends the wait of commits for a standby (pg_cancel_backend). PostgreSQL keeps the commits, and says that they
// have succeeded: nothing was confirmed.
func TestPostgresStandbyNotWaitedFor(t *testing.T) {
	server := pgtest.Start(t)
	w := newWriter(t, server.Database(t))
	const text = "UPDATE count SET n = n + 1"
	for name, change := range map[string]func() error{
		"together": func() error {
			return w.Do(t.Context(), "a", func(ctx context.Context, tx *tx) error { return tx.Do(ctx, text) })
		},
		"alone": func() error {
			return w.db.Alone(t.Context(), func(ctx context.Context, tx *sql.Tx) error {
				_, err := tx.ExecContext(ctx, text)
				return err
			})
		},
	} {
		server.Set(t, "synchronous_standby_names", "nobody")
		ended := make(chan error, 1)
		go func() { ended <- change() }()
		testproc.Await(t, "the commit ends", func() bool {
			server.Exec(t, "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
			return len(ended) > 0
		})
		if err := <-ended; err == nil || !strings.Contains(err.Error(), "warned") {
			t.Errorf("%s: a commit that no standby has: %v", name, err)
		}
		server.Set(t, "synchronous_standby_names", "")
		must.Do(t, change())
	}
}

// Whoever only looks makes nothing.
func TestPostgresLook(t *testing.T) {
	name, schema := pgtest.Start(t).Database(t), sqlconn.First(table)
	if number, err := Look(t.Context(), name, schema); number != 0 || err != nil {
		t.Errorf("an empty database: %d, %v", number, err)
	}
	db := must.Get[*DB](t)(connect(name, schema))
	defer db.Close()
	var relations int
	if err := db.QueryRowContext(t.Context(), "SELECT count(*) FROM pg_class "+
		"WHERE relnamespace = 'public'::regnamespace").Scan(&relations); relations != 0 || err != nil {
		t.Errorf("%d tables and indexes were made, %v", relations, err)
	}
	must.Do(t, must.Get[*DB](t)(Open(t.Context(), name, schema)).Close())
	newer := sqlconn.Schema{Migrations: []string{table, "CREATE TABLE more (n BIGINT)"}, Least: 1}
	if number, err := Look(t.Context(), name, newer); number != schema.Number() || err != nil {
		t.Errorf("a database of an earlier schema: %d, %v", number, err)
	}
	if number, err := Number(t.Context(), db); number != schema.Number() || err != nil {
		t.Errorf("after a newer program has looked: %d, %v", number, err)
	}
}
