package p11

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/pinsource"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// Options say how a token is used. The zero value is right for a command.
type Options struct {
	// HangTimeout is after how long a call is given up; 0 for two minutes: the slowest of ours makes an RSA-4096 key
	// pair.
	HangTimeout time.Duration
	// Observer is told of operations; it may be nil.
	Observer Observer
	// Changed is told of each change of the circuit breaker, of calls that hang or come back, and of panics: how the
	// token was, and how it is. It may be nil. It must return at once, and make no call to the token. For one token, it
	// is not called concurrently.
	Changed func(token string, was, is Health)
	// RenewAfter is after how many uses of a session the module is reinitialised; 0 for the token's default.
	RenewAfter int64
	// Sessions is how many operations may be in the token at once; 0 for a number by its distance and its limits.
	Sessions int
}

const hangTimeout = 2 * time.Minute

// A Token is an open, logged-in token with a bounded pool of sessions. All methods may be called concurrently. A
// call waits for a session until its context ends; one that has reached the token is not interrupted. One that is given
// up (ErrUnavailable) may still read the bytes that it was given: they must not be changed afterwards.
type Token struct {
	connection
	handles

	pin       string // the user PIN's source; empty for the security officer's
	kwp       uint   // the mechanism that is AES-KWP (RFC 5649) on this token
	hangAfter time.Duration
	observer  Observer // may be nil

	idle     *idle
	left     left
	distance distance

	breaker *breaker
	logins  atomic.Int64 // how often the token was reinitialised; it changes only while no place of idle is held
	health  health
	renewal renewal

	reinitialising    sync.Mutex // held by whoever reinitialises
	lastReinitialised time.Time  // used by recover alone, of which one runs at a time
	recovering        sync.WaitGroup
	closing           chan struct{} // closed by Close
}

// renewal is after how many uses of a session the module is reinitialised; 0 for never.
type renewal struct{ after, uses atomic.Int64 }

// softHSMRenewal is for SoftHSM 2.6.1, which keeps some 250 bytes for each session object that was ever made, until
// C_Finalize: 490 bytes a device key, and half a gigabyte for a lot of a million.
const softHSMRenewal = 100_000

// OpenUser opens the token that an RFC 7512 URI names and logs in, once, with the user PIN of its pin-source.
func OpenUser(_ context.Context, tokenURI string, o Options) (*Token, error) {
	u, err := parseURI(tokenURI)
	if err != nil {
		return nil, err
	}
	pin, err := pinsource.Read(u.pinSource)
	if err != nil {
		return nil, err
	}
	return settled(func() (*Token, error) {
		t, err := connect(u, o)
		if err != nil {
			return nil, err
		}
		if t.info.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0 {
			t.Close()
			return nil, errors.New("the token is one wrong PIN away from locking, so it was not tried: " +
				"log in once with another tool and the right PIN, then run this again")
		}
		if t.held, err = t.logIn(pkcs11.CKU_USER, pin); err != nil {
			t.Close()
			err = Explain("log in to "+t.String(), err)
			if t.SeesLate() && ck.IsCKR(err, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_USER_PIN_NOT_INITIALIZED) {
				err = unsettledError{error: err} // another token might count wrong PINs
			}
			return nil, err
		}
		t.pin = u.pinSource
		if o.RenewAfter == 0 && t.SeesLate() {
			o.RenewAfter = softHSMRenewal
		}
		t.renewal.after.Store(o.RenewAfter)
		return t, nil
	})
}

// AsOfficer runs f while the security officer is logged in, once. No other Token of this token may be open in the
// process.
func AsOfficer(tokenURI string, pin pinsource.PIN, f func(*Token) error) error {
	u, err := parseURI(tokenURI)
	if err != nil {
		return err
	}
	t, err := settled(func() (*Token, error) { return connect(u, Options{}) })
	if err != nil {
		return err
	}
	defer t.Close()
	if t.info.Flags&pkcs11.CKF_SO_PIN_FINAL_TRY != 0 {
		return errors.New("the token is one wrong security officer's PIN away from locking, so it was not tried")
	}
	if t.held, err = t.logIn(pkcs11.CKU_SO, pin); err != nil {
		return Explain("log in to "+t.String()+" as the security officer", err)
	}
	return f(t)
}

// settled tries again, for some 0.3 s, to open a token that another process may be logging in to: SoftHSM 2.6.1 then
// empties the token's file before it writes it, and whoever looks meanwhile finds no token, or one without a PIN.
func settled(open func() (*Token, error)) (*Token, error) {
	for pause := 10 * time.Millisecond; ; pause *= 2 {
		t, err := open()
		if _, again := errors.AsType[unsettledError](err); !again || pause > 160*time.Millisecond {
			return t, err
		}
		time.Sleep(pause)
	}
}

type unsettledError struct{ error }

func (e unsettledError) Unwrap() error { return e.error }

