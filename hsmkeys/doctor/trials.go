package doctor

import (
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

// leaving tries whether a WRAP_WITH_TRUSTED key can be wrapped under a key that the security officer has not made.
func (x *trial) leaving() {
	const means = "keys leave only under a key that the security officer has made TRUSTED"
	x.backup = true
	carrier, err := x.aes(ck.Unextractable, carries)
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
	key, err := x.aes(keyspec.LeavesUnderTrusted, carries)
	if !x.can("CKA_WRAP_WITH_TRUSTED on a new AES key", means, err) {
		return
	}
	_, err = x.wrap(x.wrapsAES(), carrier, key)
	x.refuses("wrap a WRAP_WITH_TRUSTED key under another", means, err)

	const make = "make a TRUSTED key for the user, "
	aes := ck.Attributes{
		ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), ck.Attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		ck.Attr(pkcs11.CKA_PRIVATE, true),
	}
	value := [32]byte{}
	rand.Read(value[:])
	h, err := x.s.Create(ck.InSession(aes, ck.Unextractable, carries,
		ck.Attributes{trusted, ck.Attr(pkcs11.CKA_VALUE, value[:])}))
	x.refuses(make+"C_CreateObject", means, x.has(h, err, pkcs11.CKA_TRUSTED, true))
	h, err = x.aes(ck.Unextractable, carries, ck.Attributes{trusted})
	x.refuses(make+"C_GenerateKey", means, x.has(h, err, pkcs11.CKA_TRUSTED, true))
	// A token that cannot do what its side does not need passes, too.
	refused := func(err error) error {
		if ck.IsCKR(err, pkcs11.CKR_MECHANISM_INVALID) {
			return errLeft
		}
		return err
	}
	public := ck.InSession(ck.Attributes{ck.Attr(pkcs11.CKA_EC_PARAMS, keyspec.P256Params),
		ck.Attr(pkcs11.CKA_PRIVATE, false), trusted})
	private := ck.InSession(ck.Guarded(false), ck.Use(ck.PrivateUsages, pkcs11.CKA_SIGN))
	h, _, err = x.s.GeneratePair(pkcs11.CKM_EC_KEY_PAIR_GEN, public, private)
	x.refuses(make+"C_GenerateKeyPair", means, x.has(h, refused(err), pkcs11.CKA_TRUSTED, true))
	h, err = x.s.Unwrap(x.wrapsAES(), carrier, wrapped,
		ck.InSession(aes, ck.Unextractable, carries, ck.Attributes{trusted}))
	x.refuses(make+"C_UnwrapKey", means, x.has(h, refused(err), pkcs11.CKA_TRUSTED, true))
	x.refuses(make+"C_CopyObject", means, x.copied(plain, pkcs11.CKA_TRUSTED, true))
	x.refuses(make+"C_SetAttributeValue", means, x.changed(plain, pkcs11.CKA_TRUSTED, true))

	x.refuses("clear CKA_WRAP_WITH_TRUSTED on a copy", means, x.copied(key, pkcs11.CKA_WRAP_WITH_TRUSTED, false))
	x.refuses("clear CKA_WRAP_WITH_TRUSTED", means, x.changed(key, pkcs11.CKA_WRAP_WITH_TRUSTED, false))
}

// weakening tries whether a key can be given more rights than it was made with.
func (x *trial) weakening() {
	const means = "a key stays what it was made as"
	carrier, err := x.aes(ck.Unextractable, ck.Use(ck.Usages, pkcs11.CKA_WRAP))
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

	single, err := x.aes(ck.Unextractable, ck.Use(ck.Usages, pkcs11.CKA_WRAP),
		ck.Attributes{ck.Attr(pkcs11.CKA_COPYABLE, false)})
	if !x.can("an AES key that is not COPYABLE", means, err) {
		return
	}
	_, err = x.copy(single)
	x.refuses("copy a key that is not COPYABLE", means, err)
	// A key that only wraps must not decrypt what it wrapped.
	fixed, err := x.s.Generate(pkcs11.CKM_AES_KEY_GEN,
		ck.Frozen(ck.InSession(ck.Unextractable, ck.Use(ck.Usages, pkcs11.CKA_WRAP),
			ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, true), ck.Attr(pkcs11.CKA_VALUE_LEN, 32)})))
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
	{attribute: pkcs11.CKA_VALUE, name: "CKA_VALUE"},
	{attribute: pkcs11.CKA_PRIVATE_EXPONENT, name: "CKA_PRIVATE_EXPONENT"},
	{attribute: pkcs11.CKA_PRIME_1, name: "CKA_PRIME_1"},
	{attribute: pkcs11.CKA_PRIME_2, name: "CKA_PRIME_2"},
	{attribute: pkcs11.CKA_EXPONENT_1, name: "CKA_EXPONENT_1"},
	{attribute: pkcs11.CKA_EXPONENT_2, name: "CKA_EXPONENT_2"},
	{attribute: pkcs11.CKA_COEFFICIENT, name: "CKA_COEFFICIENT"},
}

