package factory

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/handover"
)

// A standing is how a shard's injection package, its object in the directory and the journal stand to each other.
type standing int

const (
	unmade         standing = iota // there is nothing of it
	remnant                        // a killed run's: its package is damaged, and nothing of it was published
	stray                          // its package is damaged and unpublished, and the journal never began it
	made                           // its package is whole, and it is not published
	lost                           // so, and it was published before
	unrecorded                     // package and directory agree, and the journal does not say so yet
	misrecorded                    // package and directory agree, and the journal has another package
	agreed                         // package, directory and journal agree
	packageMissing                 // it is published, and its package is missing
	packageDamaged                 // it is published, and its package is damaged
	packageOther                   // it is published, and its package is that of other keys
	recordedBad                    // it is not published, and the package that the journal has is missing or damaged
	recordedOther                  // it is not published, and its package is another than the journal has
)

// A view is what there is of a shard.
type view struct {
	lot       string
	number    int
	path      string           // of its injection package
	published *directory.Shard // in the directory; nil if it is not
	packed    *directory.Shard // what is published of its package; nil if that is missing or damaged
	unread    error            // why packed is nil
	entry     entry            // the journal's
}

// look reads the injection package of a shard, in the lot's folder dir, beside what directory and journal have of it.
func look(m *directory.Manifest, n int, dir string, published *directory.Shard, e entry) *view {
	v := &view{lot: m.Lot, number: n, path: filepath.Join(dir, handover.InjectionFile(n)), published: published, entry: e}
	_, v.packed, v.unread = handover.ReadPackage(m, n, v.path)
	return v
}

func (v *view) standing() standing {
	recorded := v.entry.state > planned // and so its keys may have been published
	same := v.packed != nil && v.entry.pkg == string(v.packed.Package)
	missing := errors.Is(v.unread, fs.ErrNotExist)
	switch {
	case v.published != nil && missing:
		return packageMissing
	case v.published != nil && v.packed == nil:
		return packageDamaged
	case v.published != nil && !v.published.Equal(v.packed):
		return packageOther
	case v.published != nil && recorded && !same:
		return misrecorded
	case v.published != nil && v.entry.state == acknowledged:
		return agreed
	case v.published != nil:
		return unrecorded
	case recorded && v.packed == nil:
		return recordedBad
	case recorded && !same:
		return recordedOther
	case v.packed != nil && v.entry.state >= published:
		return lost
	case v.packed != nil:
		return made
	case missing:
		return unmade
	case v.entry.begun:
		return remnant
	}
	return stray
}

// describe says what does not agree, and what is to be done.
func (v *view) describe() (what, remedy string) {
	const lastWay = "; if it is lost for good, factory lot reissue its devices one by one"
	publish := "publish " + directory.ShardPath(v.lot, v.number) + " with the keys of its package"
	switch v.standing() {
	case packageMissing:
		return fmt.Sprintf("its keys are published, and %s is missing: there is no such injection package", v.path), fmt.Sprintf(
			"bring it back from where the line keeps it, SHA-256 %x: the private keys are nowhere else%s", v.published.Package, lastWay)
	case packageDamaged:
		return fmt.Sprintf("its keys are published, and %v", v.unread), handover.BringBack(v.published.Package) + lastWay
	case packageOther:
		return v.path + " is not the package of the published keys", handover.BringBack(v.published.Package)
	case misrecorded:
		return v.path + " is the package of the published keys, and the journal does not know it, but another",
			fmt.Sprintf("put it down in the journal: factory reconcile %s --repair does", v.lot)
	case unrecorded:
		return "package and directory agree, and the journal does not know it", "put it down in the journal"
	case recordedBad:
		return fmt.Sprintf("the journal knows of its keys, it is not published, and %v", v.unread),
			handover.BringBack([]byte(v.entry.pkg)) + ": its keys may have been handed out"
	case recordedOther:
		return "it is not published, and " + v.path + " is not the package that the journal knows of",
			handover.BringBack([]byte(v.entry.pkg))
	case lost:
		return "it was published, and the directory has lost it", publish
	case made:
		return "it is made, and not published", publish
	case remnant:
		return v.unread.Error(), "remove it: nothing of it was published, and lot provision makes the shard anew"
	case stray:
		return fmt.Sprintf("%v, and the journal never began it", v.unread), "it was never published: find out where it " +
			"comes from; if nothing of it was injected, remove the file, and lot provision makes the shard anew"
	}
	return "", ""
}

// eachShard calls f for the shards of a lot, several at a time, until the first error.
func eachShard(ctx context.Context, m *directory.Manifest, f func(ctx context.Context, n int) error) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(2 * runtime.GOMAXPROCS(0))
	for n := 0; n < m.Shards() && gctx.Err() == nil; n++ {
		g.Go(func() error { return f(gctx, n) })
	}
	return errors.Join(g.Wait(), ctx.Err())
}
