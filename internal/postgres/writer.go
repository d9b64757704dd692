package postgres

import (
	"context"
	"errors"
	"iter"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/kmehsm/kmehsm/internal/groupcommit"
)

// A Writer makes changes: see groupcommit. No other instance's writer makes any meanwhile.
//
// The changes of a transaction are made side by side, unless they have the same key: each goes on until it needs the
// result of a statement, and then the statements of all are sent together. So a transaction takes as many round trips
// as the longest of its changes, however many they are.
type Writer[S any] struct {
	*groupcommit.Writer[*Tx[S]]
	db *DB
}

// NewWriter makes the writer of a database. S is the state that the changes of one transaction share. It begins as its
// zero value; if a change is undone, what it has set there is undone, too.
func NewWriter[S any](db *DB) *Writer[S] {
	w := &Writer[S]{db: db}
	w.Writer = groupcommit.New(w.try)
	return w
}

const (
	// patience bounds a transaction.
	patience = 5 * time.Second
	// pause is how long the server waits for its instance within a transaction. So an instance that hangs, or whose
	// network is cut, blocks the changes of others no longer than that. When it goes on, it makes its changes again.
	// Callers have less time than patience.
	pause = time.Second
)

// try makes changes: see groupcommit.New.
func (w *Writer[S]) try(batch []*groupcommit.Change[*Tx[S]], apart bool) (results []error, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err = w.db.again(ctx, func() (lost bool, err error) {
		t := &transaction[S]{ctx: ctx, results: make([]error, len(batch))}
		err = w.db.raw(ctx, func(conn *pgx.Conn) error {
			t.conn = conn
			err := t.commit(batch, apart)
			// Without COMMIT: it was not sent, or the server has ended the idle transaction before (25P03).
			lost = conn.IsClosed() && (!t.ending || pgconn.SafeToRetry(err) || hasCode(err, "25P03"))
			return err
		})
		if err == nil {
			results = t.results
		}
		return lost, err
	})
	return results, err
}

// A transaction is one of changes.
type transaction[S any] struct {
	ctx     context.Context
	conn    *pgx.Conn
	queue   pgx.Batch // what is to be sent
	waited  bool      // whether a change waits for a result of that
	ending  bool      // whether it may have been committed
	shared  S
	results []error
}

// send sends the queued statements, and lets each change continue that waits for a result. An error ends the
// transaction.
func (t *transaction[S]) send() error {
	queue := t.unqueue()
	return t.conn.SendBatch(t.ctx, &queue).Close()
}

func (t *transaction[S]) unqueue() pgx.Batch {
	defer func() { t.queue, t.waited = pgx.Batch{}, false }()
	return t.queue
}

func (t *transaction[S]) commit(batch []*groupcommit.Change[*Tx[S]], apart bool) error {
	err := t.run(batch, apart)
	if t.conn.PgConn().TxStatus() == 'I' || t.conn.IsClosed() {
		return err // after an error of the commit, or of the connection, nobody knows whether it was committed
	}
	if _, undo := t.conn.Exec(t.ctx, "ROLLBACK"); undo != nil {
		return errors.Join(err, undo, t.conn.Close(t.ctx))
	}
	if !apart && len(batch) > 1 {
		return groupcommit.ErrTogether
	}
	return err
}

func (t *transaction[S]) run(batch []*groupcommit.Change[*Tx[S]], apart bool) error {
	_ = confirmed(t.conn.PgConn()) // of what was done before
	t.queue.Queue("BEGIN")
	t.queue.Queue(lock+", set_config('idle_in_transaction_session_timeout', $1, true)", pause.String())
	for from := 0; from < len(batch); {
		to, keys := from, map[string]bool{}
		for ; to < len(batch) && !keys[batch[to].Key] && !(apart && to > from); to++ {
			keys[batch[to].Key] = true
		}
		changes := t.sideBySide
		if apart {
			changes = t.alone
		}
		if err := changes(batch[from:to], t.results[from:to]); err != nil {
			return err
		}
		from = to
	}
	t.queue.Queue("COMMIT").Exec(func(tag pgconn.CommandTag) error {
		if tag.String() != "COMMIT" {
			return pgx.ErrTxCommitRollback
		}
		return nil
	})
	t.ending = true
	if err := t.send(); err != nil {
		return err
	}
	return confirmed(t.conn.PgConn())
}