// readable names the secret attributes that the token would give. It asks only for their length, and fetches none: a
// token that answers with a length has failed.
func (x *trial) readable(class uint, h pkcs11.ObjectHandle) (names []string) {
	for _, a := range secretAttributes {
		if class == pkcs11.CKO_SECRET_KEY && a.attribute != pkcs11.CKA_VALUE {
			break
		}
		size, err := x.s.Size(h, a.attribute)
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
	done := answer(errLeft)
	if len(x.readable(class, h)) > 0 {
		done = nil
	}
	x.refuses("read the value of "+what, "a SENSITIVE key is in clear nowhere but in the token", done)
}

// lotLike tries a key as a lot's.
func (x *trial) lotLike() {
	const means = "P and Q stay in the token, and leave it only for whom they are granted to"
	pub, priv, err := x.pair(keyspec.RSAPublic(2048), keyspec.Lot)
	if !x.can("CKA_WRAP_WITH_TRUSTED on a new RSA key", means, err) {
		return
	}
	key, err := keyspec.ReadRSA(x.s, pub)
	if !x.can("an RSA key", means, err) {
		return
	}
	x.wrapping(key)
	carrier, err := x.aes(ck.Unextractable, ck.Use(ck.Usages, pkcs11.CKA_WRAP))
	if !x.can("an AES key that wraps", means, err) {
		return
	}
	_, err = x.wrap(x.t.KWP(), carrier, priv)
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
	_, err = x.wrap(x.t.KWP(), carrier, priv)
	x.refuses("wrap a sealed lot key", sealed, err)
	x.refuses("set CKA_EXTRACTABLE of a sealed lot key again", sealed, x.changed(priv, pkcs11.CKA_EXTRACTABLE, true))
}

// wrapping tries keys as those that EnrollKey makes and imports, whose CKA_WRAP_TEMPLATE says what they wrap. They are
// not TRUSTED, since the user makes them; so the keys that they wrap are not WRAP_WITH_TRUSTED.
func (x *trial) wrapping(key *rsa.PublicKey) {
	const means = "a fixture's or an operator's key receives what is meant for it, and no other key"
	h, err := x.s.Create(ck.InSession(keyspec.Wrapping(key), ck.Attributes{trusted}))
	x.refuses("make a TRUSTED RSA key for the user", means, x.has(h, err, pkcs11.CKA_TRUSTED, true))

	id := func(last byte) *pkcs11.Attribute { return ck.Attr(pkcs11.CKA_ID, append(make([]byte, 19), last)) }
	secret := func(id *pkcs11.Attribute) (pkcs11.ObjectHandle, error) { // as an injection key
		return x.s.Generate(pkcs11.CKM_AES_KEY_GEN, ck.InSession(extractable, ck.Use(ck.Usages, pkcs11.CKA_WRAP),
			ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, false), ck.Attr(pkcs11.CKA_VALUE_LEN, 32), id}))
	}
	own, err := secret(id(1))
	if !x.can("an AES key that is wrapped", means, err) {
		return
	}
	other, err := secret(id(2))
	if !x.can("an AES key that is wrapped", means, err) {
		return
	}
	names := ck.Attributes{ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), id(1)}
	receiver, err := x.s.Create(ck.InSession(keyspec.Wrapping(key), ck.Nested(pkcs11.CKA_WRAP_TEMPLATE, names)))
	if !x.can("CKA_WRAP_TEMPLATE on an RSA key", means, err) {
		return
	}
	_, err = x.wrap(keyspec.OAEP, receiver, own)
	if !x.can("wraps a key that CKA_WRAP_TEMPLATE names", means, err) {
		return
	}
	_, err = x.wrap(keyspec.OAEP, receiver, other)
	x.refuses("wrap a key under an RSA key whose CKA_WRAP_TEMPLATE names another", means, err)
	kek, err := x.aes(extractable, ck.Use(ck.Usages, pkcs11.CKA_WRAP),
		ck.Nested(pkcs11.CKA_WRAP_TEMPLATE, keyspec.LotKeys))
	if !x.can("CKA_WRAP_TEMPLATE on an AES key", means, err) {
		return
	}
	_, err = x.wrap(x.t.KWP(), kek, other)
	x.refuses("wrap an AES key under a KEK whose CKA_WRAP_TEMPLATE names RSA keys", means, err)
}

