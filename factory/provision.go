package factory

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory/shard"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/kme"
)

// Progress is how far a Provision is. Its integers are numbers of devices.
type Progress struct {
	Total     int  `json:"total"`     // of the shards that this run is for
	Generated int  `json:"generated"` // of those, the ones whose injection package is whole
	Done      int  `json:"done"`      // of those, the ones whose keys are published, and were read back
	Made      int  `json:"made"`      // the ones that this run made keys for
	Now       int  `json:"now"`       // the ones that this run both made and published, for its rate
	Changed   bool `json:"-"`         // this run has signed some for the directory

	HSM     float64 `json:"hsm_share"`         // of the time of all workers so far, in the token
	Publish float64 `json:"publish_share"`     // of the time of all publishers so far, in the directory
	Waiting string  `json:"waiting,omitempty"` // what the run waits for
}

// ErrInterrupted: part of the lot is still to be done.
var ErrInterrupted = errors.New("interrupted: run the same command again to go on")

func (l *Line) writeManifest(ctx context.Context, lot, dir string) error {
	manifest, _, err := l.store.Read(ctx, directory.ManifestPath(lot))
	if err != nil {
		return err
	}
	if err := durable.WriteFile(filepath.Join(dir, handover.ManifestFile), manifest, 0o600); err != nil {
		return fmt.Errorf("the injection packages cannot be written: %w", err)
	}
	return nil
}

// ProvisionOptions are a Provision's.
type ProvisionOptions struct {
	Fixture  string         // the fixture that the packages are for; may be empty if there is only one
	Out      string         // the folder for the injection packages
	Workers  int            // shards whose keys are made at once; 0: twice the sessions of the token
	From, To int            // the shards to do, To excluded; 0, 0 for all
	Patience time.Duration  // for how long it waits for a directory that is away when all keys are made; 5 minutes if 0
	Report   func(Progress) // called at each change, by one goroutine at a time; may be nil
}

// publishers is how many shards are on their way to the directory at once: enough for a store that commits many
// writes together, as Vault does. Each holds one signed shard.
const publishers = 16

// Provision makes the keys of a lot's devices, shard by shard. A shard's injection package is on disk before its public
// keys are published, so no key is ever published that nobody can inject. The journal has the package's SHA-256 before
// the package is on disk, so no package of others is ever published. The journal has the shard before the directory has
// it, so a shard that was published once never gets other keys
// (docs/decisions/0005-the-journal-before-the-directory.md). What is there already is checked and left as it is, so a
// run goes on where another one stopped.
//
// While the directory is away, the run goes on making keys, which wait in the journal, and says what it waits for. When
// ctx ends, the shards in flight are finished; the error is then ErrInterrupted.
func (l *Line) Provision(ctx context.Context, lot string, o ProvisionOptions) (Progress, error) {
	m, err := l.usable(ctx, lot)
	if err != nil {
		return Progress{}, err
	}
	if o.From == 0 && o.To == 0 {
		o.To = m.Shards()
	}
	if o.From < 0 || o.From >= o.To || o.To > m.Shards() {
		return Progress{}, usage.Errorf("lot %s has the shards 0 to %d", lot, m.Shards()-1)
	}
	injection, err := l.injection(ctx, o.Fixture)
	if err != nil {
		return Progress{}, err
	}
	dir := filepath.Join(o.Out, lot)
	if err := l.resumable(ctx, lot, dir, o.From, o.To); err != nil {
		return Progress{}, err
	}
	if err := cmp.Or(durable.Mkdir(o.Out, 0o700), durable.Mkdir(dir, 0o700)); err != nil {
		return Progress{}, fmt.Errorf("the folder for the injection packages cannot be made: %w", err)
	}
	// Two processes would each make keys for a shard, and the package of one would replace that of the other.
	unlock, err := durable.Lock(dir)
	if err != nil {
		os.Remove(dir) // only an empty one goes
		return Progress{}, err
	}
	defer unlock()
	if err := sweep(dir); err != nil {
		return Progress{}, fmt.Errorf("what a killed run left cannot be removed: %w", err)
	}
	if err := l.writeManifest(ctx, lot, dir); err != nil {
		return Progress{}, err
	}
	if err := l.state.linkPackages(lot, dir); err != nil {
		return Progress{}, fmt.Errorf("the link to the injection packages cannot be made: %w", err)
	}
	j, err := l.state.journal(ctx, l.Manufacturer())
	if err != nil {
		return Progress{}, err
	}
	defer j.Close()
	p := &provisioning{
		Line: l, m: m, injection: injection, j: j, dir: dir, o: o, started: time.Now(),
		backlog: make(chan int, o.To-o.From), allMade: make(chan struct{}),
	}
	return p.run(ctx)
}

