package sqlstore

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/subscription"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/kme"
)

func (s *Store) Subscription(ctx context.Context, imsi kme.IMSI, now time.Time) (*binding.Subscription, error) {
	if err := s.chains.Refusal(); err != nil {
		return nil, err
	}
	sub, err := s.current(ctx, "read a subscription", imsi, now)
	if err != nil {
		return nil, err
	}
	return &sub.Subscription, nil
}

// current reads outside of a change, also while the ledger is rolled back.
func (s *Store) current(
	ctx context.Context, operation string, imsi kme.IMSI, now time.Time, rands ...hsmkeys.RAND,
) (sub *subscription.Stored, err error) {
	err = s.settled(ctx, operation, imsi.String(), func(q sqlconn.Conn) (err error) {
		sub, err = subscription.Read(ctx, s.macs, q, imsi, now, rands...)
		return err
	})
	return sub, err
}

func (s *Store) Bindings(ctx context.Context, q binding.BindingQuery) (all []*binding.Binding, err error) {
	read, err := s.chains.Reading("list bindings")
	if err != nil {
		return nil, err
	}
	for len(all) < q.Limit {
		imsis, err := everBound(ctx, read, q, q.Limit-len(all))
		if err != nil || len(imsis) == 0 {
			return all, err
		}
		for _, imsi := range imsis {
			sub, err := s.Subscription(ctx, imsi, q.Now)
			if err != nil {
				return nil, err
			}
			if b := sub.Latest(); b != nil && (q.IMEI == (kme.IMEI{}) || b.IMEI == q.IMEI) {
				all = append(all, b)
			}
		}
		q.After = imsis[len(imsis)-1].String()
	}
	return all, nil
}

// everBound gives IMSIs that were ever bound, to a device if the query names one. It asks the ledger, so a missing or
// changed row is noticed.
func everBound(ctx context.Context, read sqlconn.Conn, q binding.BindingQuery, limit int) (all []kme.IMSI, err error) {
	var args []any
	arg := func(v any) string { args = append(args, v); return fmt.Sprint("$", len(args)) }
	begins := func(prefixes []string) string {
		any := []string{"1 = 0"}
		for _, p := range prefixes { // of 15 digits: their order is the same in every collation
			any = append(any, "subject BETWEEN "+arg(p)+" AND "+arg(p+strings.Repeat("9", 15-len(p))))
		}
		return "(" + strings.Join(any, " OR ") + ")"
	}
	where := "WHERE event = '" + string(binding.EventEstablished) + "' AND subject > " + arg(q.After)
	if q.IMEI != (kme.IMEI{}) {
		where += " AND tag IS NOT NULL AND imei = " + arg(q.IMEI.String())
	}
	if q.Within != nil {
		where += " AND " + begins(q.Within)
	}
	where += " AND NOT " + begins(q.Without)
	err = read.Each(ctx, func(scan func(...any) error) error {
		var imsi kme.IMSI
		var text string
		if err := scan(&text); err != nil {
			return err
		}
		if imsi.UnmarshalText([]byte(text)) != nil {
			return &binding.DamagedRow{Table: tables.Ledger.Name, Key: text, What: "has no IMSI"}
		}
		all = append(all, imsi)
		return nil
	}, "SELECT DISTINCT subject FROM ledger "+where+" ORDER BY subject LIMIT "+arg(limit), args...)
	return all, err
}

// toChange is subscription.ToChange, unless the stored rows are known.
func (s *Store) toChange(ctx context.Context, tx *txn, imsi kme.IMSI, now time.Time) (*subscription.Stored, error) {
	if tx.known != nil {
		return tx.known.At(now), nil
	}
	return subscription.ToChange(ctx, s.macs, &tx.Tx, imsi, now)
}
