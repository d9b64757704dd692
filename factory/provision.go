package factory

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/durable"
)

// Progress is how far a Provision is.
type Progress struct {
	Done  int `json:"done"`  // devices whose keys are published and whose injection package is whole
	Made  int `json:"made"`  // of those, the ones that this run made keys for
	Total int `json:"total"` // devices of the lot
}

// ErrInterrupted: the context ended, and part of the lot is still to be done.
var ErrInterrupted = errors.New("interrupted: run the same command again to go on")

// ManifestFile is the lot's signed manifest in the folder of its injection packages: a device gets the modulus of
// its lot beside its own key.
const ManifestFile = "manifest.jws"

// InjectionFile is the name of a shard's injection package.
func InjectionFile(shard int) string { return fmt.Sprintf("injection-%06d.jsonl", shard) }

// Provision makes the keys of a lot's devices, shard by shard, on workers shards at a time. A shard's injection package
// is whole and on disk below out before its public keys are published, so that no key is ever published that
// nobody can inject. What is there already is checked and left; so a run goes on where another stopped.
//
// When ctx ends, the shards in flight are finished; the error is then ErrInterrupted. report is called after each
// shard, by one goroutine at a time, in no order; it may be nil.
func (l *Line) Provision(ctx context.Context, lot, out string, workers int, report func(Progress)) (Progress, error) {
	m, err := l.Lot(ctx, lot)
	if err != nil {
		return Progress{}, err
	}
	progress := Progress{Total: m.Devices()}
	dir := filepath.Join(out, lot)
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return progress, fmt.Errorf("the folder for the injection packages cannot be made: %w", err)
	}
	// Two processes would each make keys for a shard, and the package of one would replace that of the other.
	unlock, err := durable.Lock(dir)
	if err != nil {
		return progress, err
	}
	defer unlock()
	manifest, _, err := l.store.Read(ctx, directory.ManifestPath(lot))
	if err != nil {
		return progress, err
	}
	if err := durable.WriteFile(filepath.Join(dir, ManifestFile), manifest, 0o600); err != nil {
		return progress, fmt.Errorf("the injection packages cannot be written: %w", err)
	}

	type finished struct{ devices, made int }
	results := make(chan finished)
	var next atomic.Int64
	// A shard in flight is finished when the caller gives up, but not when another shard has failed for good.
	g, gctx := errgroup.WithContext(context.WithoutCancel(ctx))
	for range min(max(workers, 1), m.Shards()) {
		g.Go(func() error {
			for ctx.Err() == nil && gctx.Err() == nil {
				n := int(next.Add(1)) - 1
				if n >= m.Shards() {
					return nil
				}
				made, err := l.provisionShard(gctx, m, n, filepath.Join(dir, InjectionFile(n)))
				if err != nil {
					return fmt.Errorf("shard %d of lot %s: %w", n, lot, err)
				}
				_, devices := m.ShardRange(n)
				results <- finished{devices, made}
			}
			return nil
		})
	}
	var failed error
	go func() {
		failed = g.Wait()
		close(results)
	}()
	for r := range results {
		progress.Done += r.devices
		progress.Made += r.made
		if report != nil {
			report(progress)
		}
	}
	if failed == nil && progress.Done < progress.Total {
		failed = ErrInterrupted
	}
	return progress, failed
}

// provisionShard brings one shard to its end from wherever it is, and says how many keys it made.
func (l *Line) provisionShard(ctx context.Context, m *directory.Manifest, n int, path string) (made int, err error) {
	published, err := l.reader.ReadShard(ctx, m, n)
	if err != nil && !errors.Is(err, directory.ErrNotFound) {
		return 0, err
	}
	lines, err := l.readPackage(m, n, path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && published != nil:
		return 0, fmt.Errorf("its public keys are published, but its injection package %s is missing: bring it back from where the line keeps it; the private keys are nowhere else", path)
	case errors.Is(err, fs.ErrNotExist):
		if lines, err = l.makeShard(ctx, m, n, path); err != nil {
			return 0, err
		}
		made = len(lines)
	case err != nil && published == nil:
		return 0, fmt.Errorf("%w: it was never published, so remove the file and run this again to make its keys anew", err)
	case err != nil:
		return 0, fmt.Errorf("%w: its public keys are published, so bring back the file as it was", err)
	}
	shard, err := shardOf(m, n, lines)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	if published != nil {
		if !published.Equal(shard) {
			return 0, fmt.Errorf("the keys in %s are not those that are published: bring back the file that belongs to them", path)
		}
		return 0, nil
	}
	return made, directory.Publish(ctx, l.store, directory.ShardPath(m.Lot, n), l.signer, directory.TypeShard, shard)
}

// makeShard makes the keys of a shard and writes its injection package.
func (l *Line) makeShard(ctx context.Context, m *directory.Manifest, n int, path string) ([]directory.InjectionLine, error) {
	injection := injectionKey(l.Manufacturer())
	first, count := m.ShardRange(n)
	lines := make([]directory.InjectionLine, 0, count)
	var file bytes.Buffer
	for i := range count {
		imei := m.IMEI(first + i)
		pub, wrapped, err := l.token.MakeDeviceKey(ctx, m.Suite, injection)
		if err != nil {
			return nil, fmt.Errorf("IMEI %s: %w", imei, err)
		}
		line := directory.NewInjectionLine(imei, m.Lot, n, pub, injection.HexID(), wrapped)
		if err := line.Write(&file); err != nil {
			return nil, err
		}
		lines = append(lines, line)
	}
	if err := durable.WriteFile(path, file.Bytes(), 0o600); err != nil {
		return nil, fmt.Errorf("the injection package cannot be written; make room or give another --out, and run this again: %w", err)
	}
	return lines, nil
}

// readPackage reads a shard's injection package, which must be that of this lot, shard and injection key.
func (l *Line) readPackage(m *directory.Manifest, n int, path string) ([]directory.InjectionLine, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	injection := injectionKey(l.Manufacturer()).HexID()
	var lines []directory.InjectionLine
	for line, err := range directory.ReadInjection(f) {
		if err != nil {
			return nil, fmt.Errorf("%s is damaged: %w", path, err)
		}
		if line.Lot != m.Lot || line.Shard != n || line.DeviceKey.KeyID != injection {
			return nil, fmt.Errorf("%s is damaged: line %d is not of this lot, shard and injection key", path, len(lines)+1)
		}
		lines = append(lines, line)
	}
	if _, count := m.ShardRange(n); len(lines) != count {
		return nil, fmt.Errorf("%s is damaged: it has %d lines, not %d", path, len(lines), count)
	}
	return lines, nil
}

// shardOf is what a shard publishes of its injection package.
func shardOf(m *directory.Manifest, n int, lines []directory.InjectionLine) (*directory.Shard, error) {
	keys := make([]directory.DeviceKey, len(lines))
	for i, line := range lines {
		keys[i] = line.PublicKey
	}
	return directory.NewShard(m, n, keys)
}