// sweep removes what killed runs were writing into a lot's folder. The caller has locked it.
func sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		// renameio puts a dot before the name, and a number behind it.
		name := e.Name()
		if strings.HasPrefix(name, ".injection-") || strings.HasPrefix(name, "."+handover.ManifestFile) {
			err = errors.Join(err, os.Remove(filepath.Join(dir, name)))
		}
	}
	return err
}

// resumable fails if a lot's folder is not there, and packages of shards were made: they are in another one. A new one
// would get the rest of the lot, and be taken for the lot's own.
func (l *Line) resumable(ctx context.Context, lot, dir string, from, to int) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	entries, err := l.state.Entries(ctx, l.Manufacturer(), lot)
	for n := from; n < to && err == nil; n++ {
		if entries[n].State > shard.Planned {
			err = usage.In("out", fmt.Errorf("shard %d of lot %s was made, and there is no folder %s: name the one "+
				"that its package is in, or bring that back", n, lot, dir))
		}
	}
	return err
}

// A provisioning is one run of Provision. Workers bring shards to the journal; publishers bring them from there to the
// directory.
type provisioning struct {
	*Line
	m         *directory.Manifest
	injection hsmkeys.Key
	j         *shard.Journal
	dir       string
	o         ProvisionOptions
	started   time.Time

	entries   map[int]shard.Entry // the journal's, as this run found it; not changed
	published map[int]bool        // shards in the directory, as this run found it; not changed
	next      atomic.Int64
	backlog   chan int      // shards to publish; it has room for all
	allMade   chan struct{} // closed when no worker makes keys any more

	inToken, inDirectory atomic.Int64 // nanoseconds, of all workers and of all publishers

	mu       sync.Mutex
	progress Progress // guarded by mu, which is held while it is reported
}

func (p *provisioning) run(ctx context.Context) (Progress, error) {
	first, _ := p.m.ShardRange(p.o.From)
	last, count := p.m.ShardRange(p.o.To - 1)
	p.progress.Total = last + count - first
	names, err := p.store.List(ctx, directory.ShardsPath(p.m.Lot))
	if err != nil {
		return p.progress, err
	}
	p.published = make(map[int]bool, len(names))
	for _, name := range names {
		if n, err := strconv.Atoi(name); err == nil {
			p.published[n] = true
		}
	}
	if p.entries, err = p.j.Entries(ctx, p.m.Lot); err != nil {
		return p.progress, err
	}
	p.next.Store(int64(p.o.From))

	// What is made is published also when a worker has failed. When publishing has failed for good, nothing more is
	// made.
	keep := context.WithoutCancel(ctx)
	making, mctx := errgroup.WithContext(keep)
	publishing, pctx := errgroup.WithContext(keep)
	for range p.workers() {
		making.Go(func() error {
			for ctx.Err() == nil && mctx.Err() == nil && pctx.Err() == nil {
				n := int(p.next.Add(1)) - 1
				if n >= p.o.To {
					return nil
				}
				if err := p.generate(mctx, n); err != nil {
					return fmt.Errorf("shard %d of lot %s: %w", n, p.m.Lot, err)
				}
			}
			return nil
		})
	}
	for range p.publishers() {
		publishing.Go(func() error {
			for n := range p.backlog {
				if ctx.Err() != nil || pctx.Err() != nil {
					return nil // the journal has it: the next run publishes it
				}
				if err := p.publish(ctx, pctx, n); err != nil {
					return fmt.Errorf("shard %d of lot %s: %w", n, p.m.Lot, err)
				}
			}
			return nil
		})
	}
	failed := making.Wait()
	close(p.allMade)
	close(p.backlog)
	failed = errors.Join(failed, publishing.Wait())
	p.mu.Lock()
	defer p.mu.Unlock()
	if failed == nil && p.progress.Done < p.progress.Total {
		failed = ErrInterrupted
	}
	return p.progress, failed
}

// No more of either than there are shards.
func (p *provisioning) workers() int {
	return max(1, min(cmp.Or(p.o.Workers, 2*p.token.Sessions()), p.o.To-p.o.From))
}
func (p *provisioning) publishers() int { return min(publishers, p.o.To-p.o.From) }

// note changes the progress and reports it.
func (p *provisioning) note(change func(*Progress)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(&p.progress)
	elapsed := float64(time.Since(p.started))
	p.progress.HSM = float64(p.inToken.Load()) / elapsed / float64(p.workers())
	p.progress.Publish = float64(p.inDirectory.Load()) / elapsed / float64(p.publishers())
	if p.o.Report != nil {
		p.o.Report(p.progress)
	}
}

