package binding

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kmehsm/kmehsm/kme"
)

// A Listing is an entry of the operator's own list. It is about all IMEIs that begin with its prefix, unless there is
// an entry with a longer prefix of theirs.
type Listing struct {
	Prefix string          `json:"prefix"` // 0 to 14 digits
	Status EquipmentStatus `json:"status"` // empty: it was removed
	Reason string          `json:"reason,omitempty"`
	Listed time.Time       `json:"listed_at"`
	Change int64           `json:"-"` // which of the list's changes has made it what it is; they count up from 1
}

// Listings keep the operator's own list.
type Listings interface {
	// List enters entries. Each replaces the one with the same prefix. It gives how many have changed the list: an
	// entry that is there already, and the removal of one that is not, change nothing.
	List(ctx context.Context, all []Listing) (changed int, err error)
	// Listed gives the entries that were changed or removed after a given change. After 0 it gives all, and compares
	// them with the ledger.
	Listed(ctx context.Context, after int64) ([]Listing, error)
}

// ListingSubject is the subject of an entry of the ledger about an entry of the operator's list.
func ListingSubject(prefix string) string { return "equipment " + prefix }

// LongestPrefix gives the entry of a list that counts for a device: of the entries whose prefixes its IMEI begins with,
// the one with the longest. entry looks up the entry of a prefix. ok is false if the list has no such entry.
func LongestPrefix[E any](imei kme.IMEI, entry func(prefix string) (E, bool)) (e E, ok bool) {
	digits := imei.String()
	for n := len(digits); n >= 0 && !ok; n-- {
		e, ok = entry(digits[:n])
	}
	return e, ok
}

// A listed is the operator's list in memory: some 50 bytes for each entry.
type listed struct {
	store   Listings    // nil: there is no list
	failing atomic.Bool // the last load has failed

	mu       sync.RWMutex
	statuses map[uint64]EquipmentStatus // guarded by mu: by prefixKey
	lengths  [kme.IMEIDigits + 1]int    // guarded by mu: how many prefixes have so many digits
	change   int64                      // guarded by mu: the last that is in it
	err      error                      // guarded by mu: why CheckEquipment is refused
}

var errNotLoaded = errors.New("the operator's list of devices was not read yet")

func newListed(store Listings) *listed {
	l := &listed{store: store, statuses: map[uint64]EquipmentStatus{}}
	if store != nil {
		l.err = errNotLoaded
	}
	return l
}

// prefixKey is a number of at most 14 digits with their count: those of 14 digits need 47 bits.
func prefixKey(digits string) uint64 {
	n, _ := strconv.ParseUint(digits, 10, 64)
	return uint64(len(digits))<<48 | n
}

// load reloads what was changed since the last time. If it fails, the list in memory stands, unless the stored one is
// damaged or rolled back: in an earlier store, later changes have numbers that the list in memory has, too.
func (l *listed) load(ctx context.Context) (changes int, err error) {
	if l.store == nil {
		return 0, nil
	}
	l.mu.RLock()
	after := l.change
	if l.err != nil {
		after = 0
	}
	l.mu.RUnlock()
	all, err := l.store.Listed(ctx, after)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		if l.err != nil || IsDamaged(err) || errors.Is(err, ErrRolledBack) {
			l.err = err
		}
		return 0, err
	}
	l.err = nil
	if after == 0 { // all entries: what is not among them is gone, as after a restore from a backup
		l.statuses, l.lengths, l.change = map[uint64]EquipmentStatus{}, [kme.IMEIDigits + 1]int{}, 0
	}
	for _, e := range all {
		key := prefixKey(e.Prefix)
		if _, there := l.statuses[key]; there {
			l.lengths[len(e.Prefix)]--
			delete(l.statuses, key)
		}
		if e.Status != "" {
			l.lengths[len(e.Prefix)]++
			l.statuses[key] = e.Status
		}
		l.change = max(l.change, e.Change)
	}
	return len(all), nil
}

// of is the status that the list gives a device. ok is false if it has none.
func (l *listed) of(imei kme.IMEI) (status EquipmentStatus, ok bool, err error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.err != nil {
		return "", false, l.err
	}
	status, ok = LongestPrefix(imei, func(prefix string) (status EquipmentStatus, ok bool) {
		if l.lengths[len(prefix)] > 0 {
			status, ok = l.statuses[prefixKey(prefix)]
		}
		return status, ok
	})
	return status, ok, nil
}

// LoadListings reloads the operator's list, which CheckEquipment answers by. CheckEquipment is refused until
// LoadListings has succeeded once, and while the list is damaged or the store is rolled back.
func (s *Service) LoadListings(ctx context.Context) error {
	changes, err := s.listed.load(ctx)
	if failed := s.listed.failing.Swap(err != nil); err != nil {
		if !failed { // once
			s.log.ErrorContext(ctx, "the operator's list of devices cannot be read", "cause", err.Error())
		}
		return err
	}
	if changes > 0 {
		s.log.InfoContext(ctx, "the operator's list of devices has changed", "entries", changes)
	}
	return nil
}

// ListingsFailed says whether the last LoadListings has failed.
func (s *Service) ListingsFailed() bool { return s.listed.failing.Load() }

// FollowListings is LoadListings again and again, until ctx ends.
func (s *Service) FollowListings(ctx context.Context, every time.Duration) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(every):
			s.LoadListings(ctx)
		}
	}
}
