package hsmkeys

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"
)

// Here is tried what the secrecy of keys rests on. Each trial does what whoever has the user PIN could do, to objects
// of a session of its own that are gone afterwards, and is a Finding: that the token refuses it.

// Weaknesses are the trials that a token fails on which a side's keys rest. No key of the token is touched.
func (t *Token) Weaknesses(ctx context.Context, side Side) (weak []Finding, err error) {
	report, err := t.try(ctx, side)
	if err != nil {
		return nil, err
	}
	for _, f := range report {
		if f.Required && !f.OK {
			weak = append(weak, f)
		}
	}
	return weak, nil
}

// try makes all trials on which a side's keys rest.
func (t *Token) try(ctx context.Context, side Side) ([]Finding, error) {
	if side == Factory {
		return t.trials(ctx, side, (*trial).leaving, (*trial).weakening, (*trial).lotLike, (*trial).strangers)
	}
	return t.trials(ctx, side, (*trial).leaving, (*trial).weakening, (*trial).unwrapping, (*trial).strangers)
}

// trials makes some trials, each on a session of its own.
func (t *Token) trials(ctx context.Context, side Side, all ...func(*trial)) ([]Finding, error) {
	var report []Finding
	for _, f := range all {
		found, err := do(ctx, t, "try the token", func(*session) ([]Finding, error) {
			x, err := t.newTrial(side)
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
	t      *Token
	s      *session
	side   Side
	backup bool // what is tried is what a backup rests on, and no other secrecy: see traits
	report []Finding
	err    error // the token is away: nothing more is tried
}

// newTrial opens a session for trials. Whatever is made in it ends with it: SoftHSM 2.6.1 leaves objects behind of
// calls that it refuses.
func (t *Token) newTrial(side Side) (*trial, error) {
	s, err := t.openSession()
	return &trial{t: t, s: s, side: side}, err
}

func (x *trial) end() { x.s.CloseSession(x.s.h) }

// here makes a template of an object of the session.
func here(parts ...attributes) attributes {
	return append(join(parts...), attr(pkcs11.CKA_TOKEN, false))
}

// An answer is what a token did of what it should not: with no error, it has done it.
type answer = error

// has is the answer of a token that made or changed an object: with CKR_OK, many leave it as it was, or make another
// than they were told to. It has done it if the object's attribute has the value.
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

// flag is a boolean attribute; not there, it is false.
func (x *trial) flag(h pkcs11.ObjectHandle, attribute uint) (value, there bool) {
	a, err := x.s.GetAttributeValue(x.s.h, h, attributes{attr(attribute, nil)})
	if err != nil {
		x.away(err)
		return false, false
	}
	return isTrue(a[0]), len(a[0].Value) == 1
}

// away remembers an error that says nothing of what was tried.
func (x *trial) away(err error) bool {
	if c := classify(err); c == classDevice || c == classSession || c == classTransient {
		if x.err == nil {
			x.err = explain("try the token", err)
		}
	}
	return x.err != nil
}

// can enters that the token can do what the trials need. Without it they cannot be made.
func (x *trial) can(what, means string, err error) bool {
	if x.away(err) {
		return false
	}
	if err != nil {
		x.report = append(x.report, Finding{Check: what, For: means, Required: true,
			Consequence: explain("the trials cannot be made", err).Error()})
	}
	return err == nil
}

// refuses enters whether the token refuses something.
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
		case isCKR(err, pkcs11.CKR_MECHANISM_INVALID):
			f.OK, f.Consequence = false, explain("it cannot be tried", err).Error()
		}
	}
	x.report = append(x.report, f)
}

// follows is what follows where a token does what it should not.
func (x *trial) follows() string {
	switch {
	case x.side == Factory:
		return "the token does it: do not use it for lots"
	case x.backup:
		return "the token does it: its storage and ledger key are made so that they never leave it: no backup of them"
	}
	return "the token does it: whoever has its user PIN can have keys of it in clear"
}

