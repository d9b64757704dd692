package binding

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/kmehsm/kmehsm/kme"
)

// A Listing is an entry of the operator's own list: about all IMEIs that begin with its prefix, but for those that a
// longer one is about.
type Listing struct {
	Prefix string          `json:"prefix"` // 0 to 14 digits
	Status EquipmentStatus `json:"status"` // empty: it was removed
	Reason string          `json:"reason,omitempty"`
	Listed time.Time       `json:"listed_at"`
	Change int64           `json:"-"` // which of the list's changes has made it what it is; they count up from 1
}

// Listings keep the operator's own list.
type Listings interface {
	// List enters entries, each in the place of the one of its prefix. It gives how many that changes: one that says
	// the same stays as it is, and one that is to be removed and is not there is nothing.
	List(ctx context.Context, all []Listing) (changed int, err error)
	// Listed gives the entries that were changed after a change, those that were removed too; after 0 all of them,
	// which it compares with the ledger.
	Listed(ctx context.Context, after int64) ([]Listing, error)
}

// ListingSubject is the subject of an entry of the ledger about an entry of the operator's list.
func ListingSubject(prefix string) string { return "equipment " + prefix }

const imeiDigits = 14

// ParseEquipment gives the prefixes of the IMEIs that a text stands for: an IMEI; a TAC, or FIRST-LAST, two TACs; or
// the first digits, with a * after them.
func ParseEquipment(text string) ([]string, error) {
	digits := func(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }
	first, last, isRange := strings.Cut(text, "-")
	prefix, isPrefix := strings.CutSuffix(text, "*")
	switch {
	case isRange:
		from, err := kme.ParseTAC(first)
		to, err2 := kme.ParseTAC(last)
		if err != nil || err2 != nil || from.String() > to.String() {
			return nil, fmt.Errorf("%q is no range of TACs: it is two of 8 digits, FIRST-LAST", text)
		}
		return prefixes(from.String(), to.String()), nil
	case isPrefix && digits(prefix) && len(prefix) < imeiDigits:
		return []string{prefix}, nil
	case isPrefix:
		return nil, fmt.Errorf("%q is no prefix: it is 1 to 13 digits and a *", text)
	}
	if tac, err := kme.ParseTAC(text); err == nil {
		return []string{tac.String()}, nil
	}
	imei, err := kme.ParseIMEI(text)
	if err != nil {
		return nil, fmt.Errorf("%q is no IMEI, no TAC of 8 digits, no FIRST-LAST of TACs and no DIGITS*: %w", text, err)
	}
	return []string{imei.String()}, nil
}

// prefixes gives the fewest that stand for all numbers from first to last, which have as many digits each.
func prefixes(first, last string) (all []string) {
	if strings.Trim(first, "0") == "" && strings.Trim(last, "9") == "" {
		return []string{""}
	}
	for d := first[0]; d <= last[0]; d++ {
		from, to := strings.Repeat("0", len(first)-1), strings.Repeat("9", len(first)-1)
		if d == first[0] {
			from = first[1:]
		}
		if d == last[0] {
			to = last[1:]
		}
		for _, rest := range prefixes(from, to) {
			all = append(all, string(d)+rest)
		}
	}
	return all
}

// A listed has the operator's list in memory: some 50 bytes an entry.
type listed struct {
	store   Listings    // nil: there is no list
	failing atomic.Bool // the last load has failed

	mu       sync.RWMutex
	statuses map[uint64]EquipmentStatus // guarded by mu: by prefixKey
	lengths  [imeiDigits + 1]int        // guarded by mu: how many prefixes have so many digits
	change   int64                      // guarded by mu: the last that is in it
	err      error                      // guarded by mu: why nothing is said of any device
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

// load takes in what was changed since the last time. If it fails, what is there stands; but not where the list is
// damaged.
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
		if l.err != nil || errors.As(err, new(*DamagedRow)) {
			l.err = err
		}
		return 0, err
	}
	l.err = nil
	if after == 0 { // these are all: nothing else stands, as of a store that was restored from a backup
		l.statuses, l.lengths, l.change = map[uint64]EquipmentStatus{}, [imeiDigits + 1]int{}, 0
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

// of is what the list says of a device: its longest prefix counts. ok is false if it says nothing.
func (l *listed) of(imei kme.IMEI) (status EquipmentStatus, ok bool, err error) {
	digits := imei.String()
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.err != nil {
		return "", false, l.err
	}
	for n, some := range slices.Backward(l.lengths[:]) {
		if some > 0 {
			if status, ok = l.statuses[prefixKey(digits[:n])]; ok {
				return status, true, nil
			}
		}
	}
	return "", false, nil
}

// LoadListings takes in what the operator's list has become, which CheckEquipment answers by: until it has succeeded
// once, and while the list is damaged, that is refused.
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

// ParseStatus takes the status of an entry.
func ParseStatus(text string) (EquipmentStatus, error) {
	switch s := EquipmentStatus(strings.ToUpper(text)); s {
	case Whitelisted, Greylisted, Blacklisted:
		return s, nil
	}
	return "", fmt.Errorf("%q is no status: whitelisted, greylisted or blacklisted", text)
}

// maxReason bounds what an entry says for itself.
const maxReason = 200

// NewListings are the entries of one text of ParseEquipment; without a status, those that remove them.
func NewListings(text string, status EquipmentStatus, reason string, now time.Time) (all []Listing, err error) {
	found, err := ParseEquipment(text)
	if err != nil {
		return nil, err
	}
	if !utf8.ValidString(reason) || strings.ContainsFunc(reason, unicode.IsControl) ||
		utf8.RuneCountInString(reason) > maxReason {
		return nil, fmt.Errorf("a reason has one line of %d characters at most", maxReason)
	}
	for _, p := range found {
		all = append(all, Listing{Prefix: p, Status: status, Reason: reason,
			Listed: now.UTC().Truncate(time.Millisecond)})
	}
	return all, nil
}

// ReadListings reads entries as CSV (RFC 4180), the header equipment,status,reason before them. Of the first line that
// is not good the error has the number.
func ReadListings(r io.Reader, now time.Time) (all []Listing, err error) {
	lines := csv.NewReader(r)
	lines.FieldsPerRecord, lines.ReuseRecord = 3, true
	if head, err := lines.Read(); err != nil || !slices.Equal(head, []string{"equipment", "status", "reason"}) {
		return nil, errors.New("line 1: the list begins with the line equipment,status,reason")
	}
	for {
		fields, err := lines.Read()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, err // which has the line
		}
		line, _ := lines.FieldPos(0)
		status, err := ParseStatus(fields[1])
		var some []Listing
		if err == nil {
			some, err = NewListings(fields[0], status, fields[2], now)
		}
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", line, err)
		}
		all = append(all, some...)
	}
}

// EnterListings enters entries, few at a time: a service's changes wait for no more. What was entered when it fails
// stays, and entering all again goes on from there.
func EnterListings(ctx context.Context, store Listings, all []Listing) (changed int, err error) {
	const together = 200
	for some := range slices.Chunk(all, together) {
		n, err := store.List(ctx, some)
		if changed += n; err != nil {
			return changed, err
		}
	}
	return changed, nil
}
