package factory

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"
	"unicode"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory/auditlog"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/custody"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/internal/who"
)

const typeMinutes directory.Type = "kme-ceremony-minutes+jws"

// Minutes say what was done with the security officer's PIN, and in whose presence. The token signs them.
type Minutes struct {
	Ceremony     string    `json:"ceremony"` // the command, as "operator enroll"
	Time         time.Time `json:"time"`
	Manufacturer string    `json:"manufacturer"` // RFC 7638 thumbprint of the first signing key
	Token        string    `json:"token"`        // serial number
	Who          string    `json:"who"`          // the operating system's user, and the machine
	Present      []string  `json:"present"`      // as they were named
	// the split whose shares gave the security officer's PIN; null if it came from a file
	Split  *hsmkeys.Split    `json:"so_split"`
	Shares []int             `json:"so_shares"` // the custodians whose shares were used
	Made   map[string]string `json:"made"`      // facts, by names in lower case: strict.Parse takes no others
}

// ErrNoMinutes is in an error after which the ceremony is done, but has no minutes.
var ErrNoMinutes = errors.New("done, but there are no minutes of it")

// A Ceremony is a command that needs the security officer's PIN. It leaves minutes.
type Ceremony struct {
	Name     string   // as in Minutes
	Command  []string // as in auditlog.Entry
	State    State
	TokenURI string
	Officer  custody.Officer
	Basis    custody.Basis
	Present  []string // those who are there, as they were named
}

// CheckPresent refuses what cannot be in minutes, which are printed with a fact a line.
func CheckPresent(names []string) error {
	for _, name := range names {
		if strings.TrimSpace(name) == "" ||
			strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) {
			return fmt.Errorf("%q is no name: give each in one line of text", name)
		}
	}
	return nil
}

// SplitFacts are those of a new split, for the minutes.
func SplitFacts(split *hsmkeys.Split, custodians []custody.Custodian) map[string]string {
	made := map[string]string{"split": split.ID, "threshold": fmt.Sprint(split.Threshold)}
	for i, r := range custodians {
		made[fmt.Sprintf("custodian %02d", i+1)] = r.String()
	}
	return made
}

// An Act does what a ceremony is held for. It gives the facts for the minutes.
type Act func(token string, pin hsmkeys.OfficerPIN) (made map[string]string, err error)

// Hold does act with the security officer's PIN, and writes the minutes of what it has made. Without minutes, hand what
// it has made to nobody. The security officer's login needs the token alone: nothing else in the process may have it
// open.
func (c Ceremony) Hold(ctx context.Context, act Act) (minutes string, err error) {
	m := Minutes{Ceremony: c.Name, Present: append([]string{}, c.Present...)}
	var pin hsmkeys.OfficerPIN
	// the token, which must be able to sign the minutes
	err = withSigner(ctx, c.TokenURI, func(token *hsmkeys.FactoryToken, _ *directory.Signer) (err error) {
		if err := c.State.Check(token); err != nil {
			return usage.Mark(err)
		}
		m.Token = token.Serial()
		pin, m.Shares, err = c.Officer.PIN(ctx, token, c.Basis)
		m.Split = pin.Split
		return err
	})
	if err != nil {
		return "", err
	}
	err = c.State.Log().Record(c.Command, m.Token, func() (err error) {
		if m.Made, err = act(m.Token, pin); err != nil {
			return err
		}
		err = withSigner(ctx, c.TokenURI, func(_ *hsmkeys.FactoryToken, signer *directory.Signer) (err error) {
			minutes, err = c.State.writeMinutes(signer, m)
			return err
		})
		if err != nil {
			err = fmt.Errorf("%s is %w: %w", c.Name, ErrNoMinutes, err)
		}
		return err
	}, func(head *auditlog.Head) error {
		return WithToken(ctx, c.TokenURI, func(token *hsmkeys.FactoryToken) error {
			return c.State.SignLog(token, head)
		})
	})
	return minutes, err
}

// writeMinutes adds manufacturer, time and who, and writes the minutes, signed, into the state folder.
func (s State) writeMinutes(signer *directory.Signer, m Minutes) (path string, err error) {
	m.Manufacturer, m.Time, m.Who = signer.KeyID(), time.Now().UTC().Truncate(time.Millisecond), who.Name()
	jws, err := signer.Sign(typeMinutes, m)
	if err != nil {
		return "", err
	}
	dir := s.path("minutes")
	if err := durable.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	name := m.Time.Format("20060102T150405.000Z-") + strings.ReplaceAll(m.Ceremony, " ", "-") + ".jws"
	path = filepath.Join(dir, name)
	return path, durable.WriteFile(path, jws, 0o644)
}

