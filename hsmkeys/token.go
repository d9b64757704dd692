package hsmkeys

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThalesGroup/crypto11"
	"github.com/miekg/pkcs11"
)

// A Key names a key by what it is for. Its CKA_ID and label are derived from that.
type Key struct {
	Role         Role
	Manufacturer string // RFC 7638 thumbprint of the manufacturer's signing key; empty for keys that are a token's own
	Name         string // the lot or the operator; empty for keys of which there is one
	Generation   int    // of a key that is rotated; 0 and 1 are the first
}

// MaxGenerations is how many generations a key can have.
const MaxGenerations = 64

// Generations are those that a key can have, in their order.
func (k Key) Generations() iter.Seq[Key] {
	return func(yield func(Key) bool) {
		for k.Generation = 1; k.Generation <= MaxGenerations && yield(k); k.Generation++ {
		}
	}
}

// Named finds the generation of a key by the name that files have for it, its HexID.
func (k Key) Named(id string) (Key, bool) {
	for g := range k.Generations() {
		if g.HexID() == id {
			return g, true
		}
	}
	return Key{}, false
}

// A Role says what a key does. Each has its row in the table of docs/security.md.
type Role string

const (
	RoleSigning          Role = "signing"
	RoleInjection        Role = "injection"
	RoleLot              Role = "lot"
	RoleKEK              Role = "kek"
	RoleTransport        Role = "transport"
	RoleFixture          Role = "fixture"            // a fixture's public key, TRUSTED, on a factory token
	RoleOperatorOutgoing Role = "operator-transport" // an operator's public transport key, TRUSTED, on a factory token
	RoleStorage          Role = "storage"
	RoleLedger           Role = "ledger"
	RoleBackup           Role = "backup" // a public key, TRUSTED, that receives storage and ledger key for the moment of a backup
)

// ID is the CKA_ID: 20 bytes, the same on every token.
func (k Key) ID() []byte {
	parts := []string{"kmehsm key 1", string(k.Role), k.Manufacturer, k.Name}
	if k.Generation > 1 {
		parts = append(parts, strconv.Itoa(k.Generation))
	}
	h := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return h[:20]
}

// HexID is the ID as files name it.
func (k Key) HexID() string { return hex.EncodeToString(k.ID()) }

// Label is the CKA_LABEL, for people who list a token's objects.
func (k Key) Label() string {
	label := "kme " + string(k.Role)
	if k.Name != "" {
		label += " " + k.Name
	}
	if k.Manufacturer != "" {
		label += " of " + k.Manufacturer
	}
	if k.Generation > 1 {
		label += fmt.Sprintf(" (%d)", k.Generation)
	}
	return label
}

// parseLabel is the key that has this label.
func parseLabel(label string) (k Key, ok bool) {
	rest, ok := strings.CutPrefix(label, "kme ")
	if at := strings.LastIndex(rest, " ("); at > 0 && strings.HasSuffix(rest, ")") {
		if k.Generation, _ = strconv.Atoi(rest[at+2 : len(rest)-1]); k.Generation > 1 {
			rest = rest[:at]
		}
	}
	if at := strings.LastIndex(rest, " of "); at > 0 {
		rest, k.Manufacturer = rest[:at], rest[at+4:]
	}
	role, name, _ := strings.Cut(rest, " ")
	k.Role, k.Name = Role(role), name
	return k, ok && k.Label() == label
}

func (k Key) String() string { return k.Label() }