// SeesLate says whether the token is SoftHSM, whose threads may see late what another process has made.
func (t *Token) SeesLate() bool { return strings.HasPrefix(t.info.ManufacturerID, "SoftHSM") }

// connect finds the token and prepares the pool, without logging in.
func connect(u *uri, o Options) (_ *Token, err error) {
	m, err := loadModule(u.module)
	if err != nil {
		return nil, err
	}
	t := &Token{connection: connection{module: m, uri: u, signing: 1 + 2*runtime.GOMAXPROCS(0)},
		observer: o.Observer, hangAfter: cmp.Or(o.HangTimeout, hangTimeout),
		breaker: newBreaker(), closing: make(chan struct{})}
	defer func() {
		if err != nil {
			t.Close()
		}
	}()
	t.health.changed = o.Changed
	t.Forget()
	if err := t.acquire(); err != nil {
		if _, ok := errors.AsType[usage.Error](err); ok {
			return nil, err
		}
		return nil, unsettledError{error: fmt.Errorf("the PKCS #11 module %s cannot be used: %w: is its token "+
			"connected, its configuration right, for SoftHSM %s, and does it want %s in the URI?", u.module, err,
			softhsmConf(), initReserved)}
	}
	if t.slot, t.info, err = t.findSlot(); err != nil {
		return nil, err
	}
	again, err := t.share()
	if err == nil && again {
		if err = t.release(); err == nil {
			err = t.acquire()
		}
	}
	if err != nil {
		return nil, err
	}
	if t.kwp, err = t.findKWP(); err != nil {
		return nil, err
	}
	size, err := t.poolSize(o.Sessions)
	if err != nil {
		return nil, err
	}
	t.idle = newIdle(size)
	return t, nil
}

// Sessions of a pool: a module that computes in this process, as SoftHSM does, keeps the cores busy with two sessions
// for each core, since one may wait for a lock. More sessions would only compete for the caches. For an HSM behind a
// bus or a network, what counts is how many calls are on their way at once.
const (
	sessionsACore = 2
	sessionsAway  = 64
)

// objectRoom is how much memory a session object of ours takes in a token at most. objectsAtOnce is how many an
// operation has.
const (
	objectRoom    = 1024
	objectsAtOnce = 2
)

// poolSize sets the pool's size by the token's distance and limit of sessions, and how many objects may be left in them
// by its memory.
func (t *Token) poolSize(wanted int) (int, error) {
	s, err := t.OpenSession()
	if err != nil {
		return 0, err
	}
	defer s.Close()
	for range measured {
		t.distance.measure(s)
	}
	size := sessionsACore * runtime.GOMAXPROCS(0)
	if t.distance.far() {
		size = max(size, sessionsAway)
	}
	if wanted > 0 {
		size = wanted
	}
	if t.most > 0 { // one keeps the login, and one is for OpenSession
		size = min(size, max(1, int(t.most)-2))
	}
	most := leftNear
	if t.distance.far() {
		most = leftAway
	}
	room := most * size
	// NSS softoken says 1 for its memory, which is no number of bytes.
	total, free := t.info.TotalPublicMemory, t.info.FreePublicMemory
	if told(free) && told(total) && total > objectRoom {
		if room = int(free / objectRoom); room < objectsAtOnce {
			return 0, fmt.Errorf("%s has room for %d bytes of public objects, and an operation needs %d: remove what "+
				"is of no use there", t, free, objectsAtOnce*objectRoom)
		}
		size = min(size, room/objectsAtOnce)
	}
	t.left.most.Store(int64(min(most, room/size-objectsAtOnce+1)))
	return size, nil
}

// AESKWP is CKM_AES_KEY_WRAP_KWP of PKCS #11 3.0, which says that it is RFC 5649; CKM_AES_KEY_WRAP_PAD of 2.40 is the
// older name, which 3.0 deprecates since tokens took it for other paddings too.
const AESKWP = 0x210B

func (t *Token) findKWP() (uint, error) {
	can, err := t.Can(AESKWP, pkcs11.CKF_WRAP)
	if can || err != nil {
		return AESKWP, err
	}
	return pkcs11.CKM_AES_KEY_WRAP_PAD, nil
}

// KWP is the mechanism by which the token does AES-KWP (RFC 5649).
func (t *Token) KWP() uint { return t.kwp }

// Sessions is how many operations can be in the token at once.
func (t *Token) Sessions() int { return t.idle.size() }

// Close ends all sessions and the login. No other method may be running or be called afterwards.
func (t *Token) Close() error {
	close(t.closing)
	t.recovering.Wait()
	if t.idle != nil { // it was opened
		for range t.idle.size() {
			<-t.idle.places
			if s := t.idle.session(); s != nil {
				s.Close()
			}
		}
	}
	if t.health.hung.Load() > 0 { // C_Finalize would be undefined
		return errors.New("calls that do not come back are still in the module: it is left as it is")
	}
	return t.release()
}
