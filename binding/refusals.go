package binding

import (
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"sync"
	"time"

	"github.com/kmehsm/kmehsm/kme"
)

// A PastRefusal is the last call about a subscription that was refused. The cause is for administrators: no caller
// learns it.
type PastRefusal struct {
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

// Refusals remembers the last refusal of each subscription, of those that were refused last. Nothing is decided by it.
type Refusals struct {
	mu          sync.Mutex
	last, older map[kme.IMSI]PastRefusal // guarded by mu
	changed     bool                     // guarded by mu: since the last Save
}

// maxRefusals bounds the memory: last and older have so many each.
const maxRefusals = 5000

func (r *Refusals) put(p PastRefusal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.last[p.IMSI]; r.last == nil || !known && len(r.last) >= maxRefusals {
		r.older, r.last = r.last, map[kme.IMSI]PastRefusal{}
	}
	r.last[p.IMSI], r.changed = p, true
}

// Of is the last refusal of a subscription; nil if none is known.
func (r *Refusals) Of(imsi kme.IMSI) *PastRefusal {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, known := range []map[kme.IMSI]PastRefusal{r.last, r.older} {
		if p, ok := known[imsi]; ok {
			return &p
		}
	}
	return nil
}

// Save gives what is remembered, for Load; nil if that has not changed since the last Save.
func (r *Refusals) Save() ([]byte, error) {
	r.mu.Lock()
	if !r.changed {
		r.mu.Unlock()
		return nil, nil
	}
	r.changed = false
	all := make([]PastRefusal, 0, len(r.last)+len(r.older))
	for imsi, p := range r.older {
		if _, again := r.last[imsi]; !again {
			all = append(all, p)
		}
	}
	for _, p := range r.last {
		all = append(all, p)
	}
	r.mu.Unlock()
	slices.SortFunc(all, func(a, b PastRefusal) int { return a.Time.Compare(b.Time) })
	return json.Marshal(all)
}

// Load remembers what was saved.
func (r *Refusals) Load(saved []byte) error {
	var all []PastRefusal
	if err := json.Unmarshal(saved, &all); err != nil {
		return err
	}
	for _, p := range all {
		r.put(p)
	}
	return nil
}

// remember notes a refusal that is logged with attributes, if they name a subscription.
func (s *Service) remember(client string, r *Refusal, attrs []any) {
	p := PastRefusal{Time: s.times.Now().UTC(), Reason: r.Reason, Message: r.Message, Client: client}
	if r.Cause != nil {
		p.Cause = r.Cause.Error()
	}
	for i := 0; i+1 < len(attrs); i += 2 {
		switch attrs[i] {
		case "imsi":
			p.IMSI, _ = attrs[i+1].(kme.IMSI)
		case "imei":
			p.IMEI = fmt.Sprint(attrs[i+1])
		case "origin":
			p.Origin = fmt.Sprint(attrs[i+1])
		case "call":
			p.Call = fmt.Sprint(attrs[i+1])
		}
	}
	switch path.Base(p.Call) { // an administrator's question is none of the network's calls
	case "get", "list", "open", "revoke", "GetBinding", "ListBindings", "OpenProvisioning", "RevokeBinding":
		return
	}
	if p.IMSI != (kme.IMSI{}) {
		s.refusals.put(p)
	}
}