// A Token is an open, logged-in token with a bounded pool of sessions. All methods may be called concurrently. A
// method waits for a session until its context ends; a call that has reached the token is not interrupted. One that
// is given up (ErrUnavailable) may still read the bytes that it was given: they must not be changed afterwards.
type Token struct {
	module *module
	using  bool // it is initialised for us
	slot   uint
	info   pkcs11.TokenInfo
	kwp    uint // the mechanism that is AES-KWP (RFC 5649) on this token
	lacks  atomic.Uint32
	held   *session // of the login, which ends with the last session
	// crypto11 signs for the manufacturer. It never gets the PIN: a login is the token's, not a session's, so ours serves it too. Used by who
	// holds an entry of idle.
	signers *crypto11.Context
	pin     string // its source, a URI; empty for the security officer's

	// idle holds as many entries as there may be sessions; nil stands for one that is not open yet.
	idle chan *session

	// renewAfter is for how many uses of a session the module is kept; 0 for ever.
	renewAfter, uses atomic.Int64

	verifyInSoftware bool
	observer         Observer // may be nil
	uri              *uri
	latch            *latch
	hangAfter        time.Duration
	hung, reopened   atomic.Int64
	panics           atomic.Int64
	reopening        sync.Mutex     // held by who reopens
	lastReopened     time.Time      // of recover's own, of which there is one at a time
	recovering       sync.WaitGroup // recover
	closing          chan struct{}  // closed by Close
	work             chan func()    // to those goroutines that wait for more: see onWorker

	dedicated atomic.Pointer[Dedication] // once it is known
	traits    atomic.Pointer[traits]     // once they are learnt
	sealing   atomic.Pointer[sealing]    // the newest generation of the storage key; nil while it is to be looked for

	mu      sync.Mutex
	handles map[handleKey]pkcs11.ObjectHandle // another map after each forget; it and what is in it are guarded by mu
}

type handleKey struct {
	class uint
	id    string
}

// A session is used by one goroutine at a time.
type session struct {
	*pkcs11.Ctx
	h     pkcs11.SessionHandle
	list  functionList
	lacks *atomic.Uint32 // which of the attributes in optional the token has no place for, by bits
}

// Open opens the token that an RFC 7512 URI names and logs in, once, with the PIN of its pin-source.
func Open(ctx context.Context, tokenURI string) (*Token, error) {
	u, err := parseURI(tokenURI)
	if err != nil {
		return nil, err
	}
	pin, err := ReadPIN(u.pinSource)
	if err != nil {
		return nil, err
	}
	t, err := connect(u)
	if err != nil {
		return nil, err
	}
	if t.info.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0 {
		t.Close()
		return nil, errors.New("the token is one wrong PIN away from locking, so it was not tried: log in once with another tool and the right PIN, then run this again")
	}
	if err := t.login(pkcs11.CKU_USER, pin); err != nil {
		t.Close()
		return nil, explain("log in to "+t.String(), err)
	}
	if t.pin = u.pinSource; t.isSoftHSM() {
		t.renewAfter.Store(softHSMRenewal)
	}
	return t, nil
}

func (t *Token) isSoftHSM() bool { return strings.HasPrefix(t.info.ManufacturerID, "SoftHSM") }

// softHSMRenewal is after how many uses the module is initialised anew. SoftHSM 2.6.1 keeps some 250 bytes of each session
// object that ever was, until C_Finalize: 490 bytes a device key, and half a gigabyte for a lot of a million.
const softHSMRenewal = 100_000

// connect finds the token and prepares the pool, without logging in.
func connect(u *uri) (*Token, error) {
	m, err := loadModule(u.module)
	if err != nil {
		return nil, err
	}
	t := &Token{module: m, uri: u, latch: newLatch(), hangAfter: hangTimeout, closing: make(chan struct{}), work: make(chan func()), handles: map[handleKey]pkcs11.ObjectHandle{}}
	if err := t.acquire(); err != nil {
		t.release()
		return nil, fmt.Errorf("the PKCS #11 module %s cannot be used: %w: is its token connected, its configuration right%s, and does it want %s in the URI?", u.module, err, softhsmConf(), initReserved)
	}
	if t.slot, t.info, err = t.findSlot(u); err != nil {
		t.Close()
		return nil, err
	}
	if t.kwp, err = t.findKWP(); err != nil {
		t.Close()
		return nil, err
	}
	size, err := t.poolSize()
	if err != nil {
		t.Close()
		return nil, err
	}
	t.idle = make(chan *session, size)
	for range size {
		t.idle <- nil
	}
	return t, nil
}

