package officer

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/hsmkeys/pinsource"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
)

func TestMain(m *testing.M) { softhsmtest.Main(m, 12) }

// officerSplit is SplitOf as any user of the token sees it.
func officerSplit(t *testing.T, tok softhsmtest.Tok) string {
	t.Helper()
	token, err := p11.OpenUser(t.Context(), tok.URI, p11.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer token.Close()
	inForce, begun, err := SplitOf(t.Context(), token)
	if err != nil {
		t.Fatal(err)
	}
	name := func(s *Split) string {
		if s == nil {
			return "none"
		}
		return fmt.Sprintf("%s %d of %d", s.ID, s.Threshold, s.Count)
	}
	return name(inForce) + ", " + name(begun)
}

// asSO does something with the token's objects as the security officer.
func asSO(t *testing.T, tok softhsmtest.Tok, pin pinsource.PIN, f func(*p11.Session) error) {
	t.Helper()
	err := p11.AsOfficer(tok.URI, pin, func(token *p11.Token) error { return token.With(t.Context(), "test", f) })
	if err != nil {
		t.Fatal(err)
	}
}

func TestOfficerPINIsSet(t *testing.T) {
	tok, ctx := softhsmtest.Token(t), t.Context()
	first := PIN{PIN: pinsource.PIN(tok.SOPIN)}
	second := PIN{"SECOND2SECOND2SECOND2SECOND2SECO", &Split{"two", 3, 5}}
	third := PIN{"THIRD3THIRD3THIRD3THIRD3THIRD3TH", &Split{"three", 2, 3}}
	if got := officerSplit(t, tok); got != "none, none" {
		t.Fatal(got)
	}
	for _, step := range []struct {
		present, next PIN
		want          string
	}{{first, second, "two 3 of 5, none"}, {second, third, "three 2 of 3, none"}} {
		if err := SetPIN(ctx, tok.URI, step.present, step.next); err != nil {
			t.Fatal(err)
		}
		if got := officerSplit(t, tok); got != step.want {
			t.Errorf("after it was set: %s, want %s", got, step.want)
		}
		if err := CheckPIN(ctx, tok.URI, step.present); !ck.IsCKR(err, pkcs11.CKR_PIN_INCORRECT) {
			t.Errorf("the PIN before: %v", err)
		}
		if err := SetPIN(ctx, tok.URI, step.present, first); !ck.IsCKR(err, pkcs11.CKR_PIN_INCORRECT) ||
			errors.Is(err, ErrPINMaybeSet) {
			t.Errorf("set with the PIN before: %v", err)
		}
		if err := CheckPIN(ctx, tok.URI, step.next); err != nil {
			t.Errorf("the next PIN: %v", err)
		}
		if got := officerSplit(t, tok); got != step.want {
			t.Errorf("after it was checked: %s, want %s", got, step.want)
		}
	}
	for _, pin := range []pinsource.PIN{"abc", pinsource.PIN(strings.Repeat("A", 300))} { // SoftHSM takes 4 to 255
		err := SetPIN(ctx, tok.URI, third, PIN{pin, &Split{"four", 2, 3}})
		if err == nil || !strings.Contains(err.Error(), "takes PINs of 4 to 255") || errors.Is(err, ErrPINMaybeSet) {
			t.Errorf("a PIN of %d characters: %v", len(pin), err)
		}
	}
	if got := officerSplit(t, tok); got != "three 2 of 3, none" {
		t.Errorf("after PINs of other lengths: %s", got)
	}
	// Back to a PIN in a file, with another tool: whoever then checks it has the token say so.
	asSO(t, tok, third.PIN, func(s *p11.Session) error {
		return s.Ctx.SetPIN(s.ID, string(third.PIN), string(first.PIN))
	})
	if err := CheckPIN(ctx, tok.URI, first); err != nil {
		t.Fatal(err)
	}
	if got := officerSplit(t, tok); got != "none, none" {
		t.Errorf("after another tool: %s", got)
	}
}

// A change that is interrupted after any step can be told from one that was made, and is brought to its end by a login
// with the PIN that is the token's.
func TestOfficerPINInterrupted(t *testing.T) {
	old := PIN{"OLD2OLD2OLD2OLD2OLD2OLD2OLD2OLD2", &Split{"old", 2, 3}}
	next := PIN{"NEXT2NEXT2NEXT2NEXT2NEXT2NEXT2NE", &Split{"new", 3, 5}}
	steps := []func(*p11.Session) error{
		func(s *p11.Session) error { return makeSplit(s, splitBegun, next.Split) },
		func(s *p11.Session) error { return s.Ctx.SetPIN(s.ID, string(old.PIN), string(next.PIN)) },
		func(s *p11.Session) error { return makeSplit(s, splitInForce, next.Split) },
		func(s *p11.Session) error {
			all, err := splits(s)
			if err != nil {
				return err
			}
			for _, o := range all[splitInForce] {
				if o.Split == *old.Split {
					err = errors.Join(err, s.Destroy(o.h))
				}
			}
			return err
		},
	}
	for n, want := range []string{"old 2 of 3, none", "old 2 of 3, new 3 of 5", "old 2 of 3, new 3 of 5",
		"new 3 of 5, none", "new 3 of 5, none"} {
		tok, ctx := softhsmtest.Token(t), t.Context()
		if err := SetPIN(ctx, tok.URI, PIN{PIN: pinsource.PIN(tok.SOPIN)}, old); err != nil {
			t.Fatal(err)
		}
		asSO(t, tok, old.PIN, func(s *p11.Session) error {
			for _, step := range steps[:n] {
				if err := step(s); err != nil {
					return err
				}
			}
			return nil
		})
		if got := officerSplit(t, tok); got != want {
			t.Errorf("after %d steps: %s, want %s", n, got, want)
		}
		has, end := old, "old 2 of 3, none"
		if n >= 2 {
			has, end = next, "new 3 of 5, none"
		}
		if err := CheckPIN(ctx, tok.URI, has); err != nil {
			t.Errorf("after %d steps: %v", n, err)
		}
		if got := officerSplit(t, tok); got != end {
			t.Errorf("after %d steps, checked: %s, want %s", n, got, end)
		}
		again := PIN{"AGAIN2AGAIN2AGAIN2AGAIN2AGAIN2AG", &Split{"again", 2, 2}}
		if err := SetPIN(ctx, tok.URI, has, again); err != nil {
			t.Errorf("after %d steps: %v", n, err)
		}
		if got := officerSplit(t, tok); got != "again 2 of 2, none" {
			t.Errorf("after %d steps, set again: %s", n, got)
		}
	}
}

// Whoever has the user's PIN can remove or forge what the token says of the split; it costs no PIN, and is noticed.
func TestOfficerSplitForged(t *testing.T) {
	tok := softhsmtest.Token(t)
	token, err := p11.OpenUser(t.Context(), tok.URI, p11.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer token.Close()
	user := func(f func(*p11.Session) error) {
		t.Helper()
		if err := token.With(t.Context(), "test", f); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 2 {
		user(func(s *p11.Session) error { return makeSplit(s, splitInForce, &Split{fmt.Sprint("forged", i), 2, 3}) })
	}
	if _, _, err := SplitOf(t.Context(), token); err == nil || !strings.Contains(err.Error(), "more objects") {
		t.Errorf("two splits: %v", err)
	}
	user(func(s *p11.Session) error { return settle(s, nil) })
	user(func(s *p11.Session) error {
		_, err := s.Ctx.CreateObject(s.ID, ck.Attributes{ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_DATA),
			ck.Attr(pkcs11.CKA_TOKEN, true),
			ck.Attr(pkcs11.CKA_PRIVATE, false), ck.Attr(pkcs11.CKA_LABEL, splitInForce),
			ck.Attr(pkcs11.CKA_APPLICATION, "junk")})
		return err
	})
	if _, _, err := SplitOf(t.Context(), token); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("junk: %v", err)
	}
}

func TestOfficerPINPrintsNothing(t *testing.T) {
	pin, err := pinsource.Read("file:" + softhsmtest.Token(t).SOPINFile)
	if err != nil {
		t.Fatal(err)
	}
	o := PIN{PIN: pin}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%q"} {
		if text := fmt.Sprintf(verb, o); strings.Contains(text, string(pin)) ||
			strings.Contains(text, fmt.Sprintf("%x", string(pin))) {
			t.Errorf("%s prints the PIN", verb)
		}
	}
}