// aes makes an AES-256 key of the session.
func (x *trial) aes(parts ...attributes) (pkcs11.ObjectHandle, error) {
	template := here(append(parts, attributes{attr(pkcs11.CKA_PRIVATE, true), attr(pkcs11.CKA_VALUE_LEN, 32)})...)
	return x.s.generate(pkcs11.CKM_AES_KEY_GEN, template)
}

// pair makes an RSA key pair of the session.
func (x *trial) pair(public attributes, private ...attributes) (pub, priv pkcs11.ObjectHandle, err error) {
	return x.s.generatePair(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, public, here(private...))
}

func (x *trial) wrap(m uint, under, key pkcs11.ObjectHandle) ([]byte, error) {
	return x.s.wrap(m, under, key, make([]byte, wrappedRoom))
}

func (x *trial) copy(h pkcs11.ObjectHandle, changes ...*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	return x.s.CopyObject(x.s.h, h, here(changes))
}

// changed is the answer to C_SetAttributeValue, and copied the one to C_CopyObject, with another value of an attribute.
func (x *trial) changed(h pkcs11.ObjectHandle, attribute uint, value bool) answer {
	return x.has(h, x.s.SetAttributeValue(x.s.h, h, attributes{attr(attribute, value)}), attribute, value)
}

func (x *trial) copied(h pkcs11.ObjectHandle, attribute uint, value bool) answer {
	copied, err := x.copy(h, attr(attribute, value))
	return x.has(copied, err, attribute, value)
}

// wrapsAES is the mechanism by which the side wraps AES keys.
func (x *trial) wrapsAES() uint {
	if x.side == Operator {
		return pkcs11.CKM_AES_KEY_WRAP
	}
	return x.t.kwp
}

var (
	unextractable = attributes{attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, false)}
	extractable   = attributes{attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, true)}
	carries       = use(usages, pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP)
	trusted       = attr(pkcs11.CKA_TRUSTED, true)
)

// leaving tries whether a WRAP_WITH_TRUSTED key leaves under a key that the security officer has not made.
func (x *trial) leaving() {
	const means = "keys leave only under a key that the security officer has made TRUSTED"
	x.backup = true
	carrier, err := x.aes(unextractable, carries)
	if !x.can("an AES key that wraps", means, err) {
		return
	}
	plain, err := x.aes(extractable, carries)
	if !x.can("an AES key that is wrapped", means, err) {
		return
	}
	wrapped, err := x.wrap(x.wrapsAES(), carrier, plain)
	if !x.can("wraps an AES key", means, err) {
		return
	}
	key, err := x.aes(leavesUnderTrusted, carries)
	if !x.can("CKA_WRAP_WITH_TRUSTED on a new AES key", means, err) {
		return
	}
	_, err = x.wrap(x.wrapsAES(), carrier, key)
	x.refuses("wrap a WRAP_WITH_TRUSTED key under another", means, err)

	const make = "make a TRUSTED key for the user, "
	aes := attributes{
		attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		attr(pkcs11.CKA_PRIVATE, true),
	}
	value := [32]byte{}
	rand.Read(value[:])
	h, err := x.s.create(here(aes, unextractable, carries, attributes{trusted, attr(pkcs11.CKA_VALUE, value[:])}))
	x.refuses(make+"C_CreateObject", means, x.has(h, err, pkcs11.CKA_TRUSTED, true))
	h, err = x.aes(unextractable, carries, attributes{trusted})
	x.refuses(make+"C_GenerateKey", means, x.has(h, err, pkcs11.CKA_TRUSTED, true))
	// Of what a side does not need, a token that cannot do it refuses it too.
	refused := func(err error) error {
		if isCKR(err, pkcs11.CKR_MECHANISM_INVALID) {
			return errLeft
		}
		return err
	}
	public := here(attributes{attr(pkcs11.CKA_EC_PARAMS, p256Params), attr(pkcs11.CKA_PRIVATE, false), trusted})
	private := here(guarded(false), use(privateUsages, pkcs11.CKA_SIGN))
	h, _, err = x.s.generatePair(pkcs11.CKM_EC_KEY_PAIR_GEN, public, private)
	x.refuses(make+"C_GenerateKeyPair", means, x.has(h, refused(err), pkcs11.CKA_TRUSTED, true))
	h, err = x.s.unwrap(x.wrapsAES(), carrier, wrapped, here(aes, unextractable, carries, attributes{trusted}))
	x.refuses(make+"C_UnwrapKey", means, x.has(h, refused(err), pkcs11.CKA_TRUSTED, true))
	x.refuses(make+"C_CopyObject", means, x.copied(plain, pkcs11.CKA_TRUSTED, true))
	x.refuses(make+"C_SetAttributeValue", means, x.changed(plain, pkcs11.CKA_TRUSTED, true))

	x.refuses("clear CKA_WRAP_WITH_TRUSTED on a copy", means, x.copied(key, pkcs11.CKA_WRAP_WITH_TRUSTED, false))
	x.refuses("clear CKA_WRAP_WITH_TRUSTED", means, x.changed(key, pkcs11.CKA_WRAP_WITH_TRUSTED, false))
}

