package station

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/kme"
)

// A Ticket is a device that a station has.
type Ticket struct {
	IMEI      kme.IMEI               `json:"imei"`
	Lot       string                 `json:"lot"`
	Issue     int                    `json:"issue"`     // 0: the device's first key; else its n-th new one
	Injection handover.InjectionLine `json:"injection"` // its line of the injection package
	Manifest  string                 `json:"manifest"`  // the lot's, signed; it has the modulus
	Timeout   float64                `json:"report_within_seconds"`
}

// again gives a station the ticket of the device that it has, with the same key as before, whatever came after.
func (d *Desk) again(ctx context.Context, l *lot, k device) (*Ticket, error) {
	have, t, err := d.ticket(ctx, l, k.position)
	if err == nil && have.issue != k.issue {
		err = refuse("IMEI %s was issued another key since this station was handed it: report it failed",
			l.IMEI(k.position))
	}
	if errors.As(err, new(*revokedError)) {
		err = refuse("IMEI %s was revoked since this station was handed it: report it scrapped", l.IMEI(k.position))
	}
	return t, err
}

type revokedError struct{ lot bool } // the whole lot is revoked

func (*revokedError) Error() string { return "the device is revoked" }

// ticket makes the ticket of a device, with its newest key, which must be the published one.
func (d *Desk) ticket(ctx context.Context, l *lot, at int) (device, *Ticket, error) {
	imei, k := l.IMEI(at), device{lot: l.Lot, position: at}
	published, err := d.reader.Device(ctx, l.Manifest, imei)
	if errors.Is(err, directory.ErrUnknownDevice) {
		return k, nil, fmt.Errorf("IMEI %s: %w", imei, ErrNotReady)
	}
	if errors.As(err, new(*directory.RefusedError)) { // a shard, or a part of the revocations
		err = fmt.Errorf("%w: %w", directory.ErrNotCurrent, err)
	}
	if err != nil {
		return k, nil, err
	}
	k.issue = published.Issued()
	if published.Revoked != nil {
		return k, nil, &revokedError{lot: published.Lot != nil}
	}
	line, err := d.line(l, at, k.issue, published.Package)
	if err != nil {
		return k, nil, fmt.Errorf("%w: factory reconcile %s says what to do", err, l.Lot)
	}
	return k, &Ticket{
		IMEI: imei, Lot: l.Lot, Issue: k.issue, Injection: line, Manifest: l.jws, Timeout: d.o.Timeout.Seconds(),
	}, nil
}

// line gives a device's line of its injection package, which must have this SHA-256. It caches the package of the last
// shard.
func (d *Desk) line(l *lot, at, issue int, hash []byte) (line handover.InjectionLine, err error) {
	dir, imei := filepath.Join(d.o.Injection, l.Lot), l.IMEI(at)
	another := func(path string) error { return fmt.Errorf("%s is not the package of the published key", path) }
	if issue > 0 {
		path := filepath.Join(dir, handover.ReissueFile(imei, issue))
		line, have, err := handover.ReadReissue(path, l.Lot, imei)
		if err == nil && !bytes.Equal(have, hash) {
			err = another(path)
		}
		return line, err
	}
	shard := at / l.ShardSize
	first, _ := l.ShardRange(shard)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.shard != shard {
		path := filepath.Join(dir, handover.InjectionFile(shard))
		lines, packed, err := handover.ReadPackage(l.Manifest, shard, path)
		if err == nil && !bytes.Equal(packed.Package, hash) {
			err = another(path)
		}
		if err != nil {
			return line, err
		}
		l.shard, l.lines = shard, lines
	}
	return l.lines[at-first], nil
}
