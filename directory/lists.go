package directory

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kmehsm/kmehsm/directory/internal/flight"
	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/kme"
)

// A Memory keeps a mark of the last list of revoked devices of each lot, durably, and a copy of the list for the time
// after a restart. The mark says whether the copy is good. Other processes may share it.
type Memory interface {
	Last(ctx context.Context, lot string) (mark ListMark, found bool, err error)
	Note(ctx context.Context, lot string, mark ListMark) error
	Keep(lot string, jws []byte) error
	Kept(lot string) (jws []byte, err error)
}

// A ListMark identifies a list of revoked devices: a manufacturer publishes one list of each version.
type ListMark struct {
	Version int           `json:"version"`
	SHA256  strict.Base64 `json:"sha256"` // of its JWS
}

// A Why says what is wrong with a list of revoked devices.
type Why string

const (
	Failed   Why = "failed"   // the store cannot be read
	Refused  Why = "refused"  // it is not the manufacturer's, or not a list of this lot
	Rollback Why = "rollback" // it is not the last one that was there
	Withheld Why = "withheld" // it is not there, although every lot has one
	Late     Why = "overdue"  // it is past its next_update
)

// Whys are all of them.
func Whys() []Why { return []Why{Failed, Refused, Rollback, Withheld, Late} }

// An Overdue is a list of revoked devices that should have been replaced by a later one, or read again, by now.
type Overdue struct {
	Lot   string
	Why   Why
	Since time.Time // when the list in use was read; zero if there is none
	Cause error     // of the last try
}

func overdueFor(lot string, since time.Time, cause error) Overdue {
	o := Overdue{Lot: lot, Why: Failed, Since: since, Cause: cause}
	var refused *RefusedError
	switch {
	case errors.As(cause, new(*lateError)):
		o.Why = Late
	case errors.Is(cause, ErrNotFound):
		o.Why = Withheld
	case errors.As(cause, &refused):
		if o.Why = Refused; refused.Rollback {
			o.Why = Rollback
		}
	}
	return o
}

type lateError struct{ error }

// A revocationList is the last good list of a lot, and the result of the last try to read it again. A failed try does
// not change its age.
type revocationList struct {
	list    *Revocations      // nil if none was read yet; it does not change
	sum     [sha256.Size]byte // of its JWS
	noted   bool              // the Memory has it
	fetched time.Time
	tried   time.Time
	err     error // of the last try, or that the list is late
}

func (l revocationList) mark() ListMark { return ListMark{Version: l.list.Version, SHA256: l.sum[:]} }
func (l revocationList) failed() bool   { return l.err != nil && !errors.As(l.err, new(*lateError)) }

// Follow reads the lists of revoked devices of these lots now and every RevocationTTL, in the background. It replaces
// an earlier Follow, and goes on until the next one; without lots it ends.
func (r *Reader) Follow(lots []*Manifest) {
	ctx, cancel := context.WithCancel(context.Background())
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.unfollow != nil {
		r.unfollow()
	}
	r.unfollow, r.followed = cancel, map[string]bool{}
	for _, m := range lots {
		r.followed[m.Lot] = true
	}
	if len(lots) > 0 {
		go r.follow(ctx, lots)
	}
}

func (r *Reader) follow(ctx context.Context, lots []*Manifest) {
	for _, m := range lots { // all copies are in use before a store is asked, which may be silent
		if r.o.Memory != nil && ctx.Err() == nil {
			r.recall(ctx, m)
		}
	}
	for ctx.Err() == nil {
		var all errgroup.Group
		all.SetLimit(8)
		for _, m := range lots {
			all.Go(func() error {
				defer panics.Recover(nil) // of who is told
				if ctx.Err() == nil {
					r.Refresh(ctx, m) // Overdue gets a failure
				}
				return nil
			})
		}
		all.Wait()
		select {
		case <-ctx.Done():
		case <-time.After(r.o.RevocationTTL):
		}
	}
}

// Refresh reads a lot's list again, for ReadTimeout at most. If that fails, the last one stays in use, and is overdue.
func (r *Reader) Refresh(ctx context.Context, m *Manifest) error {
	return r.refresh(ctx, m, time.Now())
}

