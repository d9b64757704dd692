package overview

import (
	"context"
	"fmt"
	"time"

	"github.com/kmehsm/kmehsm/factory/station"
)

// A Shift is what the people at the line want to know about a lot.
type Shift struct {
	*LotState
	*Work
	Injection *station.Counts `json:"injection,omitempty"` // nil if no station worked here
	Stations  []station.Work  `json:"stations,omitempty"`
	Next      []string        `json:"next"` // what is to be done, the most urgent first
}

// Shift looks at a lot's Work, and at what the stations of the line's folder did.
func (o *Overview) Shift(ctx context.Context, lot *LotState, injection string, now time.Time) (s *Shift, err error) {
	s = &Shift{LotState: lot}
	if s.Work, err = o.Work(ctx, lot, injection, now); err != nil {
		return nil, err
	}
	if s.Injection, s.Stations, err = station.LotWork(ctx, o.state.Dir, lot.Manifest); err != nil {
		return nil, err
	}
	s.Next = s.next(now)
	return s, nil
}

// next is what is to be done, the most urgent first.
func (s *Shift) next(now time.Time) []string {
	lot, todo := s.Lot, []string{}
	add := func(format string, args ...any) { todo = append(todo, fmt.Sprintf(format, args...)) }
	if s.Revoked != nil {
		return append(todo, "nothing: the lot is revoked for good, and gets no more keys and no grant; take its "+
			"devices out of the line")
	}
	missing := s.Devices - s.Published
	switch {
	case s.NoList != "":
		add("factory reconcile %s: the list of revoked devices is not in the directory", lot)
	case now.After(s.NextUpdate):
		add("factory lot refresh %s: the list of revoked devices should have been signed anew by %s", lot,
			s.NextUpdate.Format(time.RFC3339))
	}
	if s.Waiting > 0 {
		add("see whether the directory can be reached: %d devices are made and not published; then factory lot "+
			"provision %s", s.Waiting, lot)
	} else if missing > 0 {
		add("factory lot provision %s: %d devices are not published", lot, missing)
	}
	switch {
	case s.Sealed && len(s.Granted) == 0:
		add("find out whether another folder has granted the lot: as far as this one knows, it is sealed, was " +
			"granted to nobody, and can never be")
	case !s.Sealed && len(s.Granted) == 0 && missing == 0:
		add("factory lot grant %s --operator NAME: nobody has been granted it", lot)
	case !s.Sealed && missing == 0:
		add("factory lot seal %s, when no other operator is to get it", lot)
	}
	if d := s.Injection; d != nil {
		if d.Failed+d.Overdue > 0 {
			add("factory station report %s: %d devices have failed, and %d are overdue", lot, d.Failed, d.Overdue)
		}
		if ready := s.Published - (d.Devices - d.Waiting); ready > 0 {
			add("stations: %d published devices wait for their injection", ready)
		}
	} else if s.Published > 0 {
		add("factory station serve, or take the packages to the fixtures: %d devices are published", s.Published)
	}
	if len(todo) == 0 {
		add("nothing: the lot is done")
	}
	return todo
}
