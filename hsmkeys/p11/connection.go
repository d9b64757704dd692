package p11

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/ThalesGroup/crypto11"
	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/pinsource"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// A connection is a module that is initialised for us, a slot in it, and a login.
type connection struct {
	module *module
	uri    *uri
	using  bool // the module is initialised for us
	slot   uint
	info   pkcs11.TokenInfo
	held   *Session      // it keeps the login, which would end with the last session
	lacks  atomic.Uint32 // see ck.NewSession
	// open counts the open sessions, without those of crypto11. most is how many there may be; 0 if the token does not
	// say
	open    atomic.Int64
	most    int64
	signing int // the sessions that crypto11 may open
	// crypto11 gives crypto.Signers. It never gets the PIN: a login counts for all sessions of a process, so ours is
	// enough. It is used only while a session of the pool is held.
	signers *crypto11.Context
}

// acquire initialises the module. crypto11 insists on calling C_Initialize itself, so it comes first. It cannot pass a
// string to the module, so a token whose module needs one has no signers.
func (c *connection) acquire() (err error) {
	if c.uri.reserved == "" {
		config := &crypto11.Config{Path: c.uri.module, LoginNotSupported: true, MaxSessions: c.signing}
		if config.TokenSerial = c.uri.token["serial"]; config.TokenSerial == "" {
			config.TokenLabel = c.uri.token["token"]
		}
		if c.signers, err = crypto11.Configure(config); err != nil {
			c.signers = nil
			if strings.Contains(err.Error(), "could not find PKCS#11 token") {
				return c.noToken()
			}
			return err
		}
	}
	err = c.module.initialize(c.uri.reserved)
	c.using = err == nil
	return err
}

// fewestSigning is how many sessions crypto11 needs: one that stays open, and one that signs.
const fewestSigning = 2

// share divides the sessions that the token allows (CK_TOKEN_INFO) between crypto11 and us, so that no call meets the
// limit. It says whether crypto11 must be started again with fewer.
func (c *connection) share() (again bool, err error) {
	limit := 0
	for _, said := range []uint{c.info.MaxSessionCount, c.info.MaxRwSessionCount} {
		if told(said) && (limit == 0 || int(said) < limit) {
			limit = int(said)
		}
	}
	if limit == 0 {
		return false, nil
	}
	if c.signers == nil {
		c.signing = 0
	} else if most := max(fewestSigning, limit/4); c.signing > most {
		c.signing, again = most, true
	}
	if c.most = int64(limit - c.signing); c.most < 2 {
		return false, fmt.Errorf("%s allows an application %d sessions, and ours needs %d: one that holds the login, "+
			"one that works, and %d for crypto11: have it allow more", c, limit, 2+c.signing, c.signing)
	}
	return again, nil
}

// told says whether a number of CK_TOKEN_INFO means anything. CK_UNAVAILABLE_INFORMATION does not, nor does a very
// large number: openCryptoki allows 2^64-2 sessions.
func told(n uint) bool { return n != pkcs11.CK_EFFECTIVELY_INFINITE && n <= math.MaxInt32 }

// release undoes acquire and login. Nothing may be in the module.
func (c *connection) release() error {
	if c.held != nil {
		c.held.Close()
		c.held = nil
	}
	var errs []error
	if c.using {
		c.using = false
		errs = append(errs, c.module.finalize())
	}
	if c.signers != nil {
		errs = append(errs, c.signers.Close())
		c.signers = nil
	}
	return errors.Join(errs...)
}

func (c *connection) noToken() error {
	var names []string
	for name, value := range c.uri.token {
		names = append(names, name+"="+value)
	}
	slices.Sort(names)
	return unsettledError{error: usage.Errorf("the module %s has no token with %s: check the URI and, for SoftHSM, %s",
		c.uri.module, strings.Join(names, ", "), softhsmConf())}
}

func softhsmConf() string {
	return "SOFTHSM2_CONF (" + cmp.Or(os.Getenv("SOFTHSM2_CONF"), "not set") + ")"
}

