package factory

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory/shard"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/handover"
)

// A Difference is a place where journal, injection packages, directory and token do not agree.
type Difference struct {
	Shard  int    `json:"shard"` // -1: of the lot as a whole
	What   string `json:"what"`
	Remedy string `json:"remedy"`
	// Reconcile can do it: that loses no key, and publishes only keys of whole packages
	Safe     bool `json:"safe"`
	Repaired bool `json:"repaired"`
	repair   func(context.Context) error
}

const objectBack = "whoever runs the directory must bring the object back as it was, from a backup; " +
	"it cannot be published anew in its place"

// A Reconciliation is what Reconcile found.
type Reconciliation struct {
	Lot         string          `json:"lot"`
	Agreed      int             `json:"agreed"`  // shards that are everywhere, and everywhere the same
	Pending     int             `json:"pending"` // shards that are nowhere yet: lot provision makes them
	Differences []Difference    `json:"differences"`
	issued      map[string]bool // paths of the packages of reissued keys; nil if there is no list of revocations
}

// Open is how many differences are left.
func (r *Reconciliation) Open() (n int) {
	for _, d := range r.Differences {
		if !d.Repaired {
			n++
		}
	}
	return n
}

// differs adds a difference of the lot as a whole; repair is nil if Reconcile cannot repair it.
func (r *Reconciliation) differs(what, remedy string, repair func(context.Context) error) {
	r.Differences = append(r.Differences, Difference{Shard: -1, What: what, Remedy: remedy, Safe: repair != nil,
		repair: repair})
}

