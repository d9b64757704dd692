package factory

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory/memory"
	"github.com/kmehsm/kmehsm/factory/shard"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/kme"
)

// Revoke publishes that devices of a lot are not to be trusted any more. A second call changes nothing, and finishes an
// interrupted run. report gets the number of devices that are done; it may be nil.
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

// A Loss is what is said before devices are revoked, and the name to type as a confirmation.
type Loss struct{ Says, Name string }

// RevocationLoss says what is lost when devices of a lot are revoked, or without any the whole lot; nil if they are
// revoked already. It fails if a device is not in the lot.
func (l *Line) RevocationLoss(ctx context.Context, lot string, imeis []kme.IMEI) (*Loss, error) {
	m, err := l.Lot(ctx, lot)
	if err != nil {
		return nil, err
	}
	list, err := l.Revocations(ctx, m)
	if err != nil {
		return nil, err
	}
	var trusted []kme.IMEI
	for _, imei := range imeis {
		position, ok := m.Position(imei)
		if !ok {
			return nil, fmt.Errorf("IMEI %s is not in lot %s", imei, lot)
		}
		if !list.Revokes(position) {
			trusted = append(trusted, imei)
		}
	}
	switch {
	case list.Whole != nil || len(imeis) > 0 && len(trusted) == 0:
		return nil, nil
	case len(imeis) == 0:
		return &Loss{Name: lot, Says: fmt.Sprintf("All %d devices of lot %s, for good: none is to be trusted any "+
			"more, and the lot gets no more keys and is granted to nobody.", m.Devices(), lot)}, nil
	}
	loss := &Loss{Name: lot, Says: fmt.Sprintf("%d of the %d devices of lot %s will not be trusted any more, until "+
		"each gets another key by lot reissue.", len(trusted), m.Devices(), lot)}
	if len(trusted) == 1 {
		loss.Name = trusted[0].String()
	}
	return loss, nil
}

// Refresh signs a lot's list of revoked devices anew, good for validity; with 0, for as long as the last one was. With
// begin, it publishes the first list of a lot that was made before lots had one from the start.
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

// RefreshAll is Refresh for several lots, or for all if none is named. One that fails does not hold up the others.
func (l *Line) RefreshAll(ctx context.Context, lots []string, validity time.Duration, begin bool) ([]Refreshed, error) {
	if len(lots) == 0 {
		all, err := l.reader.Manifests(ctx)
		if err != nil {
			return nil, err
		}
		if lots, err = memory.Names(ctx, l.state.Dir, l.Manufacturer()); err != nil {
			return nil, err // of those that the directory does not have, too
		}
		for _, m := range all {
			lots = append(lots, m.Lot)
		}
		slices.Sort(lots)
		lots = slices.Compact(lots)
	}
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

// Reissue gives a returned device a new key, and revokes the one that it had. The injection package is below out, for a
// fixture as in ProvisionOptions. The reason identifies the return: the same reason again only finishes what was
// interrupted.
func (l *Line) Reissue(
	ctx context.Context, lot string, imei kme.IMEI, reason, fixture, out string,
) (path string, err error) {
	m, err := l.usable(ctx, lot)
	if err != nil {
		return "", err
	}
	if reason, err = strict.Reason(reason); err != nil {
		return "", err
	}
	position, ok := m.Position(imei)
	if !ok {
		return "", fmt.Errorf("IMEI %s is not in lot %s", imei, lot)
	}
	_, err = l.reader.ReadShard(ctx, m, position/m.ShardSize)
	if errors.Is(err, directory.ErrNotFound) {
		return "", fmt.Errorf("IMEI %s was never issued a key: its shard is not published; provision the lot", imei)
	} else if err != nil {
		return "", err
	}
	earlier, err := l.reader.History(ctx, m, imei)
	if err != nil {
		return "", err
	}
	// In another folder, the device's earlier packages and the stations would not be found.
	dir := filepath.Join(out, lot)
	if _, err := os.Stat(filepath.Join(dir, handover.ManifestFile)); durable.Missing(err) {
		return "", usage.In("out", fmt.Errorf("there are no injection packages of lot %s in %s: name the folder that "+
			"lot provision wrote them to, or, with state, the one that it is in", lot, dir))
	} else if err != nil {
		return "", err
	}
	n := 1
	for path, e := range handover.Reissues(earlier, dir) {
		if e.Reason == reason {
			if err := handover.CheckReissue(lot, path, e); err != nil {
				if errors.Is(err, fs.ErrNotExist) {
					err = usage.In("out", fmt.Errorf("IMEI %s has its key for this reason already, and there is no "+
						"%s: name the folder that it was written to, or else", imei, path))
				}
				return "", fmt.Errorf("%w: %s", err, handover.BringBack(e.Package))
			}
			// The run that wrote the entry may have been killed before the list that names it.
			return path, directory.Reissue(ctx, l.store, l.signer, m, *e.Key, e.Package, reason, time.Now())
		}
		n++
	}
	j, err := l.state.journal(ctx, l.Manufacturer())
	if err != nil {
		return "", err
	}
	defer j.Close()
	path = filepath.Join(dir, handover.ReissueFile(imei, n))
	planned, err := j.Reissue(ctx, lot, filepath.Base(path))
	if err != nil {
		return "", err
	}
	// As with shards, the package is on disk before its key is published, and the journal has its SHA-256 before that.
	line, hash, err := handover.ReadReissue(path, lot, imei)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		line, hash, err = l.makeReissue(ctx, j, m, position, fixture, path)
	case err != nil || !bytes.Equal(hash, planned):
		err = errors.Join(err, fmt.Errorf("the line has not made %s as it is there: find out where it comes from, "+
			"move it away, and run this again", path))
	}
	if err != nil {
		return "", err
	}
	return path, directory.Reissue(ctx, l.store, l.signer, m, line.PublicKey, hash, reason, time.Now())
}

func (l *Line) makeReissue(ctx context.Context, j *shard.Journal, m *directory.Manifest, position int, fixture,
	path string) (line handover.InjectionLine, hash []byte, err error) {
	injection, err := l.injection(ctx, fixture)
	if err != nil {
		return line, nil, err
	}
	if line, err = l.makeLine(ctx, m, m.IMEI(position), position/m.ShardSize, injection); err != nil {
		return line, nil, err
	}
	file, hash, err := handover.MarshalPackage(line)
	if err == nil {
		err = j.PlanReissue(m.Lot, filepath.Base(path), hash)
	}
	if err != nil {
		return line, nil, err
	}
	return line, hash, durable.WriteFile(path, file, 0o600)
}
