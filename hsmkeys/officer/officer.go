// Package officer changes a security officer's PIN, and notes in the token which shares it is in.
package officer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/hsmkeys/pinsource"
)

// A Split names the shares that a security officer's PIN is in.
type Split struct {
	ID        string `json:"split"`
	Threshold int    `json:"threshold"` // how many shares are needed
	Count     int    `json:"count"`     // how many there are
}

// A PIN is the security officer's PIN, and the split whose shares gave it; nil if it is in no shares.
type PIN struct {
	PIN   pinsource.PIN
	Split *Split
}

// ErrPINMaybeSet is in an error after which the token's PIN is either the new one or the one before.
var ErrPINMaybeSet = errors.New("the security officer's PIN may have been changed")

// The token says in data objects (JSON in CKA_APPLICATION), for everybody to read, which split its security officer's
// PIN is in: so no PIN of other shares is ever tried. C_SetPIN and these objects cannot change in one step, so a change
// is announced first:
//
//  1. splitBegun of the new split is made;    2. C_SetPIN;
//  3. splitInForce of the new one is made;    4. the earlier splitInForce is removed, and then splitBegun.
//
// A splitBegun without its splitInForce was interrupted about 2: either PIN may be the token's.
const (
	splitBegun   = "kme so split begun"
	splitInForce = "kme so split"
)

// SplitOf says which split the security officer's PIN is in, nil if none; and which one it may be in since a
// change was interrupted, nil if none was.
func SplitOf(ctx context.Context, t *p11.Token) (inForce, begun *Split, err error) {
	all, err := p11.Do(ctx, t, "ask for the security officer's split", splits)
	if err != nil {
		return nil, nil, err
	}
	if len(all[splitBegun]) > 1 || len(all[splitInForce]) > 1+len(all[splitBegun]) {
		return nil, nil, fmt.Errorf("%s has more objects %q or %q than can be: remove those that are not yours with "+
			"the token's own tool", t, splitBegun, splitInForce)
	}
	for _, o := range all[splitBegun] {
		begun = &o.Split
	}
	for _, o := range all[splitInForce] {
		if begun != nil && o.Split == *begun { // the change was made; what is left of it is removed by the next
			return &o.Split, nil, nil
		}
		inForce = &o.Split
	}
	return inForce, begun, nil
}

type splitObject struct {
	Split
	h pkcs11.ObjectHandle
}

// splits gives the objects by their label.
func splits(s *p11.Session) (map[string][]splitObject, error) {
	all := map[string][]splitObject{}
	for _, label := range []string{splitBegun, splitInForce} {
		found, err := s.Notes(label, ck.Attributes{ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_DATA)})
		if err != nil {
			return nil, p11.Explain("read the security officer's split", err)
		}
		for _, note := range found {
			o := splitObject{h: note.Object}
			if err := json.Unmarshal(note.Text, &o.Split); err != nil || o.ID == "" {
				return nil, fmt.Errorf("the token's object %q is damaged: remove it with the token's own tool", label)
			}
			all[label] = append(all[label], o)
		}
	}
	return all, nil
}

func makeSplit(s *p11.Session, label string, split *Split) error {
	text, err := json.Marshal(split)
	if err != nil {
		return err
	}
	_, err = s.Create(ck.Frozen(ck.Attributes{
		ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), ck.Attr(pkcs11.CKA_TOKEN, true),
		ck.Attr(pkcs11.CKA_PRIVATE, false), ck.Attr(pkcs11.CKA_LABEL, label), ck.Attr(pkcs11.CKA_APPLICATION, text),
	}))
	return p11.Explain("say in the token which split its security officer's PIN is in", err)
}

// settle notes in the token what a login has shown: that the PIN is in this split, or in none.
func settle(s *p11.Session, split *Split) error {
	all, err := splits(s)
	if err != nil {
		return err
	}
	has := func(o splitObject) bool { return split != nil && o.Split == *split }
	if split != nil && !slices.ContainsFunc(all[splitInForce], has) {
		if err := makeSplit(s, splitInForce, split); err != nil {
			return err
		}
	}
	for _, o := range append(slices.DeleteFunc(all[splitInForce], has), all[splitBegun]...) {
		if err := s.Destroy(o.h); err != nil {
			return p11.Explain("remove what the token says of an earlier split", err)
		}
	}
	return nil
}

// CheckPIN logs in as the security officer, and notes in the token which split the PIN is in. So it ends a change that
// was interrupted.
func CheckPIN(ctx context.Context, tokenURI string, pin PIN) error {
	return p11.AsOfficer(tokenURI, pin.PIN, func(t *p11.Token) error {
		return t.With(ctx, "check the security officer's PIN", func(s *p11.Session) error {
			return settle(s, pin.Split)
		})
	})
}

// unchanged are the return codes of C_SetPIN that certainly mean that nothing was changed.
var unchanged = []pkcs11.Error{pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE,
	pkcs11.CKR_PIN_LOCKED, pkcs11.CKR_ARGUMENTS_BAD,
	pkcs11.CKR_SESSION_READ_ONLY, pkcs11.CKR_TOKEN_WRITE_PROTECTED, pkcs11.CKR_USER_NOT_LOGGED_IN,
	pkcs11.CKR_FUNCTION_NOT_SUPPORTED}

// SetPIN changes the security officer's PIN, and logs in anew with the next one. With ErrPINMaybeSet either of
// the two may be the token's, and CheckPIN finds out which; with another error it is the present one.
func SetPIN(ctx context.Context, tokenURI string, present, next PIN) error {
	ctx = context.WithoutCancel(ctx) // a change that has begun is finished
	err := p11.AsOfficer(tokenURI, present.PIN, func(t *p11.Token) error {
		info := t.Info()
		if n := uint(len(next.PIN)); n < info.MinPinLen || n > info.MaxPinLen {
			return fmt.Errorf("%s takes PINs of %d to %d characters, and a new one has %d: its security officer's "+
				"PIN cannot be split", t, info.MinPinLen, info.MaxPinLen, n)
		}
		err := t.With(ctx, "announce the security officer's new PIN", func(s *p11.Session) error {
			if err := settle(s, present.Split); err != nil {
				return err
			}
			return makeSplit(s, splitBegun, next.Split)
		})
		if err != nil {
			return err
		}
		// C_SetPIN is not called twice: the second call's CKR_PIN_INCORRECT would say nothing.
		err = t.Once(ctx, "set the security officer's PIN", func(s *p11.Session) error {
			return s.Ctx.SetPIN(s.ID, string(present.PIN), string(next.PIN))
		})
		if ck.IsCKR(err, unchanged...) {
			return errors.Join(p11.Explain("set the security officer's PIN", err),
				t.With(ctx, "take the announcement back", func(s *p11.Session) error {
					return settle(s, present.Split)
				}))
		}
		if err != nil {
			return fmt.Errorf("%w: %w", ErrPINMaybeSet, err)
		}
		return nil
	})
	if ck.IsCKR(err, pkcs11.CKR_PIN_INCORRECT) {
		err = fmt.Errorf("%w; if factory so split was interrupted before, its shares may be in force: see factory "+
			"so show", err)
	}
	if err != nil {
		return err
	}
	if err := CheckPIN(ctx, tokenURI, next); err != nil {
		return fmt.Errorf("%w: %w", ErrPINMaybeSet, err)
	}
	return nil
}
