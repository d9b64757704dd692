package p11

import (
	"crypto/subtle"
	"fmt"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
)

// Backoff of reinitialising a token. Coming back is noticed within the larger one.
const (
	firstPause = 50 * time.Millisecond
	lastPause  = time.Second
)

// lose opens the breaker, and begins to reinitialise the token.
func (t *Token) lose(cause error) {
	select {
	case <-t.closing:
		return
	default:
	}
	if t.breaker.open(cause) {
		t.tell()
		t.recovering.Go(t.recover)
	}
}

// recover reinitialises the token, as often as it takes. A PIN that was refused is not tried again, since the token may
// lock: it waits for another one in its file.
func (t *Token) recover() {
	pause := firstPause
	if time.Since(t.lastReinitialised) < 5*time.Second { // what brings it down again at once does not keep it busy
		pause = lastPause
	}
	var refused PIN
	for {
		select {
		case <-t.closing:
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, lastPause)
		pin, err := ReadPIN(t.pin)
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

// reinitialise takes the module through C_Finalize and C_Initialize, and logs in again; when that fails, the token is
// lost. Calls wait for it; none is under way, since it holds all places of idle. The caller holds reinitialising: two
// at once would each hold half of the places and wait for the other's.
func (t *Token) reinitialise(pin PIN) error {
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
		if t.health.hung.Load() > 0 {
			return struct{}{}, t.tryBeside(pin) // while a call hangs in the module, C_Finalize must not be
		}
		return struct{}{}, t.connection.reinitialise(pin)
	})
	if err != nil {
		t.lose(err) // before anybody gets a session
	}
	return err
}

// tryBeside says whether the token answers beside the calls that hang in it. As many as there are sessions may; then it
// does not try, until one comes back.
func (t *Token) tryBeside(pin PIN) error {
	if t.health.hung.Load() >= int64(t.idle.size()) {
		return fmt.Errorf("%d calls do not come back", t.health.hung.Load())
	}
	login := func() (*Session, error) { return t.logIn(pkcs11.CKU_USER, pin) }
	s, _, err := within(t, min(t.hangAfter, time.Second), login, func(bool) {})
	if err != nil {
		return Explain("log in again to "+t.String(), err)
	}
	if t.held != nil {
		t.held.Close()
	}
	t.held = s
	return nil
}

// renew reinitialises the module when that is due. Calls wait for it, but not the one that began it, whose work is
// done.
func (t *Token) renew() {
	after := t.renewal.after.Load()
	if after == 0 || t.renewal.uses.Add(1)%after != 0 || !t.reinitialising.TryLock() {
		return
	}
	t.recovering.Go(func() {
		defer t.reinitialising.Unlock()
		// A PIN that cannot be read any more is no reason to stop.
		if pin, err := ReadPIN(t.pin); err == nil {
			t.reinitialise(pin) // it says itself that the token is lost
		}
	})
}