// weakening tries whether a key can be made more than it was made as.
func (x *trial) weakening() {
	const means = "a key stays what it was made as"
	carrier, err := x.aes(unextractable, use(usages, pkcs11.CKA_WRAP))
	if !x.can("an AES key that never leaves", means, err) {
		return
	}
	x.unreadable("an AES key", pkcs11.CKO_SECRET_KEY, carrier)
	_, err = x.wrap(x.wrapsAES(), carrier, carrier)
	x.refuses("wrap a key that is not EXTRACTABLE", means, err)
	x.refuses("clear CKA_SENSITIVE on a copy", means, x.copied(carrier, pkcs11.CKA_SENSITIVE, false))
	x.refuses("set CKA_EXTRACTABLE on a copy", means, x.copied(carrier, pkcs11.CKA_EXTRACTABLE, true))
	x.refuses("clear CKA_SENSITIVE", means, x.changed(carrier, pkcs11.CKA_SENSITIVE, false))
	x.refuses("set CKA_EXTRACTABLE again", means, x.changed(carrier, pkcs11.CKA_EXTRACTABLE, true))

	single, err := x.aes(unextractable, use(usages, pkcs11.CKA_WRAP), attributes{attr(pkcs11.CKA_COPYABLE, false)})
	if !x.can("an AES key that is not COPYABLE", means, err) {
		return
	}
	_, err = x.copy(single)
	x.refuses("copy a key that is not COPYABLE", means, err)
	// A key that only wraps must not decrypt what it wrapped.
	fixed, err := x.s.generate(pkcs11.CKM_AES_KEY_GEN, frozen(here(unextractable, use(usages, pkcs11.CKA_WRAP),
		attributes{attr(pkcs11.CKA_PRIVATE, true), attr(pkcs11.CKA_VALUE_LEN, 32)})))
	if !x.can("an AES key that is neither MODIFIABLE nor COPYABLE", means, err) {
		return
	}
	x.refuses("change a key that is not MODIFIABLE", means, x.changed(fixed, pkcs11.CKA_DECRYPT, true))
}

// secretAttributes are those that hold a key or a part of it.
var secretAttributes = []struct {
	attribute uint
	name      string
}{
	{pkcs11.CKA_VALUE, "CKA_VALUE"},
	{pkcs11.CKA_PRIVATE_EXPONENT, "CKA_PRIVATE_EXPONENT"},
	{pkcs11.CKA_PRIME_1, "CKA_PRIME_1"},
	{pkcs11.CKA_PRIME_2, "CKA_PRIME_2"},
	{pkcs11.CKA_EXPONENT_1, "CKA_EXPONENT_1"},
	{pkcs11.CKA_EXPONENT_2, "CKA_EXPONENT_2"},
	{pkcs11.CKA_COEFFICIENT, "CKA_COEFFICIENT"},
}

