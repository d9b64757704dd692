// Package doctor says what a token can do, whether it refuses what it should, and whether its keys are as they were
// made. It asks the token, tries operations on session objects of its own, which are gone afterwards, and reads
// attributes.
package doctor

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

// A Finding is one line of the doctor's report.
type Finding struct {
	Check string `json:"check"` // the mechanism or key looked at
	For   string `json:"for"`   // what it is needed for
	OK    bool   `json:"ok"`
	// Required is false if there is a replacement.
	Required    bool   `json:"required"`
	Consequence string `json:"consequence,omitempty"` // what follows, where it is not there
	Measured    string `json:"measured,omitempty"`    // how long it takes

	Attributes map[string]bool `json:"attributes,omitempty"` // of a key
}

// Sentences describe, one by one, the findings that are not OK.
func Sentences(findings []Finding) (all []string) {
	for _, f := range findings {
		if what, ok := strings.CutPrefix(f.Check, "refuses "); ok {
			all = append(all, "it does not refuse "+what)
		} else {
			all = append(all, f.Check+": "+f.Consequence)
		}
	}
	return all
}

// Missing is the finding about a key of init that is not there.
func Missing(k keyspec.Key) Finding {
	return Finding{
		Check: fmt.Sprintf("key %q", k.Label()), For: "made by init", Required: true, Consequence: "run init",
	}
}

// Measured says how long an operation takes, which is done n times, or how it fails.
func Measured(check, purpose string, n int, do func() error) Finding {
	f := Finding{Check: check, For: purpose, Required: true}
	start := time.Now()
	for range n {
		if err := do(); err != nil {
			f.Consequence = err.Error()
			return f
		}
	}
	each := time.Since(start) / time.Duration(n)
	f.OK = true
	f.Measured = fmt.Sprintf("%s each, %.0f a second", each.Round(time.Microsecond), float64(time.Second)/float64(each))
	return f
}

// Mechanisms reports those that a side's token needs.
func Mechanisms(ctx context.Context, t *p11.Token, side keyspec.Side) ([]Finding, error) {
	needs := needs[side]
	can, err := p11.Do(ctx, t, "ask for mechanisms", func(*p11.Session) (can []bool, err error) {
		for _, n := range needs {
			has, err := t.Can(n.mech, n.flags)
			if err != nil {
				return nil, err
			}
			can = append(can, has)
		}
		return can, nil
	})
	if err != nil {
		return nil, err
	}
	var report []Finding
	for i, n := range needs {
		f := Finding{Check: n.name, For: n.purpose, OK: can[i], Required: n.fallback == ""}
		if n.mech == pkcs11.CKM_AES_KEY_WRAP_PAD && t.KWP() == p11.AESKWP {
			n.fallback, f.Required = "not needed: CKM_AES_KEY_WRAP_KWP does it", false
		}
		if !can[i] {
			if f.Consequence = n.fallback; f.Required {
				f.Consequence = "not possible with this token"
			}
		}
		report = append(report, f)
	}
	return report, nil
}

// Examine reports the trials, and how the keys are.
func Examine(ctx context.Context, t *p11.Token, side keyspec.Side) ([]Finding, error) {
	tried, err := try(ctx, t, side)
	if err != nil {
		return nil, err
	}
	seen, err := trials(ctx, t, side, (*trial).decryption, (*trial).keys)
	return append(tried, seen...), err
}
