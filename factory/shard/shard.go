// Package shard has the shards of a lot: the journal of their way from the token to the directory, and the comparison
// of injection package, directory and journal.
package shard

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/handover"
)

// A Standing is the result of comparing a shard's injection package, its object in the directory and the journal.
type Standing int

const (
	Unmade         Standing = iota // it was never begun
	Remnant                        // a killed run's: its package is damaged, and nothing of it was published
	Stray                          // it is not published, and the line has not made the package that is there
	Made                           // its package is whole, and it is not published
	Lost                           // as Made, but it was published before
	Unrecorded                     // package and directory agree, and the journal does not say so yet
	Misrecorded                    // package and directory agree, and the journal has another package
	Agreed                         // package, directory and journal agree
	PackageMissing                 // it is published, and its package is missing
	PackageDamaged                 // it is published, and its package is damaged
	PackageOther                   // it is published, and its package is that of other keys
	RecordedBad                    // it is not published, and the package that the journal has is missing or damaged
	RecordedOther                  // it is not published, and its package is another than the journal has
)

// A View is what there is of a shard.
type View struct {
	Path      string           // of its injection package
	Packed    *directory.Shard // what is published of its package; nil if that is missing or damaged
	lot       string
	number    int
	published *directory.Shard // in the directory; nil if it is not
	unread    error            // why Packed is nil
	entry     Entry
}

// Look reads the injection package of a shard in the lot's folder dir, for a comparison with directory and journal.
// published is nil if the directory does not have the shard.
func Look(m *directory.Manifest, n int, dir string, published *directory.Shard, e Entry) *View {
	v := &View{Path: filepath.Join(dir, handover.InjectionFile(n)), lot: m.Lot, number: n,
		published: published, entry: e}
	_, v.Packed, v.unread = handover.ReadPackage(m, n, v.Path)
	return v
}

// Standing is the one decision about a shard, which lot provision, reconcile and lot verify all act on.
func (v *View) Standing() Standing {
	recorded := v.entry.State > Planned // and so its keys may have been published
	same := v.Packed != nil && bytes.Equal(v.entry.Package, v.Packed.Package)
	missing := errors.Is(v.unread, fs.ErrNotExist)
	switch {
	case v.published != nil && missing:
		return PackageMissing
	case v.published != nil && v.Packed == nil:
		return PackageDamaged
	case v.published != nil && !v.published.Equal(v.Packed):
		return PackageOther
	case v.published != nil && recorded && !same:
		return Misrecorded
	case v.published != nil && v.entry.State == Acknowledged:
		return Agreed
	case v.published != nil:
		return Unrecorded
	case recorded && v.Packed == nil:
		return RecordedBad
	case recorded && !same:
		return RecordedOther
	case same && v.entry.State >= Published:
		return Lost
	case same:
		return Made
	case missing:
		return Unmade
	case v.Packed == nil && v.entry.Begun:
		return Remnant
	}
	return Stray
}

// Describe says what differs, and what is to be done; nothing if the shard is Agreed or Unmade.
func (v *View) Describe() (what, remedy string) {
	const lastWay = "; if it is lost for good, factory lot reissue its devices one by one"
	publish := "publish " + directory.ShardPath(v.lot, v.number) + " with the keys of its package"
	switch v.Standing() {
	case PackageMissing:
		return fmt.Sprintf("its keys are published, and %s is missing: there is no such injection package", v.Path),
			fmt.Sprintf("name the folder that it is in, or bring it back, SHA-256 %x: the private keys are "+
				"nowhere else",
				v.published.Package) + lastWay
	case PackageDamaged:
		return fmt.Sprintf("its keys are published, and %v", v.unread), handover.BringBack(v.published.Package) +
			lastWay
	case PackageOther:
		return v.Path + " is not the package of the published keys", handover.BringBack(v.published.Package)
	case Misrecorded:
		return v.Path + " is the package of the published keys, and the journal does not know it, but another",
			fmt.Sprintf("put it down in the journal: factory reconcile %s --repair does", v.lot)
	case Unrecorded:
		return "package and directory agree, and the journal does not know it", "put it down in the journal"
	case RecordedBad:
		return fmt.Sprintf("the journal knows of its keys, it is not published, and %v", v.unread),
			handover.BringBack(v.entry.Package) + ": its keys may have been handed out"
	case RecordedOther:
		return "it is not published, and " + v.Path + " is not the package that the journal knows of",
			handover.BringBack(v.entry.Package)
	case Lost:
		return "it was published, and the directory has lost it", publish
	case Made:
		return "it is made, and not published", publish
	case Remnant:
		return v.unread.Error(), "remove it: nothing of it was published, and lot provision makes the shard anew"
	case Stray:
		return v.Path + " is not published, and the journal does not know it", "find out where it comes from, and " +
			"move it away: its keys are published nowhere, and lot provision makes the shard anew; if devices have " +
			"its keys, first bring back the journal or the directory that has them"
	}
	return "", ""
}