// readable names the secret attributes that the token would give. It is asked how long they are, and none is fetched: a
// token that says a length has failed.
func (x *trial) readable(class uint, h pkcs11.ObjectHandle) (names []string) {
	for _, a := range secretAttributes {
		if class == pkcs11.CKO_SECRET_KEY && a.attribute != pkcs11.CKA_VALUE {
			break
		}
		size, err := x.s.size(h, a.attribute)
		if x.away(err) {
			return nil
		}
		if err == nil && size > 0 {
			names = append(names, a.name)
		}
	}
	return names
}

func (x *trial) unreadable(what string, class uint, h pkcs11.ObjectHandle) {
	var done answer = errLeft
	if len(x.readable(class, h)) > 0 {
		done = nil
	}
	x.refuses("read the value of "+what, "a SENSITIVE key is in clear nowhere but in the token", done)
}

// lotLike tries a key as a lot's.
func (x *trial) lotLike() {
	const means = "P and Q stay in the token, and leave it only for whom they are granted to"
	pub, priv, err := x.pair(rsaPublic(2048), lotTemplate)
	if !x.can("CKA_WRAP_WITH_TRUSTED on a new RSA key", means, err) {
		return
	}
	key, err := readRSA(x.s, pub)
	if !x.can("an RSA key", means, err) {
		return
	}
	x.wrapping(key)
	carrier, err := x.aes(unextractable, use(usages, pkcs11.CKA_WRAP))
	if !x.can("an AES key that wraps", means, err) {
		return
	}
	_, err = x.wrap(x.t.kwp, carrier, priv)
	x.refuses("wrap a lot key under a key that is not TRUSTED", means, err)
	x.unreadable("a lot key", pkcs11.CKO_PRIVATE_KEY, priv)
	_, err = x.copy(priv)
	x.refuses("copy a lot key", means, err)
	x.refuses("make a lot key readable", means, x.changed(priv, pkcs11.CKA_SENSITIVE, false))
	x.refuses("clear CKA_WRAP_WITH_TRUSTED of a lot key", means, x.changed(priv, pkcs11.CKA_WRAP_WITH_TRUSTED, false))

	const sealed = "a sealed lot stays sealed"
	err = x.changed(priv, pkcs11.CKA_EXTRACTABLE, false)
	if !x.can("seals a lot key", sealed, err) {
		return
	}
	_, err = x.wrap(x.t.kwp, carrier, priv)
	x.refuses("wrap a sealed lot key", sealed, err)
	x.refuses("set CKA_EXTRACTABLE of a sealed lot key again", sealed, x.changed(priv, pkcs11.CKA_EXTRACTABLE, true))
}

// wrapping tries keys as those that EnrollKey makes and takes in, whose CKA_WRAP_TEMPLATE says what they wrap. They are
// not TRUSTED, since the user makes them; so the keys that they wrap are not WRAP_WITH_TRUSTED.
func (x *trial) wrapping(key *rsa.PublicKey) {
	const means = "a fixture's or an operator's key receives what is meant for it, and no other key"
	h, err := x.s.create(here(wrappingPublic(key), attributes{trusted}))
	x.refuses("make a TRUSTED RSA key for the user", means, x.has(h, err, pkcs11.CKA_TRUSTED, true))

	id := func(last byte) *pkcs11.Attribute { return attr(pkcs11.CKA_ID, append(make([]byte, 19), last)) }
	secret := func(id *pkcs11.Attribute) (pkcs11.ObjectHandle, error) { // as an injection key
		return x.s.generate(pkcs11.CKM_AES_KEY_GEN, here(extractable, use(usages, pkcs11.CKA_WRAP),
			attributes{attr(pkcs11.CKA_PRIVATE, false), attr(pkcs11.CKA_VALUE_LEN, 32), id}))
	}
	own, err := secret(id(1))
	if !x.can("an AES key that is wrapped", means, err) {
		return
	}
	other, err := secret(id(2))
	if !x.can("an AES key that is wrapped", means, err) {
		return
	}
	names := attributes{attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), id(1)}
	receiver, err := x.s.create(here(wrappingPublic(key), nested(pkcs11.CKA_WRAP_TEMPLATE, names)))
	if !x.can("CKA_WRAP_TEMPLATE on an RSA key", means, err) {
		return
	}
	_, err = x.wrap(oaep, receiver, own)
	if !x.can("wraps a key that CKA_WRAP_TEMPLATE names", means, err) {
		return
	}
	_, err = x.wrap(oaep, receiver, other)
	x.refuses("wrap a key under an RSA key whose CKA_WRAP_TEMPLATE names another", means, err)
	kek, err := x.aes(extractable, use(usages, pkcs11.CKA_WRAP), nested(pkcs11.CKA_WRAP_TEMPLATE, lotKeys))
	if !x.can("CKA_WRAP_TEMPLATE on an AES key", means, err) {
		return
	}
	_, err = x.wrap(x.t.kwp, kek, other)
	x.refuses("wrap an AES key under a KEK whose CKA_WRAP_TEMPLATE names RSA keys", means, err)
}