// unwrapping tries keys as the operator's, whose CKA_UNWRAP_TEMPLATE says what they unwrap.
func (x *trial) unwrapping() {
	const means = "whoever has the user PIN, a grant, an enrolment or a row of the database has no key in clear by it"
	traits, err := Learn(x.t)
	if x.away(err) {
		return
	}
	if !traits.UnwrapTemplate {
		const what = "refuses to unwrap a key otherwise than as CKA_UNWRAP_TEMPLATE says"
		x.report = append(x.report, Finding{Check: what, For: means, Required: true,
			Consequence: "it does not know CKA_UNWRAP_TEMPLATE, and keys are made without: " + x.follows()})
		return
	}
	// One pair is both: the transport key, and the lot key that is granted.
	pub, priv, err := x.pair(append(keyspec.RSAPublic(2048), ck.Attr(pkcs11.CKA_WRAP, true)),
		ck.Guarded(true), ck.Use(ck.PrivateUsages, pkcs11.CKA_UNWRAP), keyspec.ByOAEP,
		traits.Unwraps(keyspec.ImportedKEK))
	if !x.can("CKA_UNWRAP_TEMPLATE on a new RSA key", means, err) {
		return
	}
	kek, err := x.aes(extractable, ck.Use(ck.Usages, pkcs11.CKA_WRAP))
	if !x.can("an AES key that wraps", means, err) {
		return
	}
	enrolment, err := x.wrap(keyspec.OAEP, pub, kek)
	if !x.can("wraps a KEK", means, err) {
		return
	}
	x.against("a KEK", means, keyspec.OAEP, priv, enrolment, keyspec.ImportedKEK, pkcs11.CKA_DECRYPT)
	x.others("a transport key", priv, keyspec.ImportedKEK, keyspec.OAEP)
	grant, err := x.wrap(x.t.KWP(), kek, priv)
	if !x.can("wraps a lot key", means, err) {
		return
	}
	template := ck.InSession(keyspec.ImportedKEK, ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, true)},
		keyspec.ByKWP, traits.Unwraps(keyspec.ImportedLot))
	taken, err := x.s.Unwrap(keyspec.OAEP, priv, enrolment, template)
	if !x.can("CKA_UNWRAP_TEMPLATE on a KEK that is unwrapped", means, err) {
		return
	}
	x.against("a lot key", means, x.t.KWP(), taken, grant, keyspec.ImportedLot, pkcs11.CKA_SIGN)
	x.others("a KEK", taken, keyspec.ImportedLot, pkcs11.CKM_AES_KEY_WRAP_PAD, p11.AESKWP)
	reads := func(kek pkcs11.ObjectHandle, err error) answer {
		if err != nil {
			return err
		}
		h, err := x.s.Unwrap(x.t.KWP(), kek, grant,
			ck.InSession(ck.With(keyspec.ImportedLot, ck.Attr(pkcs11.CKA_SENSITIVE, false))))
		return x.has(h, err, pkcs11.CKA_SENSITIVE, false)
	}
	none := &pkcs11.Attribute{Type: pkcs11.CKA_UNWRAP_TEMPLATE}
	x.refuses("forget CKA_UNWRAP_TEMPLATE on a copy", means, reads(x.copy(taken)), reads(x.copy(taken, none)))
	x.refuses("clear CKA_UNWRAP_TEMPLATE", means, reads(taken, x.s.Set(taken, none)))

	storage, err := x.aes(traits.Leaves(), carries, keyspec.BySealing, traits.Unwraps(keyspec.KME))
	if !x.can("CKA_UNWRAP_TEMPLATE on a storage key", means, err) {
		return
	}
	like := append(ck.Without(keyspec.SealableKME, pkcs11.CKA_CLASS, pkcs11.CKA_KEY_TYPE),
		ck.Attr(pkcs11.CKA_VALUE_LEN, 32))
	secret, err := x.s.Generate(pkcs11.CKM_AES_KEY_GEN, like)
	if !x.can("a key as a KME", means, err) {
		return
	}
	sealed, err := x.wrap(pkcs11.CKM_AES_KEY_WRAP, storage, secret)
	if !x.can("seals a KME", means, err) {
		return
	}
	x.against("a KME", means, pkcs11.CKM_AES_KEY_WRAP, storage, sealed, keyspec.KME, pkcs11.CKA_SIGN)
	x.others("a storage key", storage, keyspec.KME, pkcs11.CKM_AES_KEY_WRAP)
}

