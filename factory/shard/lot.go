package shard

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

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

// ParseRange takes FIRST-LAST, both included, and gives the first shard and the one after the last; zeros, which stand
// for all shards, if the text is empty.
func ParseRange(text string) (from, to int, err error) {
	if text == "" {
		return 0, 0, nil
	}
	first, last, ok := strings.Cut(text, "-")
	from, ferr := strconv.Atoi(first)
	to, terr := strconv.Atoi(last)
	if !ok || ferr != nil || terr != nil || from > to {
		return 0, 0, fmt.Errorf("FIRST-LAST, as 0-499, not %q", text)
	}
	return from, to + 1, nil
}
