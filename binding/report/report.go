// Package report reads many bindings of a store: those of a selection, and those that rest on a key which is not to be
// trusted any more.
package report

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
)

// Each gives binding.Subscription.Latest of all IMSIs that a query asks for, in their order, page by page: there may be
// millions. The query's limit does not count.
func Each(ctx context.Context, store binding.Store, q binding.BindingQuery) iter.Seq2[*binding.Binding, error] {
	const page = 1000
	return func(yield func(*binding.Binding, error) bool) {
		q := q
		for q.Limit = page; ; {
			list, err := store.Bindings(ctx, q)
			if err != nil {
				yield(nil, err)
				return
			}
			for _, b := range list {
				if q.After = b.IMSI.String(); !yield(b, nil) {
					return
				}
			}
			if len(list) < page {
				return
			}
		}
	}
}

// A Selection says which bindings are listed. Its Limit is that of the whole list; 0: there is none.
type Selection struct {
	binding.BindingQuery
	State binding.State // only those in this state; empty for all
	Since time.Time     // only those that were established, activated or revoked at this time or later
}

// Each gives the bindings of a store that are selected, in the order of their IMSIs.
func (q Selection) Each(ctx context.Context, store binding.Store) iter.Seq2[*binding.Binding, error] {
	return func(yield func(*binding.Binding, error) bool) {
		n := 0
		for b, err := range Each(ctx, store, q.BindingQuery) {
			if err == nil && !q.has(b) {
				continue
			}
			n++
			if !yield(b, err) || n == q.Limit {
				return
			}
		}
	}
}

// Count gives how many bindings are selected, by their states. counted is called with how many were so far.
func (q Selection) Count(
	ctx context.Context, store binding.Store, counted func(n int),
) (states map[binding.State]int, n int, err error) {
	states = map[binding.State]int{binding.Pending: 0, binding.Active: 0, binding.Revoked: 0}
	for b, err := range q.Each(ctx, store) {
		if err != nil {
			return nil, 0, err
		}
		states[b.State]++
		n++
		counted(n)
	}
	return states, n, nil
}

func (q Selection) has(b *binding.Binding) bool {
	return (q.State == "" || b.State == q.State) &&
		!(b.Established.Before(q.Since) && b.Activated.Before(q.Since) && b.Revoked.Before(q.Since))
}

// A Suspect is a binding that stands, and why it should not be relied on.
type Suspect struct {
	*binding.Binding
	Doubts []registry.Doubt
}

// Suspects gives all bindings, active and pending, that rest on a key which is not to be trusted any more. It fails
// without the directories of the trusted manufacturers.
func Suspects(ctx context.Context, lots *registry.Lots, store binding.Store, now time.Time) iter.Seq2[Suspect, error] {
	return func(yield func(Suspect, error) bool) {
		if err := lots.ReadManifests(ctx); err != nil {
			yield(Suspect{}, err)
			return
		}
		for b, err := range Each(ctx, store, binding.BindingQuery{Now: now}) {
			var all []*binding.Binding
			if err == nil {
				all, err = standing(ctx, store, b, now)
			}
			for _, b := range all {
				var doubts []registry.Doubt
				if doubts, err = lots.DoubtsOf(ctx, b.Basis()); err != nil {
					break
				}
				if len(doubts) > 0 && !yield(Suspect{Binding: b, Doubts: doubts}, nil) {
					return
				}
			}
			if err != nil {
				yield(Suspect{}, err)
				return
			}
		}
	}
}

// standing gives the pending and active bindings of an IMSI whose latest binding is b.
func standing(ctx context.Context, store binding.Store, b *binding.Binding, now time.Time) ([]*binding.Binding, error) {
	switch b.State {
	case binding.Active:
		return []*binding.Binding{b}, nil
	case binding.Revoked:
		return nil, nil
	}
	sub, err := store.Subscription(ctx, b.IMSI, now)
	if err != nil {
		return nil, err
	}
	all := []*binding.Binding{sub.Active, sub.Pending}
	return slices.DeleteFunc(all, func(b *binding.Binding) bool { return b == nil }), nil
}

// ParseSince gives a time before now: a duration ago, or a date, or a time by RFC 3339.
func ParseSince(text string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339, time.DateOnly} {
		if t, err := time.Parse(layout, text); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("a time ago as 24h or 30m, or a date as 2026-01-31, or 2026-01-31T12:00:00Z, not %q",
		text)
}