// Reconcile compares what the journal, the injection packages below out, the directory and the token have of a lot, and
// says of each difference what is to be done. With repair it does what is safe. No other process may work on the lot in
// these folders.
func (l *Line) Reconcile(ctx context.Context, lot, out string, repair bool) (*Reconciliation, error) {
	m, err := l.Lot(ctx, lot)
	if err != nil {
		return nil, err
	}
	j, err := l.state.journal(ctx, l.Manufacturer())
	if err != nil {
		return nil, err
	}
	defer j.Close()
	entries, err := j.Entries(ctx, lot)
	if err != nil {
		return nil, err
	}
	r := &Reconciliation{Lot: lot, Differences: []Difference{}}
	if err := l.token.ProveLotKey(ctx, l.lotKey(lot), m.PublicKey()); err != nil {
		r.differs(fmt.Sprintf("token: %v", err), "use the token that the lot was made in, or a copy of it: without "+
			"its key, nobody can be granted the lot any more", nil)
	}
	dir := filepath.Join(out, lot)
	if wrong, err := shard.CheckManifest(ctx, l.store, lot, dir); err != nil {
		return nil, err
	} else if wrong != "" {
		r.differs(wrong, "write the directory's there", func(ctx context.Context) error {
			return l.writeManifest(ctx, lot, dir)
		})
	}
	if err := cmp.Or(l.compareRevocations(ctx, r, m, dir), r.strays(m, dir)); err != nil {
		return nil, err
	}
	var mu sync.Mutex // guards r
	err = shard.Each(ctx, m, func(ctx context.Context, n int) error {
		d, pending, err := l.compare(ctx, j, m, n, dir, entries[n])
		mu.Lock()
		defer mu.Unlock()
		switch {
		case err != nil:
			return fmt.Errorf("shard %d of lot %s: %w", n, lot, err)
		case d != nil:
			d.Shard, d.Safe = n, d.repair != nil
			r.Differences = append(r.Differences, *d)
		case pending:
			r.Pending++
		default:
			r.Agreed++
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(r.Differences, func(a, b Difference) int { return a.Shard - b.Shard })
	for i := range r.Differences {
		d := &r.Differences[i]
		if !repair || d.repair == nil {
			continue
		}
		switch err := d.repair(ctx); {
		case errors.Is(err, directory.ErrUnavailable) || ctx.Err() != nil:
			return r, fmt.Errorf("%s: it cannot be repaired now: %w", d.What, err)
		case err != nil: // the others can
			d.Remedy, d.Safe = err.Error(), false
			continue
		}
		d.Repaired = true
	}
	return r, nil
}

// strays finds files in the lot's folder that belong to nothing.
func (r *Reconciliation) strays(m *directory.Manifest, dir string) error {
	entries, err := os.ReadDir(dir)
	if durable.Missing(err) {
		return nil
	}
	for _, e := range entries {
		name, path, n := e.Name(), filepath.Join(dir, e.Name()), 0
		reissue := strings.HasPrefix(name, "reissue-") && strings.HasSuffix(name, ".jsonl")
		_, serr := fmt.Sscanf(name, "injection-%d.jsonl", &n)
		switch {
		case serr == nil && name == handover.InjectionFile(n) && n < m.Shards(), name == handover.ManifestFile,
			name == durable.LockName, r.issued[path], reissue && r.issued == nil:
		case reissue:
			r.differs(path+" is no package of a published key", "run lot reissue again, with the same reason: it goes "+
				"on, or says what to do with a package that it has not made", nil)
		case strings.HasPrefix(name, "."): // a file that renameio was writing
			r.differs(path+" was left by a run that was killed", "remove it: it never was a package",
				func(context.Context) error { return errors.Join(os.Remove(path), durable.SyncDir(dir)) })
		default:
			r.differs(path+" belongs to nothing in the lot", "find out where it comes from, and take it away", nil)
		}
	}
	return err
}

// compareRevocations looks at a lot's list of revoked devices and its parts, and at the packages of reissued keys.
func (l *Line) compareRevocations(ctx context.Context, r *Reconciliation, m *directory.Manifest, dir string) error {
	isRefused := func(err error) bool {
		refused, ok := errors.AsType[*directory.RefusedError](err)
		switch {
		case ok && refused.Rollback:
			r.differs(fmt.Sprintf("directory: %v", err), "publish the line's copies; what another line has revoked "+
				"since, revoke again", func(ctx context.Context) error { return l.guard.PutBack(ctx, m.Lot) })
		case ok:
			r.differs(fmt.Sprintf("directory: %v", err), objectBack, nil)
		}
		return ok
	}
	list, err := l.Revocations(ctx, m)
	if errors.Is(err, directory.ErrNotFound) {
		bare, berr := l.bare(ctx, m)
		what := "directory: " + directory.RevocationsPath(m.Lot) + " is not there"
		if bare {
			r.differs(what, "publish it: lot create was killed before it did",
				func(ctx context.Context) error { return l.beginRevocations(ctx, m, directory.DefaultValidity) })
		} else {
			r.differs(what, objectBack+"; a lot of before lots had it from the start gets one by factory lot refresh "+
				"--begin", nil)
		}
		return berr
	}
	if isRefused(err) {
		return nil
	}
	if err != nil {
		return err
	}
	parts, _, err := l.reader.RevocationParts(ctx, m, list)
	if err != nil {
		return err
	}
	var behind []int
	r.issued = map[string]bool{}
	for _, n := range parts {
		part, complete, err := l.reader.CompareRevocationPart(ctx, m, list, n)
		if isRefused(err) {
			continue
		}
		if err != nil {
			return err
		}
		if !complete {
			behind = append(behind, n)
		}
		for path, e := range handover.Reissues(part.Revoked, dir) {
			r.issued[path] = true
			if err := handover.CheckReissue(m.Lot, path, e); err != nil {
				r.differs(err.Error(), handover.BringBack(e.Package), nil)
			}
		}
	}
	if len(behind) > 0 {
		r.differs(fmt.Sprintf("a run of lot revoke or lot reissue was killed: the list of revocations does not name "+
			"what %d of its parts have", len(behind)), "publish the list anew", func(ctx context.Context) error {
			return directory.CompleteRevocations(ctx, l.store, l.signer, m, behind, time.Now())
		})
	}
	return nil
}

// compare gives the difference of a shard; nil if there is none.
func (l *Line) compare(
	ctx context.Context, j *shard.Journal, m *directory.Manifest, n int, dir string, e shard.Entry,
) (d *Difference, pending bool, err error) {
	there, err := l.reader.ReadShard(ctx, m, n)
	if errors.As(err, new(*directory.RefusedError)) {
		return &Difference{What: fmt.Sprintf("directory: %v", err), Remedy: objectBack}, false, nil
	}
	if err != nil && !errors.Is(err, directory.ErrNotFound) {
		return nil, false, err
	}
	v := shard.Look(m, n, dir, there, e)
	d = new(Difference)
	d.What, d.Remedy = v.Describe()
	switch v.Standing() {
	case shard.Agreed:
		return nil, false, nil
	case shard.Unmade:
		return nil, true, nil
	case shard.Unrecorded, shard.Misrecorded:
		d.repair = func(context.Context) error { return j.Acknowledged(m.Lot, n, v.Packed.Package) }
	case shard.Made, shard.Lost:
		d.repair = func(ctx context.Context) error {
			jws, err := l.signer.Sign(directory.TypeShard, v.Packed)
			if err == nil {
				err = j.Generated(m.Lot, n, v.Packed.Package, jws)
			}
			if err == nil {
				err = directory.PublishSigned(ctx, l.store, directory.ShardPath(m.Lot, n), l.verifier,
					directory.TypeShard, jws)
			}
			if err == nil {
				err = j.Acknowledged(m.Lot, n, v.Packed.Package)
			}
			return err
		}
	case shard.Remnant:
		d.repair = func(context.Context) error { return errors.Join(os.Remove(v.Path), durable.SyncDir(dir)) }
	}
	return d, false, nil
}