// refresh is Refresh, unless another good read has begun since asked. The first caller keeps and tells that a read has
// failed, unless it has gone before the store had its time.
func (r *Reader) refresh(ctx context.Context, m *Manifest, asked time.Time) error {
	begun := time.Now()
	short, cancel := context.WithTimeout(ctx, r.o.ReadTimeout)
	defer cancel()
	_, err := flight.Do(short, &r.flights, RevocationsPath(m.Lot), func(ctx context.Context) (none bool, err error) {
		last, _ := r.known(m.Lot)
		if last.list != nil && !last.failed() && last.tried.After(asked) {
			return none, nil
		}
		next, err := r.nextList(ctx, m, last)
		if err == nil {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.revocations[m.Lot] = next
		}
		return none, err
	})
	early := time.Since(begun) < r.o.ReadTimeout*9/10 // a lookup's time has begun before
	if errors.Is(ctx.Err(), context.Canceled) || ctx.Err() != nil && early {
		return err
	}
	r.mu.Lock()
	known := r.revocations[m.Lot]
	told := err != nil && known.tried.After(begun)
	if err != nil && !told {
		known.tried, known.err = time.Now(), err
		r.revocations[m.Lot] = known
	}
	r.mu.Unlock()
	if known.err != nil && !told && r.o.Overdue != nil {
		r.o.Overdue(overdueFor(m.Lot, known.fetched, known.err))
	}
	return known.err
}

// known is the last list of a lot, and whether Follow has the lot.
func (r *Reader) known(lot string) (list revocationList, followed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.revocations[lot], r.followed[lot]
}