// Sessions of a pool: a module that computes in this process, as SoftHSM, keeps the cores busy with two for each, one of which may wait for the module's
// locks; more of them only take turns, and each turn finds its caches filled by another. An HSM behind a bus or a network is busy elsewhere, and what
// counts is how many calls are on their way to it.
const (
	sessionsACore = 2
	sessionsAway  = 64
	away          = 200 * time.Microsecond // how long a call takes that does nothing here
)

// poolSize sees how far away the token is, and how many sessions it allows.
func (t *Token) poolSize() (int, error) {
	s, err := t.openSession()
	if err != nil {
		return 0, err
	}
	defer s.CloseSession(s.h)
	fastest := time.Hour
	for range 5 {
		start := time.Now()
		if _, err := s.GenerateRandom(s.h, 1); err != nil {
			fastest = 0 // there are tokens without
			break
		}
		fastest = min(fastest, time.Since(start))
	}
	size := sessionsACore * runtime.GOMAXPROCS(0)
	if fastest >= away {
		size = max(size, sessionsAway)
	}
	if limit := t.info.MaxSessionCount; limit != pkcs11.CK_EFFECTIVELY_INFINITE && limit != pkcs11.CK_UNAVAILABLE_INFORMATION {
		others := 1 // holds the login
		if t.signers != nil {
			others += crypto11Sessions()
		}
		size = min(size, max(1, int(limit)-others))
	}
	return size, nil
}

// crypto11Sessions are those that crypto11 may open: one that stays, and those that sign.
func crypto11Sessions() int { return 1 + 2*runtime.GOMAXPROCS(0) }

// acquire has the module initialised. crypto11 insists on making C_Initialize itself, so it comes first; and it gives no string of the module's own, so
// a token whose module wants one has no signers, and is no manufacturer's.
func (t *Token) acquire() (err error) {
	if t.uri.reserved == "" {
		config := &crypto11.Config{Path: t.uri.module, LoginNotSupported: true, MaxSessions: crypto11Sessions()}
		if config.TokenSerial = t.uri.token["serial"]; config.TokenSerial == "" {
			config.TokenLabel = t.uri.token["token"]
		}
		if t.signers, err = crypto11.Configure(config); err != nil {
			t.signers = nil
			if strings.Contains(err.Error(), "could not find PKCS#11 token") {
				return t.noToken()
			}
			return err
		}
	}
	err = t.module.initialize(t.uri.reserved)
	t.using = err == nil
	return err
}

// release undoes acquire and login. Nothing may be in the module.
func (t *Token) release() error {
	if t.held != nil {
		t.held.CloseSession(t.held.h)
		t.held = nil
	}
	var errs []error
	if t.using {
		t.using = false
		errs = append(errs, t.module.finalize())
	}
	if t.signers != nil {
		errs = append(errs, t.signers.Close())
		t.signers = nil
	}
	return errors.Join(errs...)
}

func (t *Token) noToken() error {
	return fmt.Errorf("the module %s has no token %v: check the URI and, for SoftHSM, SOFTHSM2_CONF%s", t.uri.module, t.uri.token, softhsmConf())
}

func softhsmConf() string {
	if v := os.Getenv("SOFTHSM2_CONF"); v != "" {
		return " (now " + v + ")"
	}
	return " (not set)"
}