// unwrapping tries keys as the operator's, whose CKA_UNWRAP_TEMPLATE says what they unwrap.
func (x *trial) unwrapping() {
	const means = "whoever has the user PIN, a grant, an enrolment or a row of the database has no key in clear by it"
	traits, err := x.t.learn(x.s)
	if x.away(err) {
		return
	}
	if !traits.unwrapTemplate {
		const what = "refuses to unwrap a key otherwise than as CKA_UNWRAP_TEMPLATE says"
		x.report = append(x.report, Finding{Check: what, For: means, Required: true,
			Consequence: "it does not know CKA_UNWRAP_TEMPLATE, and keys are made without: " + x.follows()})
		return
	}
	// One pair is both: the transport key, and the lot key that is granted.
	pub, priv, err := x.pair(append(rsaPublic(2048), attr(pkcs11.CKA_WRAP, true)),
		guarded(true), use(privateUsages, pkcs11.CKA_UNWRAP), traits.unwraps(importedKEK))
	if !x.can("CKA_UNWRAP_TEMPLATE on a new RSA key", means, err) {
		return
	}
	kek, err := x.aes(extractable, use(usages, pkcs11.CKA_WRAP))
	if !x.can("an AES key that wraps", means, err) {
		return
	}
	enrolment, err := x.wrap(oaep, pub, kek)
	if !x.can("wraps a KEK", means, err) {
		return
	}
	x.against("a KEK", means, oaep, priv, enrolment, importedKEK, pkcs11.CKA_DECRYPT)
	grant, err := x.wrap(x.t.kwp, kek, priv)
	if !x.can("wraps a lot key", means, err) {
		return
	}
	template := here(importedKEK, attributes{attr(pkcs11.CKA_PRIVATE, true)}, traits.unwraps(importedLot))
	taken, err := x.s.unwrap(oaep, priv, enrolment, template)
	if !x.can("CKA_UNWRAP_TEMPLATE on a KEK that is unwrapped", means, err) {
		return
	}
	x.against("a lot key", means, x.t.kwp, taken, grant, importedLot, pkcs11.CKA_SIGN)
	reads := func(kek pkcs11.ObjectHandle, err error) answer {
		if err != nil {
			return err
		}
		h, err := x.s.unwrap(x.t.kwp, kek, grant, here(with(importedLot, attr(pkcs11.CKA_SENSITIVE, false))))
		return x.has(h, err, pkcs11.CKA_SENSITIVE, false)
	}
	none := &pkcs11.Attribute{Type: pkcs11.CKA_UNWRAP_TEMPLATE}
	x.refuses("forget CKA_UNWRAP_TEMPLATE on a copy", means, reads(x.copy(taken)), reads(x.copy(taken, none)))
	x.refuses("clear CKA_UNWRAP_TEMPLATE", means, reads(taken, x.s.SetAttributeValue(x.s.h, taken, attributes{none})))

	storage, err := x.aes(traits.leaves(), carries, traits.unwraps(unsealed))
	if !x.can("CKA_UNWRAP_TEMPLATE on a storage key", means, err) {
		return
	}
	like := append(without(sealable, pkcs11.CKA_CLASS, pkcs11.CKA_KEY_TYPE), attr(pkcs11.CKA_VALUE_LEN, 32))
	secret, err := x.s.generate(pkcs11.CKM_AES_KEY_GEN, like)
	if !x.can("a key as a KME", means, err) {
		return
	}
	sealed, err := x.wrap(pkcs11.CKM_AES_KEY_WRAP, storage, secret)
	if !x.can("seals a KME", means, err) {
		return
	}
	x.against("a KME", means, pkcs11.CKM_AES_KEY_WRAP, storage, sealed, unsealed, pkcs11.CKA_SIGN)
}

