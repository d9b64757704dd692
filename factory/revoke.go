package factory

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/kme"
)

// Revoke publishes that devices of a lot are not to be trusted any more. Doing it again changes nothing, and finishes
// what a run that was interrupted has left. report gets the number of devices that are done; it may be nil.
func (l *Line) Revoke(ctx context.Context, lot string, imeis []kme.IMEI, reason string, report func(done int)) error {
	m, err := l.Lot(ctx, lot)
	if err != nil {
		return err
	}
	return directory.Revoke(ctx, l.store, l.signer, m, imeis, reason, time.Now(), report)
}

// RevokeLot publishes that no device of a lot is to be trusted any more, for good.
func (l *Line) RevokeLot(ctx context.Context, lot, reason string) error {
	m, err := l.Lot(ctx, lot)
	if err != nil {
		return err
	}
	return directory.RevokeLot(ctx, l.store, l.signer, m, reason, time.Now())
}

// Revocations gives a lot's list of revoked devices.
func (l *Line) Revocations(ctx context.Context, m *directory.Manifest) (*directory.Revocations, error) {
	return l.reader.ReadRevocations(ctx, m)
}

// Refresh signs a lot's list of revoked devices anew, with a later next_update, good for validity; with 0, for as long
// as the last one was. begin publishes the first list of a lot that was made before lots had one from the start.
func (l *Line) Refresh(ctx context.Context, lot string, validity time.Duration,
	begin bool) (*directory.Revocations, error) {
	m, err := l.Lot(ctx, lot)
	if err != nil {
		return nil, err
	}
	if begin {
		err = l.beginRevocations(ctx, m, cmp.Or(validity, directory.DefaultValidity))
	} else {
		err = directory.RefreshRevocations(ctx, l.store, l.signer, m, time.Now(), validity)
	}
	if err != nil {
		return nil, err
	}
	return l.Revocations(ctx, m)
}

// A Refreshed is a lot whose list of revoked devices was signed anew.
type Refreshed struct {
	Lot        string    `json:"lot"`
	Version    int       `json:"version"`
	NextUpdate time.Time `json:"next_update"`
}

// RefreshAll is Refresh for several lots. One that fails does not hold up the others.
func (l *Line) RefreshAll(ctx context.Context, lots []string, validity time.Duration, begin bool) ([]Refreshed, error) {
	done := []Refreshed{}
	var failed error
	for _, lot := range lots {
		list, err := l.Refresh(ctx, lot, validity, begin)
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("lot %s: %w", lot, err))
			continue
		}
		done = append(done, Refreshed{Lot: lot, Version: list.Version, NextUpdate: list.NextUpdate})
	}
	return done, failed
}

// ReadIMEIs reads a file with an IMEI a line. Empty lines do not count.
func ReadIMEIs(path string) (imeis []kme.IMEI, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines, n := bufio.NewScanner(f), 0
	for lines.Scan() {
		n++
		text := strings.TrimSpace(lines.Text())
		if text == "" {
			continue
		}
		imei, err := kme.ParseIMEI(text)
		if err != nil {
			return nil, fmt.Errorf("%s, line %d: %w", path, n, err)
		}
		imeis = append(imeis, imei)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s, line %d: %w", path, n+1, err)
	}
	if len(imeis) == 0 {
		return nil, fmt.Errorf("%s has no IMEI", path)
	}
	return imeis, nil
}