// findSlot insists on one token: of two with one label the wrong one might get the PIN.
func (t *Token) findSlot(u *uri) (slot uint, info pkcs11.TokenInfo, err error) {
	slots, err := t.module.GetSlotList(true)
	if err != nil {
		return 0, info, explain("list the module's slots", err)
	}
	found := 0
	for _, id := range slots {
		this, err := t.module.GetTokenInfo(id)
		if err != nil {
			continue // a slot that cannot say what it holds is not the one
		}
		has := map[string]string{"token": this.Label, "serial": this.SerialNumber, "manufacturer": this.ManufacturerID, "model": this.Model}
		match := true
		for name, want := range u.token {
			match = match && strings.TrimRight(has[name], " \x00") == want
		}
		if match {
			slot, info = id, this
			found++
		}
	}
	switch found {
	case 0:
		return 0, info, t.noToken()
	case 1:
		return slot, info, nil
	}
	return 0, info, fmt.Errorf("%d tokens fit %v: add serial=NUMBER to the URI", found, u.token)
}

// ckmAESKeyWrapKWP is CKM_AES_KEY_WRAP_KWP of PKCS #11 3.0, which says that it is RFC 5649; CKM_AES_KEY_WRAP_PAD of 2.40 is the
// older name, which 3.0 deprecates since tokens took it for other paddings too.
const ckmAESKeyWrapKWP = 0x210B

func (t *Token) findKWP() (uint, error) {
	can, err := t.can(ckmAESKeyWrapKWP, pkcs11.CKF_WRAP)
	if can || err != nil {
		return ckmAESKeyWrapKWP, err
	}
	return pkcs11.CKM_AES_KEY_WRAP_PAD, nil
}

// KeyWrapMechanism names the mechanism by which the token does AES-KWP (RFC 5649).
func (t *Token) KeyWrapMechanism() string {
	if t.kwp == ckmAESKeyWrapKWP {
		return "CKM_AES_KEY_WRAP_KWP"
	}
	return "CKM_AES_KEY_WRAP_PAD"
}

func (t *Token) login(user uint, pin PIN) (err error) {
	t.held, err = t.logIn(user, pin)
	return err
}

// logIn gives the session that holds the login.
func (t *Token) logIn(user uint, pin PIN) (*session, error) {
	s, err := t.openSession()
	if err != nil {
		return nil, err
	}
	err = s.Login(s.h, user, string(pin))
	if user == pkcs11.CKU_USER && isCKR(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN) {
		err = nil // two Tokens of one process may share a token; the login is the process's
	}
	if err != nil {
		s.CloseSession(s.h)
		return nil, err
	}
	return s, nil
}

// Close ends all sessions and the login. No other method may be running or be called afterwards.
func (t *Token) Close() error {
	close(t.closing)
	t.recovering.Wait()
	for range cap(t.idle) {
		if s := <-t.idle; s != nil {
			s.CloseSession(s.h)
		}
	}
	if t.hung.Load() > 0 {
		return errors.New("calls that do not come back are still in the module: it is left as it is") // C_Finalize would be undefined
	}
	return t.release()
}

// String names the token by label and serial number.
func (t *Token) String() string {
	return fmt.Sprintf("token %q (serial %s)", strings.TrimRight(t.info.Label, " \x00"), t.Serial())
}

// Serial is the token's serial number.
func (t *Token) Serial() string { return strings.TrimRight(t.info.SerialNumber, " \x00") }

// Sessions is how many operations can be in the token at once.
func (t *Token) Sessions() int { return cap(t.idle) }

func (t *Token) openSession() (*session, error) {
	h, err := t.module.OpenSession(t.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return nil, explain("open a session", err)
	}
	return &session{t.module.Ctx, h, t.module.list, &t.lacks}, nil
}

// find looks a key up by CKA_ID, and fails with ErrNoKey. Two keys of one ID are an error: neither can be trusted.
func (t *Token) find(s *session, class uint, k Key) (pkcs11.ObjectHandle, error) {
	return t.remembered(handleKey{class, string(k.ID())}, func() (pkcs11.ObjectHandle, error) { return t.lookUp(s, class, k) })
}

