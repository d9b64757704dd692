package station

import (
	"context"
	"fmt"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/panics"
)

// beside does work now, and then again and again until ctx ends. After a panic it goes on with the next time.
func (d *Desk) beside(ctx context.Context, every time.Duration, work func(context.Context)) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		safely(func() { work(ctx) })
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// safely does work that logs its errors itself. A panic does not end the process.
func safely(work func()) {
	defer panics.Recover(nil)
	work()
}

// overdue counts and logs that a list of revoked devices was not read, or is not the last one; as often as refused.
func (d *Desk) overdue(o directory.Overdue) {
	d.metrics.overdue.WithLabelValues(string(o.Why)).Inc()
	d.metrics.logged[o.Why].Do(func() {
		d.o.Log.Warn("a list of revoked devices is overdue", "lot", o.Lot, "why", o.Why, "since", o.Since,
			"error", o.Cause)
	})
}

// warnings says which lists of revoked devices are overdue, and what that means for their lots, from memory.
func (d *Desk) warnings() (all []string) {
	d.mu.Lock()
	there := d.there
	d.mu.Unlock()
	for _, o := range d.reader.Overdue() {
		if there != nil && !there[o.Lot] {
			continue // the lot has left the line
		}
		effect := "no device of the lot is handed out until it is read again; the log says why"
		if o.Why == directory.Late {
			effect = "devices are handed out by it: run factory lot refresh"
		}
		const warning = "the list of revoked devices of lot %s is overdue (%s): %s"
		all = append(all, fmt.Sprintf(warning, o.Lot, o.Why, effect))
	}
	return all
}
