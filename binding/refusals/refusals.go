// Package refusals remembers the last refused call of each subscription, and why it was refused, for explanations.
package refusals

import (
	"encoding/json"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/kmehsm/kmehsm/kme"
)

// A Past is the last call about a subscription that was refused. The cause is for administrators only.
type Past struct {
	IMSI    kme.IMSI   `json:"imsi"`
	Time    time.Time  `json:"time"`
	Call    string     `json:"call"`
	Reason  kme.Reason `json:"reason"`
	Message string     `json:"message"`
	Cause   string     `json:"cause,omitempty"`
	IMEI    string     `json:"imei,omitempty"`
	Origin  string     `json:"origin,omitempty"`
	Client  string     `json:"client,omitempty"`
}

// A Memory has the last refusal of each subscription, for those that were refused most recently. No decision depends on
// it.
type Memory struct {
	mu          sync.Mutex
	last, older map[kme.IMSI]Past // guarded by mu
	puts, saved int               // guarded by mu: how many there were, and had been at the last Save
}

// maxRefusals bounds the memory: last and older have so many each.
const maxRefusals = 5000

// Put replaces what is remembered of the subscription.
func (r *Memory) Put(p Past) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.last[p.IMSI]; r.last == nil || !known && len(r.last) >= maxRefusals {
		r.older, r.last = r.last, map[kme.IMSI]Past{}
	}
	r.last[p.IMSI] = p
	r.puts++
}

// Of is the last refusal of a subscription; nil if none is known.
func (r *Memory) Of(imsi kme.IMSI) *Past {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, known := range []map[kme.IMSI]Past{r.last, r.older} {
		if p, ok := known[imsi]; ok {
			return &p
		}
	}
	return nil
}

// Save writes what is remembered, for Load, unless that has not changed since the last Save that succeeded. It is for
// one goroutine at a time.
func (r *Memory) Save(write func([]byte) error) error {
	r.mu.Lock()
	puts := r.puts
	if puts == r.saved {
		r.mu.Unlock()
		return nil
	}
	all := map[kme.IMSI]Past{}
	maps.Copy(all, r.older)
	maps.Copy(all, r.last)
	r.mu.Unlock()
	text, err := json.Marshal(slices.SortedFunc(maps.Values(all),
		func(a, b Past) int { return a.Time.Compare(b.Time) }))
	if err == nil {
		err = write(text)
	}
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.saved = puts
	return nil
}

// Load remembers what was saved.
func (r *Memory) Load(saved []byte) error {
	var all []Past
	if err := json.Unmarshal(saved, &all); err != nil {
		return err
	}
	for _, p := range all {
		r.Put(p)
	}
	return nil
}
