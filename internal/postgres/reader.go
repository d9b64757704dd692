package postgres

import (
	"context"
	"database/sql"
	"errors"
	"runtime"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/kmehsm/kmehsm/internal/panics"
)

// A Reader runs statements that read a few rows each: those that wait at the same time are sent together. It may be
// used concurrently.
type Reader struct {
	db      *DB
	reads   chan *read
	stop    func()        // once
	stopped chan struct{} // closed by stop
	ended   sync.WaitGroup
}

// A read is a statement that waits to be sent.
type read struct {
	each func(scan func(...any) error) error
	text string
	args []any
	done chan error
}

// NewReader makes the reader of a database.
func NewReader(db *DB) *Reader {
	r := &Reader{db: db, reads: make(chan *read), stopped: make(chan struct{})}
	r.stop = sync.OnceFunc(func() { close(r.stopped) })
	for range runtime.GOMAXPROCS(0) {
		r.ended.Go(r.run)
	}
	return r
}

// Close finishes what is being read; later statements fail.
func (r *Reader) Close() {
	r.stop()
	r.ended.Wait()
}

// Each calls f for every row: see sqlconn.Statements. It waits for a statement that was sent even if the context ends,
// for patience at most.
func (r *Reader) Each(ctx context.Context, f func(scan func(...any) error) error, text string, args ...any) error {
	q := &read{each: f, text: text, args: args, done: make(chan error, 1)}
	select {
	case r.reads <- q:
		return <-q.done
	case <-r.stopped:
		return sql.ErrConnDone
	case <-ctx.Done():
		return ctx.Err()
	}
}

var errReads = errors.New("this statement is not one for a connection that only reads")

func (r *Reader) Do(context.Context, string, ...any) error { return errReads }

func (r *Reader) Changed(context.Context, string, ...any) (int64, error) { return 0, errReads }

func (r *Reader) run() {
	for {
		select {
		case first := <-r.reads:
			all := []*read{first}
			for more := true; more && len(all) < 64; {
				select {
				case q := <-r.reads:
					all = append(all, q)
				default:
					more = false
				}
			}
			for len(all) > 0 {
				all = r.send(all)
			}
		case <-r.stopped:
			return
		}
	}
}

// send sends statements, answers those up to the first that fails, and returns the others.
func (r *Reader) send(all []*read) (rest []*read) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	asked := len(all)
	err := r.db.again(ctx, func() (lost bool, err error) {
		defer panics.Recover(&err) // of the driver: on this goroutine, it would end the process
		err = r.db.raw(ctx, func(conn *pgx.Conn) error {
			var queue pgx.Batch
			for _, q := range all {
				queue.Queue(q.text, q.args...).Query(func(rows pgx.Rows) error {
					given, err := q.read(rows)
					if err != nil && !given && conn.IsClosed() {
						return err
					}
					q.done <- err
					all = all[1:]
					rows.Close()
					return rows.Err()
				})
			}
			err := conn.SendBatch(ctx, &queue).Close()
			lost = conn.IsClosed()
			return err
		})
		return lost, err
	})
	if errors.As(err, new(*pgconn.PgError)) && len(all) < asked {
		return all
	}
	for _, q := range all {
		q.done <- err
	}
	return nil
}

// read hands all rows to the caller that waits for them, and says whether there were any. A panic is an error.
func (q *read) read(rows pgx.Rows) (given bool, err error) {
	defer panics.Recover(&err)
	err = each(rows, func(scan func(...any) error) error {
		given = true
		return q.each(scan)
	})
	return given, err
}

// each gives rows until f fails.
func each(rows pgx.Rows, f func(scan func(...any) error) error) error {
	defer rows.Close()
	scan := func(to ...any) error { return scan(rows, to) }
	for rows.Next() {
		if err := f(scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

// again repeats an operation once if its connection was lost before it had an effect: after a failover, all open
// connections are lost. If nobody has answered until the context's end, the idle ones are closed: where the server's
// host is lost, each of them would be silent for as long.
func (db *DB) again(ctx context.Context, f func() (lost bool, err error)) error {
	for open := db.Stats().OpenConnections; ; open-- {
		lost, err := f()
		if err != nil && ctx.Err() != nil {
			db.SetMaxIdleConns(0)
			db.SetMaxIdleConns(connections)
		}
		if err == nil || !lost || open <= 0 || ctx.Err() != nil {
			return err
		}
	}
}

// raw uses a connection without database/sql, for what that cannot do.
func (db *DB) raw(ctx context.Context, f func(*pgx.Conn) error) error {
	conn, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	var own error
	err = conn.Raw(func(c any) error {
		own = f(c.(*stdlib.Conn).Conn())
		return nil
	})
	if own != nil {
		return own
	}
	return err
}