// ReadMinutes gives minutes that the manufacturer's token has signed.
func ReadMinutes(path string, jws []byte, v *directory.Verifier) (*Minutes, error) {
	m := new(Minutes)
	return m, v.Verify(typeMinutes, path, jws, m)
}

// Enrolled is what an enrolment has made.
type Enrolled struct {
	File    []byte // for the other party
	KeyID   string // of the key in it
	Created bool   // the key was made now
	Made    map[string]string
}

// EnrollOperator makes an operator's KEK in the token, as the security officer, and wraps it for the operator's
// transport key. generation is that of the KEK: 0 for the newest; the next one rotates it; an earlier one is for what
// was wrapped under it. EnrollOperator opens the token itself: nothing else in the process may have it open.
func EnrollOperator(ctx context.Context, tokenURI string, officer hsmkeys.PIN, operator string,
	transport *rsa.PublicKey, generation int) (*Enrolled, error) {
	done := func(kek hsmkeys.Key, wrapped []byte, s *directory.Signer) ([]byte, map[string]string, error) {
		e := &handover.Enrolment{
			Manufacturer: kek.Manufacturer, Operator: operator, TransportKey: pemkey.Thumbprint(transport),
			KEK: kek.HexID(), Algorithm: handover.RSAOAEP, Wrapped: wrapped,
		}
		if err := e.Validate(); err != nil {
			return nil, nil, err
		}
		jws, err := s.Sign(handover.TypeEnrolment, e)
		return jws, map[string]string{"operator": operator, "kek": e.KEK, "transport key": e.TransportKey}, err
	}
	return enroll(ctx, tokenURI, officer, kekOf("", operator), transport, generation, done)
}

// EnrollFixture makes the injection key of a fixture that injects device keys, and wraps it for the fixture's RSA key,
// as EnrollOperator does for an operator. With one more than the newest generation, later packages are for the new key.
func EnrollFixture(ctx context.Context, tokenURI string, officer hsmkeys.PIN, fixture string, key *rsa.PublicKey,
	generation int) (*Enrolled, error) {
	done := func(k hsmkeys.Key, wrapped []byte, s *directory.Signer) ([]byte, map[string]string, error) {
		made := map[string]string{"fixture": fixture, "injection key": k.HexID(),
			"fixture's key": pemkey.Thumbprint(key)}
		file, err := handover.NewFixtureEnrolment(fixture, k.HexID(), wrapped, s.Public()).Marshal()
		return file, made, err
	}
	return enroll(ctx, tokenURI, officer, injectionKey("", fixture), key, generation, done)
}

// enroll makes k as the security officer, and wraps it for to. It adds the manufacturer to k. done makes the file and
// the facts for the minutes.
func enroll(ctx context.Context, tokenURI string, officer hsmkeys.PIN, k hsmkeys.Key, to *rsa.PublicKey, generation int,
	done func(hsmkeys.Key, []byte, *directory.Signer) ([]byte, map[string]string, error)) (*Enrolled, error) {
	if err := directory.CheckName(k.Name); err != nil {
		return nil, err
	}
	// The key's name has the manufacturer, whose signing key only a user can see. So this comes before the security
	// officer's login, which ends the user's.
	err := withSigner(ctx, tokenURI, func(t *hsmkeys.FactoryToken, s *directory.Signer) (err error) {
		if k.Manufacturer = s.KeyID(); generation > 0 {
			k, err = next(ctx, t, k, generation)
		} else {
			k, err = newest(ctx, t, k)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	e := &Enrolled{KeyID: k.HexID()}
	if e.Created, err = hsmkeys.EnrollKey(ctx, tokenURI, officer, k, to); err != nil {
		return nil, fmt.Errorf("enroll %s: %w", k.Name, err)
	}
	err = withSigner(ctx, tokenURI, func(t *hsmkeys.FactoryToken, s *directory.Signer) error {
		wrapped, err := t.WrapEnrolled(ctx, k)
		if err == nil {
			e.File, e.Made, err = done(k, wrapped, s)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	e.Made["file, sha-256"] = fmt.Sprintf("%x", sha256.Sum256(e.File))
	e.Made["key made now"] = map[bool]string{true: "yes", false: "no, earlier"}[e.Created]
	return e, nil
}

func withSigner(ctx context.Context, tokenURI string, f func(*hsmkeys.FactoryToken, *directory.Signer) error) error {
	return WithToken(ctx, tokenURI, func(token *hsmkeys.FactoryToken) error {
		signer, err := openSigner(token)
		if err != nil {
			return err
		}
		return f(token, signer)
	})
}

// WithToken runs f with the manufacturer's token that a URI names.
func WithToken(ctx context.Context, uri string, f func(*hsmkeys.FactoryToken) error) error {
	token, err := hsmkeys.OpenFactory(ctx, uri, hsmkeys.Options{})
	if err != nil {
		return err
	}
	defer token.Close()
	return f(token)
}
