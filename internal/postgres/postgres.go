// Package postgres opens PostgreSQL databases whose commits outlive a loss of power, for several instances at once.
package postgres

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"golang.org/x/sys/unix"

	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// A DB is an open database. Its own methods read.
type DB struct {
	*sql.DB
	hosts int // that its connection string names
}

// connections are how many a program has at most. They stay open.
const connections = 32

// Open opens the database of a connection string. Its tables are made by the role that owns them: the service's own
// where that is so, else see Upgrade.
func Open(ctx context.Context, name string, schema sqlconn.Schema) (*DB, error) {
	db, err := connect(name, schema)
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(connections)
	db.SetMaxIdleConns(connections)
	if err = db.upToDate(ctx, schema); err != nil {
		return nil, errors.Join(fmt.Errorf("the PostgreSQL database cannot be used: %w", reached(err)), db.Close())
	}
	return db, nil
}

// Look gives the number of the schema of a database, 0 if it has none, and changes nothing.
func Look(ctx context.Context, name string, schema sqlconn.Schema) (number int, err error) {
	db, err := connect(name, schema)
	if err != nil {
		return 0, err
	}
	if number, err = Number(ctx, db); err != nil {
		err = fmt.Errorf("the PostgreSQL database cannot be used: %w", reached(err))
	}
	return number, errors.Join(err, db.Close())
}

// hasCode says whether an error is PostgreSQL's, with this SQLSTATE.
func hasCode(err error, code string) bool {
	pg, ok := errors.AsType[*pgconn.PgError](err)
	return ok && pg.Code == code
}

// reached adds to an error of connecting what to do about it.
func reached(err error) error {
	if hasCode(err, "3D000") { // invalid_catalog_name
		return usage.Errorf("its server has no such database: make it (createdb), and its tables (keysvc store "+
			"upgrade), or correct the connection string: %w", err)
	}
	if !errors.As(err, new(*pgconn.ConnectError)) {
		return err
	}
	return fmt.Errorf("there is no connection: see that its server runs and takes changes, and that the connection "+
		"string has the right host, database, role and password (PGPASSFILE): %w", err)
}

// parse parses a connection string, with what the environment adds (PGHOST, PGSSLMODE, PGSERVICE, ...), and gives the
// servers that it names. Its errors are wrong usage.
//
// Each host must be on this machine, or prove its name by TLS: another server in its place would be sent every sealed
// KME, and asked for them.
func parse(name string) (config *pgx.ConnConfig, servers []*pgconn.FallbackConfig, err error) {
	config, err = pgx.ParseConfig(name)
	if err != nil {
		// err may have the password.
		return nil, nil, usage.Errorf("the connection string of PostgreSQL cannot be parsed, or a file that it names " +
			"cannot be read: it is postgres://USER@HOST/DATABASE?sslmode=verify-full&sslrootcert=FILE, with the CA's " +
			"certificate in FILE")
	}
	if path := os.Getenv("PGPASSFILE"); path != "" {
		if info, err := os.Stat(path); err == nil {
			if err := durable.Closed("the file of passwords "+path, info); err != nil {
				return nil, nil, usage.Errorf("%w; chmod 0600 it, and change the passwords if others had access", err)
			}
		}
	}
	servers = append([]*pgconn.FallbackConfig{{Host: config.Host, Port: config.Port, TLSConfig: config.TLSConfig}},
		config.Fallbacks...)
	for _, server := range servers {
		tls := server.TLSConfig
		if filepath.IsAbs(server.Host) || tls != nil && !tls.InsecureSkipVerify && tls.ServerName == server.Host &&
			server.Host != "" {
			continue
		}
		return nil, nil, usage.Errorf("the connection string of PostgreSQL allows a server that does not prove its " +
			"name: write ?sslmode=verify-full&sslrootcert=FILE after the database's name, with the CA's certificate " +
			"in FILE; or, for a server on this machine, postgres://USER@/DATABASE?host=/FOLDER with the folder of " +
			"its Unix socket")
	}
	return config, servers, nil
}

// A connector connects to one of several servers. It asks the one first that took the last connection: each new
// connection would wait for a host that has lost its power.
type connector struct {
	servers []driver.Connector
	last    atomic.Int64
}

