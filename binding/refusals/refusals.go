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
	changed     bool              // guarded by mu: since the last Save
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
	r.last[p.IMSI], r.changed = p, true
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

// Save gives what is remembered, for Load; nil if that has not changed since the last Save.
func (r *Memory) Save() ([]byte, error) {
	r.mu.Lock()
	if !r.changed {
		r.mu.Unlock()
		return nil, nil
	}
	r.changed = false
	all := map[kme.IMSI]Past{}
	maps.Copy(all, r.older)
	maps.Copy(all, r.last)
	r.mu.Unlock()
	return json.Marshal(slices.SortedFunc(maps.Values(all), func(a, b Past) int { return a.Time.Compare(b.Time) }))
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