// against tries to unwrap a key as a template forbids it.
func (x *trial) against(
	what, means string, m uint, under pkcs11.ObjectHandle, wrapped []byte, template attributes, usage uint,
) {
	unwrap := func(a attributes) (pkcs11.ObjectHandle, error) { return x.s.unwrap(m, under, wrapped, here(a)) }
	if _, err := unwrap(template); !x.can("unwraps "+what+" as CKA_UNWRAP_TEMPLATE says", means, err) {
		return
	}
	readable, leaves := attr(pkcs11.CKA_SENSITIVE, false), attr(pkcs11.CKA_EXTRACTABLE, true)
	h, err := unwrap(with(template, readable))
	as := []answer{x.has(h, err, pkcs11.CKA_SENSITIVE, false)}
	h, err = unwrap(with(template, leaves))
	as = append(as, x.has(h, err, pkcs11.CKA_EXTRACTABLE, true))
	// What is left out, a token may take from its template.
	h, err = unwrap(without(template, pkcs11.CKA_SENSITIVE, pkcs11.CKA_EXTRACTABLE))
	as = append(as, x.has(h, err, pkcs11.CKA_SENSITIVE, false), x.has(h, err, pkcs11.CKA_EXTRACTABLE, true))
	h, err = unwrap(with(template, attr(usage, true)))
	as = append(as, x.has(h, err, usage, true))
	_, err = unwrap(with(template,
		attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET)))
	x.refuses("unwrap "+what+" otherwise than as CKA_UNWRAP_TEMPLATE says", means, append(as, err)...)
}

// with is a template with other values of some attributes.
func with(template attributes, changes ...*pkcs11.Attribute) attributes {
	out := slices.Clone(template)
	for _, c := range changes {
		at := slices.IndexFunc(out, func(a *pkcs11.Attribute) bool { return a.Type == c.Type })
		if at < 0 {
			out = append(out, c)
		} else {
			out[at] = c
		}
	}
	return out
}

// without is a template without some attributes.
func without(template attributes, types ...uint) attributes {
	left := func(a *pkcs11.Attribute) bool { return slices.Contains(types, a.Type) }
	return slices.DeleteFunc(slices.Clone(template), left)
}

// strangers looks for TRUSTED keys that are not ours: whatever is WRAP_WITH_TRUSTED leaves under them.
func (x *trial) strangers() {
	const means = "keys leave only under a TRUSTED key that an enrolment has made"
	f := Finding{Check: "no TRUSTED key but those of enrolments", For: means, OK: true, Required: true}
	found, err := x.s.findObjects(attributes{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_TRUSTED, true)})
	if x.away(err) {
		return
	}
	var strange []string
	for _, h := range found {
		k, label, err := x.s.whose(h)
		if x.away(err) {
			return
		}
		if err != nil {
			strange = append(strange, fmt.Sprintf("a TRUSTED object that cannot be read (%v)", err))
		} else if !slices.Contains(trustedRoles[x.side], k.Role) {
			strange = append(strange, fmt.Sprintf("a TRUSTED object %q that is not ours", label))
		} else if size, err := x.s.size(h, pkcs11.CKA_WRAP_TEMPLATE); err != nil || size == 0 {
			strange = append(strange, fmt.Sprintf("%s, which wraps anything: it has no CKA_WRAP_TEMPLATE", k))
		}
	}
	if len(strange) > 0 {
		f.OK, f.Consequence = false, "the token has "+strings.Join(strange, "; ")+
			": keys leave to whoever has its other half or its value; the security officer must remove it"
	}
	x.report = append(x.report, f)
}