// Connect makes a driver.Connector of it.
func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	var errs []error
	first := int(c.last.Load())
	for i := range c.servers {
		at := (first + i) % len(c.servers)
		conn, err := c.servers[at].Connect(ctx)
		if err == nil {
			c.last.Store(int64(at))
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// Driver is described at Connect.
func (c *connector) Driver() driver.Driver { return c.servers[0].Driver() }

// silence is how long the host of a server may be silent, also to whoever has no deadline.
const silence = 2 * patience

// dialer makes connections that end with the other end's host: TCP alone would wait for it for a quarter of an hour. A
// server that is only slow is waited for, because its host answers.
var dialer = net.Dialer{
	Timeout: silence,
	KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: patience, Interval: time.Second,
		Count: int(patience / time.Second)},
	Control: func(network, _ string, conn syscall.RawConn) error {
		if network == "unix" {
			return nil
		}
		var err error
		if outer := conn.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(silence.Milliseconds()))
		}); outer != nil {
			return outer
		}
		return err
	},
}

// connect gives the connections of a connection string.
func connect(name string, schema sqlconn.Schema) (*DB, error) {
	config, servers, err := parse(name)
	if err != nil {
		return nil, err
	}
	config.RuntimeParams["application_name"] = fmt.Sprintf(application, len(schema.Migrations))
	// A standby has old rows, and so has a primary that has become one: whatever the string says, they are not used.
	config.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	config.OnNotice = func(conn *pgconn.PgConn, n *pgconn.Notice) {
		if n.Code == warning {
			conn.CustomData()[warning] = n
		}
	}
	// A server that has lost its power does not even refuse a connection: the next one is tried while there is time.
	if len(servers) > 1 && config.ConnectTimeout == 0 {
		config.ConnectTimeout = patience / time.Duration(1+len(servers))
	}
	config.DialFunc = dialer.DialContext
	prepare := stdlib.OptionAfterConnect(func(ctx context.Context, conn *pgx.Conn) error {
		err := ready(ctx, conn, schema)
		if err != nil {
			conn.Close(ctx) // nobody else does
		}
		return err
	})
	c := new(connector)
	for _, s := range servers {
		one := config.Copy()
		one.Host, one.Port, one.TLSConfig, one.Fallbacks = s.Host, s.Port, s.TLSConfig, nil
		c.servers = append(c.servers, stdlib.GetConnector(*one, prepare))
	}
	return &DB{DB: sql.OpenDB(c), hosts: len(servers)}, nil
}

// ready prepares a new connection, which may be to another server after a failover. It refuses a server that confirms
// what it could still forget, and one whose tables have a schema by now that this program cannot work with: nobodyBelow
// sees only programs that are connected. It makes statements use an index: the plan is made when a connection first
// uses a statement, and the plan for an empty table, by bitmaps, reads a sixteenth of a ledger to find the last entry
// of a chain.
func ready(ctx context.Context, conn *pgx.Conn, schema sqlconn.Schema) error {
	for _, setting := range []string{"fsync", "synchronous_commit", "full_page_writes"} {
		var value, plans string
		if err := conn.QueryRow(ctx, "SELECT current_setting($1), set_config('enable_bitmapscan', 'off', false)",
			setting).Scan(&value, &plans); err != nil {
			return fmt.Errorf("look at the setting %s: %w", setting, err)
		}
		if value == "off" {
			return fmt.Errorf("its setting %s is off: a loss of power would take bindings that were confirmed", setting)
		}
	}
	have, err := schemaNumber(func(to any, text string) error { return conn.QueryRow(ctx, text).Scan(to) })
	if err == nil {
		_, err = schema.Lacks(have)
	}
	return err
}

// couldLose begins a sentence of Unsynchronised.
const couldLose = "the store could lose what was confirmed last when its server is lost: "

// Unsynchronised says what is wrong with a server's standbys: nothing if there are none, or if all that is confirmed is
// also on the disk of each. A base backup is no standby. It asks for no column that a service's role may not read.
func (db *DB) Unsynchronised(ctx context.Context) (what string, err error) {
	var setting, commit, connected string
	if err := db.QueryRowContext(ctx, `SELECT current_setting('synchronous_standby_names'),
		current_setting('synchronous_commit'),
		coalesce(string_agg(application_name, E'\n' ORDER BY application_name), '')
		FROM pg_stat_replication WHERE application_name <> 'pg_basebackup'`).Scan(&setting, &commit,
		&connected); err != nil {
		return "", err
	}
	number, named := waitsFor(setting)
	var waited, asynchronous []string
	for standby := range strings.Lines(connected) {
		standby = strings.TrimSpace(standby)
		if slices.Contains(named, "*") || slices.Contains(named, strings.ToLower(standby)) {
			waited = append(waited, standby)
		} else {
			asynchronous = append(asynchronous, standby)
		}
	}
	switch {
	case number > 0 && (commit == "local" || commit == "remote_write"):
		return fmt.Sprintf(couldLose+"its setting synchronous_commit is %s: what it confirms is not yet on a "+
			"standby's disk", commit), nil
	case len(waited) < number:
		return fmt.Sprintf("no change of the store is confirmed: its server waits for %d of the standbys that its "+
			"setting synchronous_standby_names names, and %d of them are connected", number, len(waited)), nil
	case number == 0 && (len(asynchronous) > 0 || db.hosts > 1):
		return couldLose + "its standbys are asynchronous, since its setting synchronous_standby_names is empty", nil
	case len(asynchronous) > 0:
		return couldLose + "these standbys, which could take its place, are asynchronous: " +
			strings.Join(asynchronous, ", "), nil
	case len(waited) > number:
		return fmt.Sprintf(couldLose+"it waits for %d of these standbys, and each other one is asynchronous: %s",
			number, strings.Join(waited, ", ")), nil
	}
	return "", nil
}

