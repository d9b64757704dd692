// Package overview says how lots stand. It needs no token.
package overview

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/factory/memory"
	"github.com/kmehsm/kmehsm/factory/shard"
	"github.com/kmehsm/kmehsm/internal/handover"
)

// An Overview says how lots stand, by the directory and the line's own folder. It needs no token.
type Overview struct {
	store    directory.Store
	verifier *directory.Verifier
	reader   *directory.Reader
	state    factory.State
}

// New reads a directory, whose signatures it verifies, and a line's folder.
func New(store directory.Store, v *directory.Verifier, state factory.State) *Overview {
	reader := directory.NewReader(store, v, directory.ReaderOptions{})
	return &Overview{store: store, verifier: v, reader: reader, state: state}
}

// A Stage says how far a lot is.
type Stage string

const (
	StagePlanned   Stage = "planned"   // it has its key, and no device is published
	StageBegun     Stage = "in work"   // some are
	StagePublished Stage = "published" // all are, and no operator has been granted the lot
	StageGranted   Stage = "granted"
	StageSealed    Stage = "sealed"
	StageRevoked   Stage = "revoked" // all of it and for good
)

// A LotState is how a lot stands. Whom it was granted to, and whether it is sealed, is known from the line's folder:
// commands with another folder are not in there.
type LotState struct {
	*directory.Manifest
	Stage      Stage                    `json:"stage"`
	Devices    int                      `json:"devices"`   // planned
	Published  int                      `json:"published"` // whose keys the directory has
	Granted    []factory.Granted        `json:"granted"`
	Sealed     bool                     `json:"sealed"`
	SealedAt   time.Time                `json:"sealed_at,omitzero"`
	Revoked    *directory.LotRevocation `json:"revoked,omitempty"`
	Withdrawn  int                      `json:"revoked_devices"`
	Version    int                      `json:"revocations_version"`
	NextUpdate time.Time                `json:"next_update"` // of the list of revoked devices
	NoList     string                   `json:"no_revocations,omitempty"`
}

// Lots gives all lots, and an error at the end if the line's folder remembers others: then it is a wrong directory, or
// one that was damaged.
func (o *Overview) Lots(ctx context.Context) iter.Seq2[*LotState, error] {
	return func(yield func(*LotState, error) bool) {
		all, err := o.reader.Manifests(ctx)
		if err != nil {
			yield(nil, err)
			return
		}
		var published []string
		for _, m := range all {
			if s, err := o.lot(ctx, m); !yield(s, err) || err != nil {
				return
			}
			published = append(published, m.Lot)
		}
		made, err := memory.Names(ctx, o.state.Dir, o.verifier.KeyID())
		if err = errors.Join(append(memory.Missing(made, published), err)...); err != nil {
			yield(nil, err)
		}
	}
}

// Lot gives one.
func (o *Overview) Lot(ctx context.Context, lot string) (*LotState, error) {
	m, err := factory.ReadLot(ctx, o.reader, lot)
	if err != nil {
		return nil, err
	}
	return o.lot(ctx, m)
}

func (o *Overview) lot(ctx context.Context, m *directory.Manifest) (s *LotState, err error) {
	s = &LotState{Manifest: m, Devices: m.Devices()}
	names, err := o.store.List(ctx, directory.ShardsPath(m.Lot))
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if n, err := strconv.Atoi(name); err == nil && n >= 0 && n < m.Shards() {
			_, devices := m.ShardRange(n)
			s.Published += devices
		}
	}
	list, err := o.reader.ReadRevocations(ctx, m)
	if errors.Is(err, directory.ErrNotFound) {
		s.NoList, list, err = err.Error(), new(directory.Revocations), nil
	}
	if err != nil {
		return nil, err
	}
	s.Revoked, s.Version, s.NextUpdate = list.Whole, list.Version, list.NextUpdate
	for _, part := range list.Parts {
		for _, b := range part.Revoked {
			s.Withdrawn += bits.OnesCount8(b)
		}
	}
	if s.Granted, err = o.state.Grants(m.Lot); err != nil {
		return nil, err
	}
	if s.SealedAt, err = o.state.Sealed(m.Lot); err != nil {
		return nil, err
	}
	s.Sealed = !s.SealedAt.IsZero()
	switch {
	case s.Revoked != nil:
		s.Stage = StageRevoked
	case s.Sealed:
		s.Stage = StageSealed
	case s.Published == 0:
		s.Stage = StagePlanned
	case s.Published < s.Devices:
		s.Stage = StageBegun
	case len(s.Granted) == 0:
		s.Stage = StagePublished
	default:
		s.Stage = StageGranted
	}
	return s, nil
}