// others tries to unwrap and to decrypt with a key by mechanisms that are not its own. What the token is given is no
// wrapped key. So it refuses a mechanism only if it says that; any other error is about what it was given.
func (x *trial) others(key string, h pkcs11.ObjectHandle, template ck.Attributes, own ...uint) {
	f := Finding{Check: "refuses to unwrap and decrypt with " + key + " by other mechanisms than ours", OK: true,
		For: "the user PIN gives no padding oracle, which would decrypt a wrapped key", Required: true}
	var does []string
	for _, m := range deciphering {
		has, err := x.t.Can(m.mechanism, 0)
		if x.away(err) {
			return
		}
		if !has || slices.Contains(own, m.mechanism) {
			continue
		}
		how, in := []*pkcs11.Mechanism{pkcs11.NewMechanism(m.mechanism, m.iv)}, make([]byte, 256)
		_, unwraps := x.s.Ctx.UnwrapKey(x.s.ID, how, h, in, ck.InSession(template))
		decrypts := x.s.Ctx.DecryptInit(x.s.ID, how, h)
		if decrypts == nil {
			_, decrypts = x.s.Ctx.Decrypt(x.s.ID, in)
		}
		if x.away(unwraps) || x.away(decrypts) {
			return
		}
		if !ck.IsCKR(unwraps, notByThisKey...) || !ck.IsCKR(decrypts, notByThisKey...) {
			does = append(does, m.name)
		}
	}
	if len(does) > 0 {
		f.OK, f.Consequence = false, x.follows()+", by "+strings.Join(does, ", ")
	}
	x.report = append(x.report, f)
}

// deciphering has mechanisms that unwrap or decrypt.
var deciphering = []struct {
	name      string
	mechanism uint
	iv        []byte
}{
	{name: "CKM_AES_ECB", mechanism: pkcs11.CKM_AES_ECB},
	{name: "CKM_AES_CBC", mechanism: pkcs11.CKM_AES_CBC, iv: make([]byte, 16)},
	{name: "CKM_AES_CBC_PAD", mechanism: pkcs11.CKM_AES_CBC_PAD, iv: make([]byte, 16)},
	{name: "CKM_AES_KEY_WRAP", mechanism: pkcs11.CKM_AES_KEY_WRAP},
	{name: "CKM_AES_KEY_WRAP_PAD", mechanism: pkcs11.CKM_AES_KEY_WRAP_PAD},
	{name: "CKM_AES_KEY_WRAP_KWP", mechanism: p11.AESKWP},
	{name: "CKM_RSA_PKCS", mechanism: pkcs11.CKM_RSA_PKCS},
	{name: "CKM_RSA_X_509", mechanism: pkcs11.CKM_RSA_X_509},
}

// notByThisKey has the return codes that say nothing of what was to be deciphered.
var notByThisKey = []pkcs11.Error{
	pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED, pkcs11.CKR_ACTION_PROHIBITED,
	pkcs11.CKR_KEY_TYPE_INCONSISTENT, pkcs11.CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT,
}