// The syntax of synchronous_standby_names: names, or a number before them: FIRST 2 (a, b), ANY 2 (a, b), 2 (a, b).
var (
	numbered    = regexp.MustCompile(`(?i)^\s*(?:(?:first|any)\s*)?(\d+)\s*\(`)
	standbyName = regexp.MustCompile(`"(?:[^"]|"")*"|[^\s,()"]+`)
)

// waitsFor parses synchronous_standby_names: for how many standbys a commit waits, and for which, in lower case.
func waitsFor(setting string) (number int, names []string) {
	list, number := setting, 1
	if begin := numbered.FindStringSubmatch(setting); begin != nil {
		list = setting[len(begin[0]):]
		number, _ = strconv.Atoi(begin[1]) // PostgreSQL has checked it
	}
	for _, name := range standbyName.FindAllString(list, -1) {
		if quoted, ok := strings.CutPrefix(name, `"`); ok {
			name = strings.ReplaceAll(strings.TrimSuffix(quoted, `"`), `""`, `"`)
		}
		names = append(names, strings.ToLower(name))
	}
	if len(names) == 0 {
		return 0, nil
	}
	return number, names
}

// Alone makes a change while no other is made, whichever instance makes it. It returns when the change is durable; an
// error of f leaves everything as it was.
func (db *DB) Alone(ctx context.Context, f func(context.Context, *sql.Tx) error) error {
	conn, err := db.Conn(ctx)
	if err != nil {
		return fmt.Errorf("begin a transaction: %w", err)
	}
	defer conn.Close()
	tx, err := conn.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("begin a transaction: %w", err)
	}
	defer tx.Rollback() // no effect after Commit
	if _, err := tx.ExecContext(ctx, lock); err != nil {
		return fmt.Errorf("wait until no other changes are made: %w", err)
	}
	if err := f(ctx, tx); err != nil {
		return err
	}
	heard := func(c any) error { return confirmed(c.(*stdlib.Conn).Conn().PgConn()) }
	_ = conn.Raw(heard) // what it was warned of before, as of a collation's version when it connected
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return conn.Raw(heard)
}

// warning is the SQLSTATE with which PostgreSQL says that it has committed a transaction and not waited for its
// standby, since somebody has cancelled that (pg_cancel_backend): the commit itself succeeds. A connection of DB keeps
// the last one.
const warning = "01000"

// confirmed fails if a connection was warned since it was asked last: what it has committed may not outlive a failover.
func confirmed(conn *pgconn.PgConn) error {
	n, ok := conn.CustomData()[warning].(*pgconn.Notice)
	if !ok {
		return nil
	}
	delete(conn.CustomData(), warning)
	return fmt.Errorf("PostgreSQL has warned of the commit: %s", n.Message)
}

// lock keeps all other instances from changes until the transaction ends.
const lock = "SELECT pg_advisory_xact_lock(hashtextextended('kmehsm', 0))"

// dialect turns a migration into PostgreSQL's dialect. Texts are compared byte by byte, as SQLite does.
var dialect = strings.NewReplacer("BLOB", "BYTEA", " WITHOUT ROWID", "", " TEXT", ` TEXT COLLATE "C"`)

// upToDate brings the schema up to date, if it is not and the role may.
func (db *DB) upToDate(ctx context.Context, schema sqlconn.Schema) error {
	have, err := Number(ctx, db)
	var lacks []string
	if err == nil {
		lacks, err = schema.Lacks(have)
	}
	if err == nil && len(lacks) > 0 {
		err = db.changeTables(ctx, func(ctx context.Context, tx *sql.Tx) error { return migrate(ctx, tx, schema) })
	}
	if hasCode(err, "42501") { // insufficient_privilege
		err = fmt.Errorf("its tables are not what this program needs, or this role may not use them: "+
			"run keysvc store upgrade with the role that owns them: %w", err)
	}
	return err
}

