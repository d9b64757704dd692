package postgres

import (
	"context"
	"database/sql/driver"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/internal/pgtest"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
)

// panicking is an argument of which the driver panics.
type panicking struct{}

func (panicking) Value() (driver.Value, error) { panic("in an argument") }

// Each of many statements at once gets its own rows, or its own error.
func TestPostgresReader(t *testing.T) {
	db, err := Open(t.Context(), pgtest.Start(t).Database(t), sqlconn.First(table))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	r := NewReader(db)
	wrong := errors.New("wrong")
	var all sync.WaitGroup
	for i := range int64(400) {
		all.Go(func() {
			var sum int64
			text, n := "SELECT n FROM generate_series(1, $1::bigint) AS n", i
			if i%10 == 3 {
				text = "SELECT n / (n - 2) FROM generate_series(1, $1::bigint + 3) AS n"
			}
			err := r.Each(t.Context(), func(scan func(...any) error) error {
				var n int64
				if err := scan(&n); err != nil {
					return err
				}
				switch sum += n; {
				case i%10 == 4 && n == 2:
					return wrong
				case i%10 == 5 && n == 2:
					panic(wrong)
				}
				return nil
			}, text, n)
			switch p := panics.Of(err); {
			case i < 2:
			case i%10 == 3 && err != nil && strings.Contains(err.Error(), "by zero"):
			case i%10 == 4 && errors.Is(err, wrong):
			case i%10 == 5 && p != nil && p.Value == wrong:
			case err == nil && sum == n*(n+1)/2 && (i%10 < 3 || i%10 > 5):
			default:
				t.Errorf("statement %d: sum %d, %v", i, sum, err)
			}
		})
	}
	all.Wait()
	for range 20 { // more than there are goroutines
		err := r.Each(t.Context(), nil, "SELECT $1::bigint", panicking{})
		if p := panics.Of(err); p == nil || p.Value != "in an argument" {
			t.Errorf("a panic in the driver: %v", err)
		}
	}
	var n int64
	if err := r.Each(t.Context(), func(scan func(...any) error) error { return scan(&n) }, "SELECT $1::bigint",
		int64(7)); err != nil || n != 7 {
		t.Errorf("after panics: %d, %v", n, err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	r.Close()
	for _, ctx := range []context.Context{t.Context(), gone} {
		if err := r.Each(ctx, nil, "SELECT 1"); err == nil {
			t.Error("a reader that is closed reads")
		}
	}
}
