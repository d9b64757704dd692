package factory

import (
	"context"
	"errors"
	"io/fs"
	"iter"
	"maps"
	"math/big"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory/memory"
)

// moduli are the moduli of lots, with their names.
func moduli(lots []memory.Lot) iter.Seq2[string, *big.Int] {
	return func(yield func(string, *big.Int) bool) {
		for _, l := range lots {
			if !yield(l.Name, l.Modulus) {
				return
			}
		}
	}
}

// publishedLots gives all lots of the directory, and those that the line remembers and that are not there: otherwise,
// with a wrong directory, their IMEIs would be given out twice. It reads only manifests that were not verified before.
func (l *Line) publishedLots(ctx context.Context) (all []memory.Lot, err error) {
	known, err := memory.Open(ctx, l.state.Dir, l.Manufacturer())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, known.Close()) }()
	names, err := l.store.List(ctx, "lots")
	if errors.Is(err, fs.ErrNotExist) && len(known.Lots) == 0 {
		err = nil // the line's first lot makes the directory
	}
	if err != nil {
		return nil, err
	}
	all = make([]memory.Lot, len(names))
	fresh := make([]*directory.Manifest, len(names))
	reading, rctx := errgroup.WithContext(ctx)
	reading.SetLimit(publishers)
	for i, name := range names {
		if lot, ok := known.Lots[name]; ok {
			all[i] = lot
			continue
		}
		reading.Go(func() error {
			m, err := l.reader.Manifest(rctx, name)
			if errors.Is(err, directory.ErrNotFound) {
				return nil // its folder exists, but its manifest was never published
			}
			if fresh[i] = m; err == nil {
				all[i] = memory.Lot{Name: name, Ranges: m.Ranges, Modulus: m.PublicKey().N}
			}
			return err
		})
	}
	if err := reading.Wait(); err != nil {
		return nil, err
	}
	if err := known.Add(ctx, fresh); err != nil {
		return nil, err
	}
	for _, name := range names {
		delete(known.Lots, name)
	}
	all = slices.DeleteFunc(all, func(lot memory.Lot) bool { return lot.Name == "" })
	return slices.AppendSeq(all, maps.Values(known.Lots)), nil
}