// Number is that of the schema of a database, or of a transaction's; 0 of an empty one.
func Number(ctx context.Context, q interface {
	QueryRowContext(context.Context, string, ...any) *sql.Row
}) (int, error) {
	return schemaNumber(func(to any, text string) error { return q.QueryRowContext(ctx, text).Scan(to) })
}

// schemaNumber is Number for a connection of either library: read reads one value.
func schemaNumber(read func(to any, text string) error) (have int, err error) {
	var there bool
	err = read(&there, "SELECT to_regclass('schema_version') IS NOT NULL")
	if err == nil && there {
		err = read(&have, "SELECT version FROM schema_version")
	}
	if err != nil && !errors.Is(err, sql.ErrNoRows) { // pgx.ErrNoRows is one
		return 0, fmt.Errorf("read the version of its tables: %w", err)
	}
	return have, nil
}

// Tables are changed while services use them. A change waits for those who read a table, and calls wait behind it:
// for lockPatience at most. It is tried again until tablePatience has passed. A server ends a connection some time
// after its program has ended: for endPatience a change waits until an older program's connection is gone.
const (
	lockPatience  = time.Second
	tablePatience = time.Minute
	endPatience   = 5 * time.Second
)

// changeTables is Alone for a change of tables.
func (db *DB) changeTables(ctx context.Context, f func(context.Context, *sql.Tx) error) error {
	for began := time.Now(); ; {
		err := db.Alone(ctx, func(ctx context.Context, tx *sql.Tx) error {
			if _, err := tx.ExecContext(ctx, fmt.Sprintf("SET LOCAL lock_timeout = %d",
				lockPatience.Milliseconds())); err != nil {
				return fmt.Errorf("set how long to wait for a table: %w", err)
			}
			return f(ctx, tx)
		})
		connected := errors.As(err, new(connectedError))
		if !connected && !hasCode(err, "55P03") { // lock_not_available
			return err
		}
		if connected && time.Since(began) > endPatience {
			return err
		}
		if time.Since(began) > tablePatience {
			return fmt.Errorf("a table is in use, and nothing was changed: try again when no keysvc store verify and "+
				"no backup reads it: %w", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lockPatience): // the calls that have waited go on
		}
	}
}

func migrate(ctx context.Context, tx *sql.Tx, schema sqlconn.Schema) error {
	have, err := Number(ctx, tx)
	if err != nil {
		return err
	}
	lacks, err := schema.Lacks(have)
	if err != nil || len(lacks) == 0 {
		return err
	}
	if err := nobodyBelow(ctx, tx, schema.Least); err != nil {
		return err
	}
	statements := []string{"CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)"}
	for _, m := range lacks {
		statements = append(statements, dialect.Replace(m))
	}
	statements = append(statements, "DELETE FROM schema_version",
		fmt.Sprintf("INSERT INTO schema_version VALUES (%d)", schema.Number()))
	for _, statement := range statements {
		if _, err := tx.ExecContext(ctx, statement); err != nil {
			return fmt.Errorf("bring its tables up to date: %w", err)
		}
	}
	return nil
}

// application names a connection by the version of the schema that its program knows.
const application = "kmehsm, schema %d"

// A connectedError says that a program is connected that does not know the new schema.
type connectedError struct{ where, role string }

func (e connectedError) Error() string {
	return fmt.Sprintf("an older keysvc is connected, from %s as %s: it cannot work with the new schema, and nothing "+
		"was changed; stop it first", e.where, e.role)
}

// nobodyBelow refuses to change tables under programs that do not know a version.
func nobodyBelow(ctx context.Context, tx *sql.Tx, least int) error {
	db := sqlconn.Conn{Operation: "look who is connected", DB: sqlconn.SQL{DB: tx}}
	return db.Each(ctx, func(scan func(...any) error) error {
		var name, role, where string
		if err := scan(&name, &role, &where); err != nil {
			return err
		}
		var knows int
		if _, err := fmt.Sscanf(name, application, &knows); err == nil && knows < least {
			return connectedError{where: where, role: role}
		}
		return nil
	}, "SELECT application_name, usename, coalesce(host(client_addr), 'this machine') FROM pg_stat_activity "+
		"WHERE datname = current_database() AND application_name LIKE 'kmehsm,%'")
}