// findSlot insists that one token fits: if two have the same label, the wrong one might get the PIN.
func (c *connection) findSlot() (slot uint, info pkcs11.TokenInfo, err error) {
	slots, err := c.module.GetSlotList(true)
	if err != nil {
		return 0, info, Explain("list the module's slots", err)
	}
	found := 0
	for _, id := range slots {
		this, err := c.module.GetTokenInfo(id)
		if err != nil {
			continue // a slot that does not answer is not the one
		}
		has := map[string]string{
			"token": this.Label, "serial": this.SerialNumber, "manufacturer": this.ManufacturerID, "model": this.Model,
		}
		match := true
		for name, want := range c.uri.token {
			match = match && Trim(has[name]) == want
		}
		if match {
			slot, info = id, this
			found++
		}
	}
	switch found {
	case 0:
		return 0, info, c.noToken()
	case 1:
		return slot, info, nil
	}
	return 0, info, usage.Errorf("%d tokens fit %v: add serial=NUMBER to the URI", found, c.uri.token)
}

// Trim removes the padding of the fields of CK_TOKEN_INFO.
func Trim(field string) string { return strings.TrimRight(field, " \x00") }

// logIn logs in, and gives the session that keeps the login.
func (c *connection) logIn(user uint, pin pinsource.PIN) (*Session, error) {
	s, err := c.OpenSession()
	if err != nil {
		return nil, err
	}
	err = s.Ctx.Login(s.ID, user, string(pin))
	if user == pkcs11.CKU_USER && ck.IsCKR(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN) {
		err = nil // two Tokens of one process may share a token; the login is the process's
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// OpenSession opens a session that is not of the pool, for calls that may leave something in it. The caller closes it.
func (c *connection) OpenSession() (*Session, error) {
	if open := c.open.Add(1); c.most > 0 && open > c.most {
		c.open.Add(-1)
		return nil, ErrBusy
	}
	h, err := c.module.OpenSession(c.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		c.open.Add(-1)
		return nil, Explain("open a session", err)
	}
	return &Session{Session: ck.NewSession(c.module.Ctx, h, c.module.functions, &c.lacks), open: &c.open}, nil
}

// reinitialise takes the module through C_Finalize and C_Initialize, and logs in as the user again.
func (c *connection) reinitialise(pin pinsource.PIN) error {
	c.release() // ends the sessions, and the module unless another Token of the process uses it
	if err := c.acquire(); err != nil {
		return fmt.Errorf("the PKCS #11 module cannot be initialised again: %w", err)
	}
	slot, info, err := c.findSlot()
	if err != nil {
		return err
	}
	if info.SerialNumber != c.info.SerialNumber {
		return fmt.Errorf("another token has come in the place of %s", c)
	}
	c.slot = slot
	c.held, err = c.logIn(pkcs11.CKU_USER, pin)
	return Explain("log in again to "+c.String(), err)
}

// String names the token by label and serial number.
func (c *connection) String() string {
	return fmt.Sprintf("token %q (serial %s)", Trim(c.info.Label), c.Serial())
}

// Serial is the token's serial number.
func (c *connection) Serial() string { return Trim(c.info.SerialNumber) }

// Info is what the token said about itself when it was opened.
func (c *connection) Info() pkcs11.TokenInfo { return c.info }

// Ask asks the token and its module what they are. The caller holds a session, so that the module stays.
func (c *connection) Ask(*Session) (token pkcs11.TokenInfo, library pkcs11.Info, err error) {
	if token, err = c.module.GetTokenInfo(c.slot); err != nil {
		return token, library, Explain("ask the token what it is", err)
	}
	library, err = c.module.GetInfo()
	return token, library, Explain("ask the module what it is", err)
}

// Signers gives crypto.Signers, good for as long as the module stays initialised; nil if its URI has x-init-reserved,
// which crypto11 cannot give. The caller holds a session.
func (c *connection) Signers(*Session) *crypto11.Context { return c.signers }

// Can says whether the token has a mechanism for all uses in flags. The caller holds a session.
func (c *connection) Can(m, flags uint) (bool, error) {
	info, err := c.module.GetMechanismInfo(c.slot, ck.Mechanism(m))
	if ck.IsCKR(err, pkcs11.CKR_MECHANISM_INVALID) {
		return false, nil
	}
	if err != nil {
		return false, Explain("ask the token for its mechanisms", err)
	}
	return info.Flags&flags == flags, nil
}
