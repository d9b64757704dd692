package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
)

// A test's table has a chain of numbers, whose end the changes of a transaction know in common.
const table = `CREATE TABLE chain (n BIGINT PRIMARY KEY, what TEXT NOT NULL); CREATE TABLE count (n BIGINT NOT NULL);
	INSERT INTO count VALUES (0)`

type (
	writer = Writer[int64]
	tx     = Tx[int64]
)

func newWriter(t *testing.T, url string) *writer {
	t.Helper()
	db, err := Open(t.Context(), url, sqlconn.First(table))
	if err != nil {
		t.Fatal(err)
	}
	w := NewWriter[int64](db)
	t.Cleanup(func() {
		w.Close()
		db.Close()
	})
	return w
}

func number(t *testing.T, w *writer, query string) (n int64) {
	t.Helper()
	if err := w.db.QueryRowContext(t.Context(), query).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// add adds to the chain.
func add(ctx context.Context, tx *tx, what string) error {
	var end int64
	if *tx.Shared == 0 {
		if err := tx.Each(ctx, func(scan func(...any) error) error { return scan(&end) },
			"SELECT coalesce(max(n), 0) FROM chain"); err != nil {
			return err
		}
	}
	*tx.Shared = max(*tx.Shared, end) + 1
	if rows, err := tx.Changed(ctx, "INSERT INTO chain VALUES ($1, $2)", *tx.Shared, what); err != nil || rows != 1 {
		return fmt.Errorf("%d rows: %w", rows, err)
	}
	return nil
}

// checkChain says that the chain has so many numbers, and none is missing.
func checkChain(t *testing.T, w *writer, want int64) {
	t.Helper()
	if n := number(t, w, "SELECT count(*) FROM chain"); n != want {
		t.Errorf("the chain has %d numbers, want %d", n, want)
	}
	if n := number(t, w, "SELECT coalesce(max(n), 0) FROM chain"); n != want {
		t.Errorf("the chain ends with %d, want %d", n, want)
	}
}

// together makes changes at once, of which those that come while the first is made share a transaction, and counts
// the transactions.
func together(t *testing.T, w *writer, n int, f func(i int) error) (transactions int64) {
	t.Helper()
	before := number(t, w, "SELECT txid_current()")
	hold := make(chan struct{})
	var all sync.WaitGroup
	all.Go(func() {
		if err := w.Do(t.Context(), "first", func(ctx context.Context, tx *tx) error {
			<-hold
			return tx.Do(ctx, "UPDATE count SET n = n")
		}); err != nil {
			t.Error(err)
		}
	})
	for i := range n {
		all.Go(func() {
			if err := f(i); err != nil {
				t.Errorf("change %d: %v", i, err)
			}
		})
	}
	time.Sleep(20 * time.Millisecond)
	close(hold)
	all.Wait()
	return number(t, w, "SELECT txid_current()") - before - 1
}

// Changes that wait together share a transaction, and those of one key see each other.
func TestPostgresGroupCommit(t *testing.T) {
	w := newWriter(t, pgtest.Start(t).Database(t))
	const each = 40
	for round := int64(1); ; round++ {
		n := together(t, w, each, func(i int) error {
			return w.Do(t.Context(), fmt.Sprint(i%30), func(ctx context.Context, tx *tx) error {
				if i%30 == 0 { // more than one has the key
					var n int64
					if err := tx.Each(ctx, func(scan func(...any) error) error { return scan(&n) },
						"SELECT n FROM count"); err != nil {
						return err
					}
					if err := tx.Do(ctx, "UPDATE count SET n = $1", n+1); err != nil {
						return err
					}
				}
				return add(ctx, tx, "good")
			})
		})
		checkChain(t, w, each*round)
		if n := number(t, w, "SELECT n FROM count"); n != 2*round {
			t.Errorf("a count of two a round is %d after round %d", n, round)
		}
		if t.Failed() || n <= each/4 {
			return
		}
		if round == 20 { // the machine may be too busy for some
			t.Fatalf("%d changes at once took %d transactions", each, n)
		}
	}
}

// A change that fails is undone alone, however it fails.
func TestPostgresFailsAlone(t *testing.T) {
	w := newWriter(t, pgtest.Start(t).Database(t))
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	wrong := errors.New("wrong")
	ways := []struct {
		name   string
		ctx    context.Context
		fails  func(ctx context.Context, tx *tx) error
		failed func(error) bool
	}{
		{"not at all", t.Context(), func(context.Context, *tx) error { return nil },
			func(err error) bool { return err == nil }},
		{"its caller has gone", gone, func(context.Context, *tx) error { return nil },
			func(err error) bool { return errors.Is(err, context.Canceled) }},
		{"by itself", t.Context(), func(context.Context, *tx) error { return wrong },
			func(err error) bool { return errors.Is(err, wrong) }},
		{"by a panic", t.Context(), func(context.Context, *tx) error { panic(wrong) },
			func(err error) bool { p := panics.Of(err); return p != nil && p.Value == wrong }},
		{"by what it waits for", t.Context(), func(ctx context.Context, tx *tx) error {
			_, err := tx.Changed(ctx, "INSERT INTO chain VALUES (1, 'again')")
			return err
		}, func(err error) bool { return err != nil && strings.Contains(err.Error(), "chain_pkey") }},
		{"by what it reads", t.Context(), func(ctx context.Context, tx *tx) error {
			return tx.Each(ctx, func(func(...any) error) error { return nil }, "SELECT 1 / (n - n) FROM count")
		}, func(err error) bool { return err != nil && strings.Contains(err.Error(), "by zero") }},
		{"by what it does not wait for", t.Context(), func(ctx context.Context, tx *tx) error {
			return tx.Do(ctx, "INSERT INTO chain VALUES (1, 'again')")
		}, func(err error) bool { return err != nil && strings.Contains(err.Error(), "chain_pkey") }},
	}
	if err := w.Do(t.Context(), "1", func(ctx context.Context, tx *tx) error {
		return add(ctx, tx, "good")
	}); err != nil {
		t.Fatal(err)
	}
	good := int64(1)
	for _, way := range ways {
		for _, first := range []bool{false, true} { // before it has changed something, or after
			const each = 12
			together(t, w, each, func(i int) error {
				err := w.Do(map[bool]context.Context{true: way.ctx, false: t.Context()}[i == 5], fmt.Sprint(i),
					func(ctx context.Context, tx *tx) error {
						if i == 5 && first {
							if err := way.fails(ctx, tx); err != nil {
								return err
							}
						}
						if err := add(ctx, tx, way.name); err != nil {
							return err
						}
						if i == 5 && !first {
							return way.fails(ctx, tx)
						}
						return nil
					})
				if i == 5 {
					if !way.failed(err) {
						return fmt.Errorf("which fails: %w", err)
					}
					return nil
				}
				return err
			})
			good += each
			if way.name != "not at all" {
				good--
			}
			checkChain(t, w, good)
			if t.Failed() {
				t.Fatalf("one of a transaction fails %s, before it has changed something: %v", way.name, first)
			}
		}
	}
}

// Several instances at once keep one chain.
func TestPostgresWriters(t *testing.T) {
	url := pgtest.Start(t).Database(t)
	all := []*writer{newWriter(t, url), newWriter(t, url), newWriter(t, url)}
	var g sync.WaitGroup
	const each = 100
	for i, w := range all {
		for j := range 8 {
			g.Go(func() {
				for range each {
					err := w.Do(t.Context(), fmt.Sprint(j), func(ctx context.Context, tx *tx) error {
						return add(ctx, tx, fmt.Sprint(i))
					})
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
	}
	g.Wait()
	checkChain(t, all[0], 3*8*each)
}

// Whoever does not answer in a transaction keeps others waiting for pause, and no longer; whose connection is ended
// makes the change again with another one.
func TestPostgresHangs(t *testing.T) {
	server := pgtest.Start(t)
	for try := 1; hangs(t, server.Database(t), try < 10); try++ {
	}
}

// hangs says whether it is to be tried again, if it may: one's transaction has ended before two was done, since the
// machine is busy.
func hangs(t *testing.T, url string, may bool) (again bool) {
	one, two := newWriter(t, url), newWriter(t, url)
	began := time.Now()
	var ended error
	var g sync.WaitGroup
	holds, hold := make(chan struct{}), make(chan struct{})
	holding := sync.OnceFunc(func() { close(holds) })
	g.Go(func() {
		ended = one.Do(t.Context(), "x", func(ctx context.Context, tx *tx) error {
			if err := add(ctx, tx, "hangs"); err != nil {
				return err
			}
			holding()
			<-hold
			return nil
		})
		holding() // it has failed before
	})
	<-holds
	var err error
	for range 3 {
		if err = two.Do(t.Context(), "x", func(ctx context.Context, tx *tx) error {
			return add(ctx, tx, "goes on")
		}); err == nil {
			break
		}
	}
	close(hold)
	g.Wait()
	if err != nil || ended != nil {
		if may && time.Since(began) > patience {
			return true
		}
		t.Errorf("beside an instance that hangs: %v; its own change: %v", err, ended)
	}
	if err := one.Do(t.Context(), "x", func(ctx context.Context, tx *tx) error {
		return add(ctx, tx, "is back")
	}); err != nil {
		t.Error(err)
	}
	checkChain(t, one, 3)
	return false
}