// against tries to unwrap a key in ways that a template forbids.
func (x *trial) against(
	what, means string, m uint, under pkcs11.ObjectHandle, wrapped []byte, template ck.Attributes, usage uint,
) {
	unwrap := func(a ck.Attributes) (pkcs11.ObjectHandle, error) {
		return x.s.Unwrap(m, under, wrapped, ck.InSession(a))
	}
	if _, err := unwrap(template); !x.can("unwraps "+what+" as CKA_UNWRAP_TEMPLATE says", means, err) {
		return
	}
	readable, leaves := ck.Attr(pkcs11.CKA_SENSITIVE, false), ck.Attr(pkcs11.CKA_EXTRACTABLE, true)
	h, err := unwrap(ck.With(template, readable))
	as := []answer{x.has(h, err, pkcs11.CKA_SENSITIVE, false)}
	h, err = unwrap(ck.With(template, leaves))
	as = append(as, x.has(h, err, pkcs11.CKA_EXTRACTABLE, true))
	// What is left out, a token may take from its template.
	h, err = unwrap(ck.Without(template, pkcs11.CKA_SENSITIVE, pkcs11.CKA_EXTRACTABLE))
	as = append(as, x.has(h, err, pkcs11.CKA_SENSITIVE, false), x.has(h, err, pkcs11.CKA_EXTRACTABLE, true))
	h, err = unwrap(ck.With(template, ck.Attr(usage, true)))
	as = append(as, x.has(h, err, usage, true))
	_, err = unwrap(ck.With(template,
		ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), ck.Attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET)))
	x.refuses("unwrap "+what+" otherwise than as CKA_UNWRAP_TEMPLATE says", means, append(as, err)...)
}

// strangers looks for TRUSTED keys that are not ours: WRAP_WITH_TRUSTED keys could be wrapped under them.
func (x *trial) strangers() {
	const means = "keys leave only under a TRUSTED key that an enrolment has made"
	f := Finding{Check: "no TRUSTED key but those of enrolments", For: means, OK: true, Required: true}
	found, err := x.s.Find(ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, true), ck.Attr(pkcs11.CKA_TRUSTED, true)})
	if x.away(err) {
		return
	}
	var strange []string
	for _, h := range found {
		k, label, err := keyspec.Whose(x.s, h)
		if x.away(err) {
			return
		}
		if err != nil {
			strange = append(strange, fmt.Sprintf("a TRUSTED object that cannot be read (%v)", err))
		} else if !slices.Contains(trustedRoles[x.side], k.Role) {
			strange = append(strange, fmt.Sprintf("a TRUSTED object %q that is not ours", label))
		} else if size, err := x.s.Size(h, pkcs11.CKA_WRAP_TEMPLATE); err != nil || size == 0 {
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
var trustedRoles = map[keyspec.Side][]keyspec.Role{keyspec.Factory: {keyspec.RoleKEK, keyspec.RoleInjection,
	keyspec.RoleFixture, keyspec.RoleOperatorOutgoing}}

// decryption measures the decryption, which takes most of the time of a payload and of a new lot key's proof.
func (x *trial) decryption() {
	const what, means = "raw RSA-2048 decryption", "payloads, and the proof of a new lot key, on one session"
	_, priv, err := x.pair(keyspec.RSAPublic(2048), ck.Guarded(false), ck.Use(ck.PrivateUsages, pkcs11.CKA_DECRYPT))
	if !x.can("an RSA key", means, err) {
		return
	}
	block := make([]byte, 256)
	block[len(block)-1] = 2
	x.report = append(x.report, Measured(what, means, 20, func() error {
		_, err := x.s.Decrypt(pkcs11.CKM_RSA_X_509, priv, block, make([]byte, len(block)))
		return p11.Explain("decrypt", err)
	}))
}

// Learn finds the traits of an operator's token by trial. The caller holds a session, so that the module stays.
func Learn(t *p11.Token) (keyspec.Traits, error) {
	x, err := newTrial(t, keyspec.Operator)
	if err != nil {
		return keyspec.Traits{}, err
	}
	defer x.end()
	x.leaving()
	learnt := keyspec.Traits{
		LeavesTrusted: !slices.ContainsFunc(x.report, func(f Finding) bool { return !f.OK }),
	}
	_, err = x.aes(ck.Unextractable, carries, ck.Nested(pkcs11.CKA_UNWRAP_TEMPLATE, keyspec.KME))
	learnt.UnwrapTemplate = err == nil
	if x.away(err) {
		return keyspec.Traits{}, x.err
	}
	return learnt, nil
}