// generate brings one shard to where it is to be published, from wherever it is.
func (p *provisioning) generate(ctx context.Context, n int) error {
	_, devices := p.m.ShardRange(n)
	var there *directory.Shard
	if p.published[n] {
		var err error
		if there, err = p.reader.ReadShard(ctx, p.m, n); err != nil {
			return err
		}
	}
	v, made := shard.Look(p.m, n, p.dir, there, p.entries[n]), 0
	packed := v.Packed
	switch v.Standing() {
	case shard.Agreed:
		p.note(func(r *Progress) { r.Generated += devices; r.Done += devices })
		return nil
	case shard.Unrecorded:
		p.note(func(r *Progress) { r.Generated += devices; r.Done += devices })
		return p.j.Acknowledged(p.m.Lot, n, packed.Package)
	case shard.Made, shard.Lost:
	case shard.Unmade, shard.Remnant:
		var err error
		if packed, err = p.makeShard(ctx, n, v.Path); err != nil {
			return err
		}
		made = devices
	default:
		what, remedy := v.Describe()
		return fmt.Errorf("%s: %s", what, remedy)
	}
	jws, err := p.signer.Sign(directory.TypeShard, packed)
	if err != nil {
		return err
	}
	if err := p.j.Generated(p.m.Lot, n, packed.Package, jws); err != nil {
		return err
	}
	p.note(func(r *Progress) { r.Generated += devices; r.Made += made; r.Changed = true })
	p.backlog <- n
	return nil
}

// publish brings one shard from the journal to the directory, and reads it back. user is the context that the user
// ends.
func (p *provisioning) publish(user, ctx context.Context, n int) error {
	jws, err := p.j.Signed(ctx, p.m.Lot, n)
	if err != nil {
		return err
	}
	path, verifier := directory.ShardPath(p.m.Lot, n), p.verifier
	err = p.patiently(user, ctx, func() error {
		return directory.PublishSigned(ctx, p.store, path, verifier, directory.TypeShard, jws)
	})
	if err != nil {
		return err
	}
	if err := p.j.Published(p.m.Lot, n); err != nil {
		return err
	}
	err = p.patiently(user, ctx, func() error {
		same, err := directory.Published(ctx, p.store, path, verifier, directory.TypeShard, jws)
		if err == nil && !same {
			err = fmt.Errorf("%s was published, and reads back as something else: find out who writes there", path)
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := p.j.Acknowledged(p.m.Lot, n, nil); err != nil {
		return err
	}
	_, devices := p.m.ShardRange(n)
	p.note(func(r *Progress) {
		r.Done += devices
		r.Waiting = ""
		if p.entries[n].State < shard.Generated {
			r.Now += devices
		}
	})
	return nil
}

// patiently calls f again while the directory is away: for as long as keys are being made, and Patience after that.
func (p *provisioning) patiently(user, ctx context.Context, f func() error) error {
	for pause, waited := time.Second, time.Duration(0); ; pause = min(2*pause, 15*time.Second) {
		start := time.Now()
		err := f()
		p.inDirectory.Add(int64(time.Since(start)))
		if !errors.Is(err, directory.ErrUnavailable) {
			return err
		}
		if user.Err() != nil {
			return ErrInterrupted
		}
		select {
		case <-p.allMade:
			if waited += time.Since(start) + pause; waited > cmp.Or(p.o.Patience, 5*time.Minute) {
				return err
			}
		default:
		}
		p.note(func(r *Progress) { r.Waiting = err.Error() })
		select {
		case <-user.Done():
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause/2 + rand.N(pause/2)):
		}
	}
}

// makeLine makes a device's key, as it stands in an injection package.
func (l *Line) makeLine(
	ctx context.Context, m *directory.Manifest, imei kme.IMEI, shard int, injection hsmkeys.Key,
) (line handover.InjectionLine, err error) {
	pub, wrapped, err := l.token.MakeDeviceKey(ctx, m.Suite, injection)
	if err != nil {
		return line, err
	}
	return handover.NewInjectionLine(imei, m.Lot, shard, pub, injection.HexID(), wrapped), nil
}

// makeShard makes the keys of a shard, writes its injection package, and gives what is published of it.
func (p *provisioning) makeShard(ctx context.Context, n int, path string) (*directory.Shard, error) {
	first, count := p.m.ShardRange(n)
	lines := make([]handover.InjectionLine, count)
	for i := range lines {
		imei, start := p.m.IMEI(first+i), time.Now()
		var err error
		lines[i], err = p.makeLine(ctx, p.m, imei, n, p.injection)
		p.inToken.Add(int64(time.Since(start)))
		if err != nil {
			return nil, fmt.Errorf("IMEI %s: %w", imei, err)
		}
	}
	file, hash, err := handover.MarshalPackage(lines...)
	if err != nil {
		return nil, err
	}
	packed, err := handover.NewShard(p.m, n, lines, hash)
	if err != nil {
		return nil, err
	}
	if err := p.j.Plan(p.m.Lot, n, hash); err != nil {
		return nil, err
	}
	if err := durable.WriteFile(path, file, 0o600); err != nil {
		return nil, usage.In("out", fmt.Errorf("the injection package cannot be written; make room or name another "+
			"folder, and run this again: %w", err))
	}
	return packed, nil
}
