package doctor

import (
	"context"
	"errors"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

// The trials of what the secrecy of keys depends on. Each trial does what somebody with the user PIN could do, on
// session objects of its own, which are gone afterwards. Its Finding says whether the token refuses it.

// Weaknesses are the failed trials of what a side's keys depend on. No key of the token is touched.
func Weaknesses(ctx context.Context, t *p11.Token, side keyspec.Side) ([]Finding, error) {
	report, err := try(ctx, t, side)
	return slices.DeleteFunc(report, func(f Finding) bool { return f.OK || !f.Required }), err
}

// try runs all trials of what a side's keys depend on.
func try(ctx context.Context, t *p11.Token, side keyspec.Side) ([]Finding, error) {
	if side == keyspec.Factory {
		return trials(ctx, t, side, (*trial).leaving, (*trial).weakening, (*trial).lotLike, (*trial).strangers)
	}
	return trials(ctx, t, side, (*trial).leaving, (*trial).weakening, (*trial).unwrapping, (*trial).strangers)
}

// trials runs some trials, each on a session of its own.
func trials(
	ctx context.Context, t *p11.Token, side keyspec.Side, all ...func(*trial),
) ([]Finding, error) {
	var report []Finding
	for _, f := range all {
		found, err := p11.Do(ctx, t, "try the token", func(*p11.Session) ([]Finding, error) {
			x, err := newTrial(t, side)
			if err != nil {
				return nil, err
			}
			defer x.end()
			f(x)
			return x.report, x.err
		})
		if err != nil {
			return nil, err
		}
		report = append(report, found...)
	}
	return report, nil
}

// A trial is one on one session.
type trial struct {
	t      *p11.Token
	s      *p11.Session
	side   keyspec.Side
	backup bool // only a backup depends on what is tried: see Learn
	report []Finding
	err    error // the token is away: nothing more is tried
}

// newTrial opens a session for trials. All objects that a trial makes end with the session: SoftHSM 2.6.1 leaves
// objects of refused calls behind.
func newTrial(t *p11.Token, side keyspec.Side) (*trial, error) {
	s, err := t.OpenSession()
	return &trial{t: t, s: s, side: side}, err
}

func (x *trial) end() { x.s.Close() }

// An answer is what a token did when it was asked for something that it should refuse. Without an error, it has done
// it.
type answer = error

// has is the answer of a token that made or changed an object. Many tokens return CKR_OK and change nothing, or make
// another object than they were told to. So the token has done it only if the attribute has the value.
func (x *trial) has(h pkcs11.ObjectHandle, err error, attribute uint, value bool) answer {
	if err != nil {
		return err
	}
	if got, _ := x.flag(h, attribute); got != value {
		return errLeft
	}
	return nil
}

var errLeft = errors.New("the token says CKR_OK, and leaves the attribute as it was")

// flag reads a boolean attribute: false if it is not there.
func (x *trial) flag(h pkcs11.ObjectHandle, attribute uint) (value, there bool) {
	a, err := x.s.Get(h, attribute)
	if err != nil {
		x.away(err)
		return false, false
	}
	return ck.IsTrue(a[0]), len(a[0]) == 1
}

// away remembers an error that says nothing about what was tried.
func (x *trial) away(err error) bool {
	if x.err == nil && p11.SaysNothing(err) {
		x.err = p11.Explain("try the token", err)
	}
	return x.err != nil
}

// can notes whether the token can do what the trials need. If not, they cannot be run.
func (x *trial) can(what, means string, err error) bool {
	if x.away(err) {
		return false
	}
	if err != nil {
		x.report = append(x.report, Finding{Check: what, For: means, Required: true,
			Consequence: p11.Explain("the trials cannot be made", err).Error()})
	}
	return err == nil
}

// refuses notes whether the token refuses something.
func (x *trial) refuses(what, means string, answers ...answer) {
	f := Finding{Check: "refuses to " + what, For: means, OK: true, Required: true}
	for _, err := range answers {
		switch {
		case x.away(err):
			return
		case err == nil:
			f.OK, f.Consequence = false, x.follows()
			x.report = append(x.report, f)
			return
		case ck.IsCKR(err, pkcs11.CKR_MECHANISM_INVALID):
			f.OK, f.Consequence = false, p11.Explain("it cannot be tried", err).Error()
		}
	}
	x.report = append(x.report, f)
}

// follows is the consequence if a token does what it should refuse.
func (x *trial) follows() string {
	switch {
	case x.side == keyspec.Factory:
		return "the token does it: do not use it for lots"
	case x.backup:
		return "the token does it: its storage and ledger key are made so that they never leave it: no backup of them"
	}
	return "the token does it: whoever has its user PIN can have keys of it in clear"
}

// aes makes an AES-256 key of the session.
func (x *trial) aes(parts ...ck.Attributes) (pkcs11.ObjectHandle, error) {
	template := ck.InSession(append(parts, ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, true),
		ck.Attr(pkcs11.CKA_VALUE_LEN, 32)})...)
	return x.s.Generate(pkcs11.CKM_AES_KEY_GEN, template)
}

// pair makes an RSA key pair of the session.
func (x *trial) pair(public ck.Attributes, private ...ck.Attributes) (pub, priv pkcs11.ObjectHandle, err error) {
	return x.s.GeneratePair(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, public, ck.InSession(private...))
}

func (x *trial) wrap(m uint, under, key pkcs11.ObjectHandle) ([]byte, error) {
	return x.s.Wrap(m, under, key, make([]byte, keyspec.WrappedRoom))
}

func (x *trial) copy(h pkcs11.ObjectHandle, changes ...*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	return x.s.Copy(h, ck.InSession(changes))
}

// changed tries C_SetAttributeValue, and copied C_CopyObject, with another value of an attribute.
func (x *trial) changed(h pkcs11.ObjectHandle, attribute uint, value bool) answer {
	return x.has(h, x.s.Set(h, ck.Attr(attribute, value)), attribute, value)
}

func (x *trial) copied(h pkcs11.ObjectHandle, attribute uint, value bool) answer {
	copied, err := x.copy(h, ck.Attr(attribute, value))
	return x.has(copied, err, attribute, value)
}

// wrapsAES is the mechanism by which the side wraps AES keys.
func (x *trial) wrapsAES() uint {
	if x.side == keyspec.Operator {
		return pkcs11.CKM_AES_KEY_WRAP
	}
	return x.t.KWP()
}

var (
	extractable = ck.Attributes{ck.Attr(pkcs11.CKA_SENSITIVE, true), ck.Attr(pkcs11.CKA_EXTRACTABLE, true)}
	carries     = ck.Use(ck.Usages, pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP)
	trusted     = ck.Attr(pkcs11.CKA_TRUSTED, true)
)