// sideBySide makes changes with different keys. It fails if one of them fails after it has changed something.
func (t *transaction[S]) sideBySide(changes []*groupcommit.Change[*Tx[S]], results []error) error {
	all := make([]*Tx[S], len(changes))
	for i, c := range changes {
		tx := &Tx[S]{Shared: &t.shared, of: t}
		all[i] = tx
		if results[i] = c.Gone(); results[i] != nil {
			continue
		}
		var stop func()
		tx.goOn, stop = iter.Pull(func(wait func(struct{}) bool) {
			tx.wait = wait
			results[i] = c.Make(tx)
		})
		defer stop()
		tx.goOn()
	}
	for t.waited {
		if err := t.send(); err != nil {
			return err
		}
	}
	for i, tx := range all {
		if results[i] != nil && tx.wrote {
			return results[i]
		}
	}
	return nil
}

// alone makes one change, and undoes it alone if it fails.
func (t *transaction[S]) alone(change []*groupcommit.Change[*Tx[S]], result []error) error {
	before := t.shared
	t.queue.Queue("SAVEPOINT change")
	if err := t.send(); err != nil {
		return err
	}
	err := t.sideBySide(change, result)
	if err == nil {
		err = t.send() // what it does not wait for
	}
	if err == nil {
		t.queue.Queue("RELEASE change")
		return nil
	}
	t.unqueue()
	t.shared, result[0] = before, err
	t.queue.Queue("ROLLBACK TO change")
	t.queue.Queue("RELEASE change")
	return t.send()
}

// A Tx is the transaction of a change.
type Tx[S any] struct {
	Shared *S
	of     *transaction[S]
	wrote  bool // it has changed something, or tried to

	wait   func(struct{}) bool // until goOn, which returns when it waits again or ends; false: all is undone
	goOn   func() (struct{}, bool)
	result pgx.BatchResults // the next one of it is what it has waited for
	err    error            // of that
}

var errUndone = errors.New("the transaction was undone, since another change of it failed")

// awaits gives the result of a statement to read, when the other changes wait for theirs too.
func (tx *Tx[S]) awaits(read func(pgx.BatchResults) error, text string, args []any) error {
	tx.of.queue.Queue(text, args...).Fn = func(result pgx.BatchResults) error {
		tx.result, tx.err = result, nil
		tx.goOn()
		return tx.err
	}
	tx.of.waited = true
	if !tx.wait(struct{}{}) {
		return errUndone
	}
	tx.err = read(tx.result)
	return tx.err
}

// Do does not wait for the statement. If that fails, the transaction fails.
func (tx *Tx[S]) Do(_ context.Context, text string, args ...any) error {
	tx.wrote = true
	tx.of.queue.Queue(text, args...)
	return nil
}

func (tx *Tx[S]) Changed(_ context.Context, text string, args ...any) (rows int64, err error) {
	tx.wrote = true
	err = tx.awaits(func(result pgx.BatchResults) error {
		tag, err := result.Exec()
		rows = tag.RowsAffected()
		return err
	}, text, args)
	return rows, err
}

func (tx *Tx[S]) Each(_ context.Context, f func(scan func(...any) error) error, text string, args ...any) error {
	var own error
	err := tx.awaits(func(result pgx.BatchResults) error {
		rows, err := result.Query()
		if err != nil {
			return err
		}
		own = each(rows, f)
		return rows.Err()
	}, text, args)
	if own != nil {
		return own
	}
	return err
}

// scan gives a number in an any the type that database/sql gives it.
func scan(rows pgx.Rows, to []any) error {
	if err := rows.Scan(to...); err != nil {
		return err
	}
	for _, t := range to {
		if v, ok := t.(*any); ok {
			if n, ok := (*v).(int32); ok {
				*v = int64(n)
			}
		}
	}
	return nil
}
