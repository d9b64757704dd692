package subscription

import (
	"context"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/kme"
)

// boundTo are the IMSIs that were ever bound to a device: the ledger knows them. For a parameter beside the condition
// of an index, without the CAST, SQLite compiles the statement at each use. $1 must come first: it numbers them so.
const boundTo = `WITH others AS MATERIALIZED (` +
	`SELECT DISTINCT subject AS other FROM ledger WHERE subject <> $1 AND imei = CAST($2 AS TEXT) AND tag IS NOT NULL) `

// OfDevice reads what ofIMSI reads of an IMSI, also of all that were ever bound to a device, at one moment.
var OfDevice = boundTo + ofIMSI[nothing] + " UNION ALL " + strings.NewReplacer(
	"WHERE imsi = $1", "JOIN others ON imsi = other",
	"WHERE subject = $1", "JOIN others ON subject = other",
).Replace(ofIMSI[nothing])

// Equipment is what is stored of an IMSI, and the active bindings of a device.
func Equipment(
	ctx context.Context, macs tables.Key, q sqlconn.Conn, imei kme.IMEI, imsi kme.IMSI, now time.Time,
) (own *binding.Subscription, of []*binding.Binding, err error) {
	subs := map[string]*Stored{imsi.String(): new(Stored)}
	err = tables.Scan(ctx, q, len(tables.Bindings.Columns)+2, func(r tables.Row) error {
		digits := r.Text(1)
		if subs[digits] == nil {
			subs[digits] = new(Stored)
		}
		return subs[digits].takeAny(macs, r, now)
	}, OfDevice, imsi.String(), imei.String())
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
