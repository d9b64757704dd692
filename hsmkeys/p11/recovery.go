package p11

import (
	"crypto/subtle"
	"fmt"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/pinsource"
)

// The backoff of reinitialising a token. A token that is back is noticed within the larger one.
const (
	firstPause = 50 * time.Millisecond
	lastPause  = time.Second
)

// lose opens the breaker, and starts to reinitialise the token; unless that was done since the login under which it was
// lost: a call may say so late.
func (t *Token) lose(login int64, cause error) {
	select {
	case <-t.closing:
		return
	default:
	}
	if t.logins.Load() != login {
		return
	}
	if t.breaker.open(cause) {
		t.tell()
		t.recovering.Go(t.recover)
	}
}

// recover reinitialises the token, as often as it takes. A refused PIN is not tried again, since the token may lock: it
// waits until the PIN's file has another one.
func (t *Token) recover() {
	pause := firstPause
	if time.Since(t.lastReinitialised) < 5*time.Second { // a call that breaks it again at once must not keep it busy
		pause = lastPause
	}
	var refused pinsource.PIN
	for {
		select {
		case <-t.closing:
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, lastPause)
		pin, err := pinsource.Read(t.pin)
		if refused != "" && (err != nil || subtle.ConstantTimeCompare([]byte(pin), []byte(refused)) == 1) {
			continue
		}
		t.breaker.halfOpen()
		t.tell()
		if err == nil {
			t.reinitialising.Lock()
			err = t.reinitialise(pin)
			t.reinitialising.Unlock()
		}
		if err == nil {
			t.lastReinitialised = time.Now()
			t.health.reinitialised.Add(1)
			t.breaker.close()
			t.tell()
			return
		}
		t.breaker.open(err)
		t.tell()
		if ck.IsCKR(err, refusedPIN...) {
			refused = pin
		}
	}
}

// reinitialise calls C_Finalize and C_Initialize, and logs in again; if that fails, the token is lost. Calls wait
// meanwhile, and none is under way, because it takes all places of idle. The caller holds reinitialising: two at once
// would each hold half of the places and wait for the rest.
func (t *Token) reinitialise(pin pinsource.PIN) error {
	taken := 0
	defer func() {
		for range taken {
			t.idle.give(nil)
		}
	}()
	_, err := noPanic(t, func() (struct{}, error) {
		for taken < t.idle.size() {
			<-t.idle.places
			taken++
			if s := t.idle.session(); s != nil {
				s.Close()
			}
		}
		t.Forget() // handles end with the login
		t.logins.Add(1)
		if t.health.hung.Load() > 0 {
			return struct{}{}, t.tryBeside(pin) // while a call hangs in the module, C_Finalize must not be
		}
		return struct{}{}, t.connection.reinitialise(pin)
	})
	if err != nil {
		t.lose(t.logins.Load(), err) // before anybody can get a session
	}
	return err
}

// tryBeside says whether the token answers other calls while some hang in it. If as many hang as there are sessions, it
// does not try before one comes back.
func (t *Token) tryBeside(pin pinsource.PIN) error {
	if t.health.hung.Load() >= int64(t.idle.size()) {
		return fmt.Errorf("%d calls do not come back", t.health.hung.Load())
	}
	var late *Session
	s, _, err := within(t, min(t.hangAfter, time.Second), func() (s *Session, err error) {
		late, err = t.logIn(pkcs11.CKU_USER, pin)
		return late, err
	}, func(waited bool) {
		if !waited && late != nil {
			late.Close()
		}
	})
	if err != nil {
		return Explain("log in again to "+t.String(), err)
	}
	if t.held != nil {
		t.held.Close()
	}
	t.held = s
	return nil
}

// renew reinitialises the module when that is due. Calls wait meanwhile, except the one that noticed it, which has its
// result already.
func (t *Token) renew() {
	after := t.renewal.after.Load()
	if after == 0 || t.renewal.uses.Add(1)%after != 0 || !t.reinitialising.TryLock() {
		return
	}
	t.recovering.Go(func() {
		defer t.reinitialising.Unlock()
		// If the PIN cannot be read any more, the token goes on as it is.
		if pin, err := pinsource.Read(t.pin); err == nil {
			t.reinitialise(pin) // if it fails, it has opened the breaker
		}
	})
}
