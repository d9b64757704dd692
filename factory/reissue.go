package factory

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/kme"
)

// Reissue gives a device that came back a new key, in an injection package of its own below out, and revokes the one
// that it had, for a fixture, as in ProvisionOptions. The reason names the return: with the same one again nothing
// changes, so that a run that was interrupted can be repeated.
func (l *Line) Reissue(ctx context.Context, lot string, imei kme.IMEI, reason, fixture, out string) (path string, err error) {
	m, err := l.usable(ctx, lot)
	if err != nil {
		return "", err
	}
	if reason, err = directory.CheckReason(reason); err != nil {
		return "", err
	}
	position, ok := m.Position(imei)
	if !ok {
		return "", fmt.Errorf("IMEI %s is not in lot %s", imei, lot)
	}
	shard := position / m.ShardSize
	issued, err := l.reader.ReadShard(ctx, m, shard)
	if errors.Is(err, directory.ErrNotFound) {
		return "", fmt.Errorf("IMEI %s was never issued a key: its shard is not published; provision the lot", imei)
	} else if err != nil {
		return "", err
	}
	earlier, err := l.reader.History(ctx, m, imei)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(out, lot)
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	n, had := 1, []uint64{issued.Keys[position%m.ShardSize].Fingerprint()}
	for path, e := range handover.Reissues(earlier, dir) {
		if e.Reason == reason {
			if err := handover.CheckReissue(lot, path, e); err != nil {
				return "", fmt.Errorf("%w: %s", err, handover.BringBack(e.Package))
			}
			return path, nil
		}
		had = append(had, e.Key.Fingerprint())
		n++
	}
	path = filepath.Join(dir, handover.ReissueFile(imei, n))
	// As with shards: the package is on disk before its key is published; one that is there was not published yet.
	line, hash, err := handover.ReadReissue(path, lot, imei)
	if errors.Is(err, fs.ErrNotExist) {
		line, hash, err = l.makeReissue(ctx, m, imei, shard, fixture, path)
	} else if err != nil {
		err = fmt.Errorf("%w: its key was never published, so remove the file and run this again to make another one", err)
	} else if slices.Contains(had, line.PublicKey.Fingerprint()) {
		err = fmt.Errorf("%s has a key that the device had before: remove the file, and run this again to make another one", path)
	}
	if err != nil {
		return "", err
	}
	return path, directory.Reissue(ctx, l.store, l.signer, m, line.PublicKey, hash, reason, time.Now())
}

func (l *Line) makeReissue(ctx context.Context, m *directory.Manifest, imei kme.IMEI, shard int, fixture, path string) (
	line handover.InjectionLine, hash []byte, err error) {
	injection, err := l.injection(ctx, fixture)
	if err != nil {
		return line, nil, err
	}
	if line, err = l.makeLine(ctx, m, imei, shard, injection); err != nil {
		return line, nil, err
	}
	file, hash, err := handover.MarshalPackage(line)
	if err != nil {
		return line, nil, err
	}
	return line, hash, durable.WriteFile(path, file, 0o600)
}