// trustedRoles are those of the TRUSTED keys that EnrollKey makes.
var trustedRoles = map[Side][]Role{Factory: {RoleKEK, RoleInjection, RoleFixture, RoleOperatorOutgoing}}

// whose says which key of ours an object is, by its label and its CKA_ID; none if it is not.
func (s *session) whose(h pkcs11.ObjectHandle) (k Key, label string, err error) {
	a, err := s.GetAttributeValue(s.h, h, attributes{attr(pkcs11.CKA_LABEL, nil), attr(pkcs11.CKA_ID, nil)})
	if err != nil {
		return Key{}, "", explain("look at a key", err)
	}
	label = string(a[0].Value)
	if k, ok := parseLabel(label); ok && string(a[1].Value) == string(k.ID()) {
		return k, label, nil
	}
	if id := a[1].Value; len(id) >= 4 && label == transportLabel+hex.EncodeToString(id[:4]) {
		return Key{Role: RoleTransport}, label, nil
	}
	return Key{}, label, nil
}

// decryption measures what payloads, and the proof of a new lot key, take most of.
func (x *trial) decryption() {
	const what, means = "raw RSA-2048 decryption", "payloads, and the proof of a new lot key, on one session"
	f := Finding{Check: what, For: means, Required: true}
	_, priv, err := x.pair(rsaPublic(2048), guarded(false), use(privateUsages, pkcs11.CKA_DECRYPT))
	if !x.can("an RSA key", f.For, err) {
		return
	}
	block := make([]byte, 256)
	block[len(block)-1] = 2
	f.measure(20, func() error { _, err := rawDecrypt(x.s, priv, block); return err })
	x.report = append(x.report, f)
}

// traits are what one token does otherwise than another. The templates of keys are chosen by them.
type traits struct {
	unwrapTemplate bool // keys may have a CKA_UNWRAP_TEMPLATE; if not, they are made without
	leavesTrusted  bool // WRAP_WITH_TRUSTED holds, and the user makes no key TRUSTED; if not, no key may leave
}

// unwraps says what a key unwraps.
func (t traits) unwraps(what attributes) attributes {
	if !t.unwrapTemplate {
		return nil
	}
	return nested(pkcs11.CKA_UNWRAP_TEMPLATE, what)
}

// leaves is common to keys that leave the token in a backup, where there can be one.
func (t traits) leaves() attributes {
	if !t.leavesTrusted {
		return unextractable
	}
	return leavesUnderTrusted
}

// learnt are the traits of an operator's token.
func (t *Token) learnt(ctx context.Context) (traits, error) {
	return doAs(ctx, t, Operator, "try the token", t.learn)
}

// learn finds the traits by trial, once. The caller holds a session, so that the module stays.
func (t *Token) learn(*session) (traits, error) {
	if known := t.traits.Load(); known != nil {
		return *known, nil
	}
	x, err := t.newTrial(Operator)
	if err != nil {
		return traits{}, err
	}
	defer x.end()
	x.leaving()
	learnt := traits{leavesTrusted: !slices.ContainsFunc(x.report, func(f Finding) bool { return !f.OK })}
	_, err = x.aes(unextractable, carries, nested(pkcs11.CKA_UNWRAP_TEMPLATE, unsealed))
	learnt.unwrapTemplate = err == nil
	if x.away(err) {
		return traits{}, x.err
	}
	t.traits.Store(&learnt)
	return learnt, nil
}
