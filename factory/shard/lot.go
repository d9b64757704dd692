package shard

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/handover"
)

// Each calls f for the shards of a lot, several at a time, until the first error.
func Each(ctx context.Context, m *directory.Manifest, f func(ctx context.Context, n int) error) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(2 * runtime.GOMAXPROCS(0))
	for n := 0; n < m.Shards() && gctx.Err() == nil; n++ {
		g.Go(func() error { return f(gctx, n) })
	}
	return errors.Join(g.Wait(), ctx.Err())
}

// CheckManifest says what is wrong with the manifest beside the injection packages, if it is there:
// nothing, if it is the directory's.
func CheckManifest(ctx context.Context, store directory.Store, lot, dir string) (wrong string, err error) {
	path := filepath.Join(dir, handover.ManifestFile)
	beside, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return err.Error(), nil
	}
	manifest, _, err := store.Read(ctx, directory.ManifestPath(lot))
	if err == nil && !bytes.Equal(beside, manifest) {
		wrong = path + " is not the lot's manifest as the directory has it"
	}
	return wrong, err
}
