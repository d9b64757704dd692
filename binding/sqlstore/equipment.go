package sqlstore

import (
	"context"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/kme"
)

// everBoundTo are the IMSIs that were ever bound to a device: the ledger knows them.
const everBoundTo = `(SELECT subject FROM ledger WHERE imei = $2 AND tag IS NOT NULL)`

// ofDevice reads what ofIMSI reads of an IMSI, also of all that were ever bound to a device, at one moment.
var ofDevice = strings.NewReplacer(
	"WHERE imsi = $1", "WHERE (imsi = $1 OR imsi IN "+everBoundTo+")",
	"WHERE subject = $1", "WHERE (subject = $1 OR subject IN "+everBoundTo+")",
).Replace(ofIMSI[nothing])

func (s *Store) Equipment(
	ctx context.Context, imei kme.IMEI, imsi kme.IMSI, now time.Time,
) (own *binding.Subscription, of []*binding.Binding, err error) {
	if err := s.refusal(); err != nil {
		return nil, nil, err
	}
	subs := map[string]*stored{imsi.String(): new(stored)}
	q := sqlconn.Conn{Operation: "check equipment", DB: s.lookUp}
	err = scan(ctx, q, len(bindings.columns)+2, func(r row) error {
		digits := r.text(1)
		if subs[digits] == nil {
			subs[digits] = new(stored)
		}
		return s.takeAny(subs[digits], r, now)
	}, ofDevice, imsi.String(), imei.String())
	if err != nil {
		return nil, nil, err
	}
	for digits, sub := range subs {
		if err := sub.fresh(digits); err != nil {
			return nil, nil, err
		}
		if b := sub.Active; b != nil && b.IMEI == imei {
			of = append(of, b)
		}
	}
	return &subs[imsi.String()].Subscription, of, nil
}