// recall gives a lot's last list, and which one was noted last. If it has no list yet, the Memory's copy of the one
// noted is taken into use. It is as old as its ThisUpdate.
func (r *Reader) recall(ctx context.Context, m *Manifest) (last revocationList, noted ListMark, err error) {
	defer panics.Recover(&err)
	noted, _, err = r.o.Memory.Last(ctx, m.Lot)
	if last, _ = r.known(m.Lot); last.list != nil || err != nil {
		return last, noted, err
	}
	jws, _ := r.o.Memory.Kept(m.Lot)
	var list *Revocations
	sum := sha256.Sum256(jws)
	if bytes.Equal(sum[:], noted.SHA256) {
		list, _ = parseRevocations(r.verifier, m, jws)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if last = r.revocations[m.Lot]; last.list == nil && list != nil {
		last.list, last.sum, last.noted, last.fetched = list, sum, true, list.ThisUpdate
		r.revocations[m.Lot] = last
	}
	return last, noted, nil
}

// inMemory gives the list if it may be used without reading it again; else nil. The list of a lot that is not followed
// must be read again after RevocationTTL.
func (r *Reader) inMemory(lot string) (*Revocations, error) {
	known, followed := r.known(lot)
	if known.list == nil || !followed && time.Since(known.tried) >= r.o.RevocationTTL {
		return nil, nil
	}
	return known.list, r.unfit(lot, known)
}

// unfit is the error of a list that is older than MaxAge, or is not Strict's.
func (r *Reader) unfit(lot string, known revocationList) error {
	switch {
	case r.o.Strict && known.failed():
		return fmt.Errorf("%w: lot %s: %w", ErrNotCurrent, lot, known.err)
	case r.o.MaxAge == 0:
		return nil
	case known.list == nil:
		return fmt.Errorf("the list of revoked devices of lot %s was not read yet, and max_revocation_age is %s",
			lot, r.o.MaxAge)
	case time.Since(known.fetched) > r.o.MaxAge || time.Since(known.list.NextUpdate) > r.o.MaxAge:
		return fmt.Errorf("the list of revoked devices of lot %s was read %s and was good until %s, and "+
			"max_revocation_age is %s", lot, known.fetched.UTC().Format(time.RFC3339),
			known.list.NextUpdate.Format(time.RFC3339), r.o.MaxAge)
	}
	return nil
}

// Revocations gives a lot's list of revoked devices, as lookups use it. It is read if there is none yet, or if the lot
// is not followed and RevocationTTL has passed. If that fails, the last one stays in use, unless the reader is Strict.
func (r *Reader) Revocations(ctx context.Context, m *Manifest) (*Revocations, error) {
	asked := time.Now().Add(-r.o.RevocationTTL) // a list that another caller reads meanwhile is good enough
	if list, err := r.inMemory(m.Lot); list != nil {
		return list, err
	}
	if err := r.refresh(ctx, m, asked); err != nil && ctx.Err() != nil {
		return nil, err
	}
	known, _ := r.known(m.Lot)
	if known.list == nil && !r.o.Strict {
		return nil, known.err
	}
	if r.o.Strict && known.tried.Before(asked.Add(-r.o.ReadTimeout)) {
		return nil, fmt.Errorf("%w: lot %s: the directory has answered too late", ErrNotCurrent, m.Lot)
	}
	return known.list, r.unfit(m.Lot, known)
}

// nextList reads a lot's list, which must be the last one or a later one, also of those that other processes noted.
func (r *Reader) nextList(ctx context.Context, m *Manifest, last revocationList) (next revocationList, err error) {
	defer panics.Recover(&err) // whatever the store and the Memory do, the last list stays in use
	if r.o.Memory == nil {
		next, _, err = r.readList(ctx, m, last)
		return next, err
	}
	last, noted, away := r.recall(ctx, m) // before the read: what is noted meanwhile may be later
	if last.list == nil && away != nil {
		return next, away
	}
	for range 4 { // another process may note another one
		next, jws, err := r.readList(ctx, m, last)
		if err != nil {
			return next, err
		}
		if away != nil {
			next.fetched, next.err = last.fetched, fmt.Errorf("it may not be the last one that was noted: %w", away)
			return next, nil
		}
		mark := next.mark()
		if err := mark.follows(RevocationsPath(m.Lot), noted); err != nil {
			return next, err
		}
		if mark.Version > noted.Version {
			was := noted.Version
			if noted, _, err = r.o.Memory.Last(ctx, m.Lot); err == nil && noted.Version == was {
				if err = r.o.Memory.Note(ctx, m.Lot, mark); err == nil {
					noted, _, err = r.o.Memory.Last(ctx, m.Lot)
				}
			}
		}
		switch {
		case err != nil && last.list == nil:
			return next, err
		case err == nil && !bytes.Equal(mark.SHA256, noted.SHA256):
			continue
		case err == nil && !next.noted:
			err = r.o.Memory.Keep(m.Lot, jws)
			next.noted = err == nil
		}
		if err != nil { // a later list is used even if the Memory cannot be written
			next.err = fmt.Errorf("the list was accepted, and would be forgotten at a restart: %w", err)
		}
		return next, nil
	}
	return next, errors.New("other processes note other lists again and again")
}

// readList reads a lot's list, which must be the last one of this process or a later one.
func (r *Reader) readList(ctx context.Context, m *Manifest, last revocationList) (next revocationList, jws []byte,
	err error) {
	path, now := RevocationsPath(m.Lot), time.Now() // before the read: what is published meanwhile may not be in it
	jws, _, err = r.store.Read(ctx, path)
	if err != nil {
		return next, jws, err
	}
	next = revocationList{sum: sha256.Sum256(jws), fetched: now, tried: now}
	if last.list != nil && next.sum == last.sum {
		next.list, next.noted = last.list, last.noted
	} else if next.list, err = parseRevocations(r.verifier, m, jws); err != nil {
		return next, jws, err
	}
	if was := last.list; was != nil {
		if err := next.mark().follows(path, last.mark()); err != nil {
			return next, jws, err
		}
		if was.Whole != nil && next.list.Whole == nil {
			return next, jws, rolledBack(path, "it does not revoke the whole lot, as version %d does, which is for "+
				"good: "+askWhy, was.Version)
		}
	}
	if late := next.list.Overdue(now); late != nil {
		next.err = &lateError{error: late}
	}
	return next, jws, nil
}

// follows refuses a list that is earlier than last, or a different one of the same version.
func (l ListMark) follows(path string, last ListMark) error {
	if l.Version < last.Version || l.Version == last.Version && !bytes.Equal(l.SHA256, last.SHA256) {
		return rolledBack(path, "it has version %d, and version %d, another one, was there before: "+askWhy,
			l.Version, last.Version)
	}
	return nil
}

func rolledBack(object, format string, args ...any) error {
	return &RefusedError{Object: object, Reason: fmt.Sprintf(format, args...), Rollback: true}
}

// Overdue gives the lists of revoked devices whose last try to read them has failed, or that are late.
func (r *Reader) Overdue() []Overdue {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []Overdue
	for lot, known := range r.revocations {
		if known.err != nil {
			all = append(all, overdueFor(lot, known.fetched, known.err))
		}
	}
	slices.SortFunc(all, func(a, b Overdue) int { return strings.Compare(a.Lot, b.Lot) })
	return all
}

// A ListState is the state of a lot's list of revoked devices.
type ListState struct {
	Lot        string
	Version    int       // 0 if there is none
	Read       time.Time // when it was last read and good; zero if there is none
	NextUpdate time.Time // by when a later one is due
	Why        Why       // why the last try to read it again has failed; empty if it has not
}

// List gives the state of a lot's list of revoked devices.
func (r *Reader) List(lot string) ListState {
	known, _ := r.known(lot)
	s := ListState{Lot: lot, Read: known.fetched}
	if known.list != nil {
		s.Version, s.NextUpdate = known.list.Version, known.list.NextUpdate
	}
	if known.err != nil {
		s.Why = overdueFor(lot, known.fetched, known.err).Why
	}
	return s
}

// Revoked says whether a device of a lot is revoked, by the list in memory, without waiting. Without a list, no device
// counts as revoked; with a MaxAge, that is an error, and so is a list that is too old, or not Strict's.
func (r *Reader) Revoked(m *Manifest, imei kme.IMEI) (bool, error) {
	known, _ := r.known(m.Lot)
	if err := r.unfit(m.Lot, known); err != nil || known.list == nil {
		return false, err
	}
	position, ok := m.Position(imei)
	return ok && known.list.Revokes(position), nil
}