// MaySeal refuses a lot if something could not be done any more when it is sealed.
func (s *LotState) MaySeal(folder string) error {
	var missing []string
	if s.Published < s.Devices {
		missing = append(missing, fmt.Sprintf("%d of its %d devices are not published", s.Devices-s.Published,
			s.Devices))
	}
	if len(s.Granted) == 0 {
		missing = append(missing, fmt.Sprintf("it was granted to nobody, as far as the folder %s knows", folder))
	}
	if len(missing) == 0 {
		return nil
	}
	return fmt.Errorf("lot %s is not sealed: %s. A sealed lot can be granted to nobody: finish it and grant it first",
		s.Lot, strings.Join(missing, "; "))
}

// SealLoss says what is lost when the lot's key is sealed in a token.
func (s *LotState) SealLoss(token fmt.Stringer) string {
	return fmt.Sprintf("Lot %s, %d of %d devices published, granted to %s: its key can never leave %s again, and no "+
		"other operator can be granted the lot.", s.Lot, s.Published, s.Devices, s.Operators(), token)
}

// Operators names those that the lot was granted to, or nobody.
func (s *LotState) Operators() string {
	if len(s.Granted) == 0 {
		return "nobody"
	}
	names := make([]string, len(s.Granted))
	for i, g := range s.Granted {
		names[i] = g.Operator
	}
	return strings.Join(names, ", ")
}

// Work is how a lot's provisioning goes, by what this machine has of it.
type Work struct {
	Made     int       `json:"made"`     // devices whose injection packages the journal knows
	Waiting  int       `json:"waiting"`  // of those, the ones that are not published
	Packages int       `json:"packages"` // injection packages in the folder
	Last     time.Time `json:"last_made,omitzero"`
	PerHour  float64   `json:"per_hour"` // devices, by the last quarter of an hour
	Left     float64   `json:"seconds_left"`
}

const quarter = 15 * time.Minute

// Work looks at the journal, and at the packages of the lot in a folder.
func (o *Overview) Work(ctx context.Context, s *LotState, injection string, now time.Time) (*Work, error) {
	w, m := new(Work), s.Manifest
	entries, err := o.state.Entries(ctx, o.verifier.KeyID(), m.Lot)
	if err != nil {
		return nil, err
	}
	for n, e := range entries {
		if n < 0 || n >= m.Shards() || e.State < shard.Generated {
			continue
		}
		_, devices := m.ShardRange(n)
		if w.Made += devices; e.State < shard.Published {
			w.Waiting += devices
		}
	}
	var recent []time.Time
	devices := map[time.Time]int{}
	for n := range m.Shards() {
		info, err := os.Stat(filepath.Join(injection, m.Lot, handover.InjectionFile(n)))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		w.Packages++
		at := info.ModTime()
		if at.After(w.Last) {
			w.Last = at
		}
		if now.Sub(at) < quarter {
			_, d := m.ShardRange(n)
			recent = append(recent, at)
			devices[at] += d
		}
	}
	if len(recent) > 1 { // when the first package was begun is not known: it only starts the clock
		first := slices.MinFunc(recent, time.Time.Compare)
		made := -devices[first]
		for _, d := range devices {
			made += d
		}
		if span := now.Sub(first); made > 0 && span > 0 {
			w.PerHour = float64(made) / span.Hours()
			w.Left = float64(max(0, s.Devices-s.Published-w.Waiting)) / w.PerHour * 3600
		}
	}
	return w, nil
}