// remembered gives a handle that is known, or the one that look gives, which is known from then on until it is forgotten.
func (t *Token) remembered(at handleKey, look func() (pkcs11.ObjectHandle, error)) (pkcs11.ObjectHandle, error) {
	t.mu.Lock()
	known := t.handles
	h, ok := known[at]
	t.mu.Unlock()
	if ok {
		return h, nil
	}
	h, err := look()
	if err != nil {
		return 0, err
	}
	t.mu.Lock()
	known[at] = h // whoever has forgotten meanwhile does not see it
	t.mu.Unlock()
	return h, nil
}

func (t *Token) lookUp(s *session, class uint, k Key) (pkcs11.ObjectHandle, error) {
	found, err := t.findAll(s, class, k)
	switch {
	case err != nil:
		return 0, err
	case len(found) == 0:
		return 0, fmt.Errorf("%s: %w", k.Label(), ErrNoKey)
	case len(found) > 1:
		return 0, fmt.Errorf("%s has %d objects %q: only one of them can be ours; remove the others with the token's own tool", t, len(found), k.Label())
	}
	return found[0], t.checkMaker(s, class, found[0], k)
}

// checkMaker refuses an object in the place of a key of ours that others could have made. CKA_ID and label say nothing: what is not PRIVATE is made, and
// destroyed, without a PIN, but only the security officer makes TRUSTED keys. An injection key must be one: device keys are under it, and whoever has
// the user PIN, too, could put one of a known value in its place.
func (t *Token) checkMaker(s *session, class uint, h pkcs11.ObjectHandle, k Key) error {
	if class == pkcs11.CKO_PUBLIC_KEY {
		return nil // it is compared with what it is the other half of, or the token asks that it is TRUSTED
	}
	is := func(typ uint) (bool, error) {
		a, err := s.GetAttributeValue(s.h, h, attributes{attr(typ, nil)})
		return err == nil && isTrue(a[0]), explainIf("look at "+k.Label(), err)
	}
	ok, err := false, error(nil)
	if k.Role != RoleInjection {
		ok, err = is(pkcs11.CKA_PRIVATE)
	}
	if err == nil && !ok && class == pkcs11.CKO_SECRET_KEY {
		ok, err = is(pkcs11.CKA_TRUSTED)
	}
	if err == nil && !ok {
		err = fmt.Errorf("%s has an object %q that was not made by whom it should: others may know its value. "+
			"Find out who made it, remove it with the token's own tool, and make the key anew", t, k.Label())
	}
	return err
}

// forget has all keys looked up again by those who ask from now on.
func (t *Token) forget() {
	t.mu.Lock()
	t.handles = map[handleKey]pkcs11.ObjectHandle{}
	t.mu.Unlock()
	t.sealing.Store(nil)
}

func (t *Token) findAll(s *session, class uint, k Key) ([]pkcs11.ObjectHandle, error) {
	found, err := s.findObjects(attributes{attr(pkcs11.CKA_CLASS, class), attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_ID, k.ID())})
	return found, explainIf("look for "+k.Label(), err)
}

// findObjects gives all objects that fit a template.
func (s *session) findObjects(template attributes) (all []pkcs11.ObjectHandle, err error) {
	if err := s.FindObjectsInit(s.h, template); err != nil {
		return nil, err
	}
	for {
		found, _, err := s.FindObjects(s.h, 100)
		if all = append(all, found...); err != nil || len(found) == 0 {
			return all, errors.Join(err, s.FindObjectsFinal(s.h))
		}
	}
}

// destroy removes a key from the token for good, and every other that has its ID.
func (t *Token) destroy(s *session, class uint, k Key) error {
	found, err := t.findAll(s, class, k)
	if err != nil {
		return err
	}
	defer t.forget() // afterwards: until then it can be found
	for _, h := range found {
		if err := s.DestroyObject(s.h, h); err != nil {
			return explain("remove "+k.Label(), err)
		}
	}
	return nil
}
