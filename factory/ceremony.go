package factory

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory/auditlog"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/custody"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/who"
)

const typeMinutes directory.Type = "kme-ceremony-minutes+jws"

// Minutes say what was done with the security officer's PIN, and in whose presence. The token signs them.
type Minutes struct {
	Ceremony     string            `json:"ceremony"` // the command, as "operator enroll"
	Time         time.Time         `json:"time"`
	Manufacturer string            `json:"manufacturer"` // RFC 7638 thumbprint of the first signing key
	Token        string            `json:"token"`        // serial number
	Who          string            `json:"who"`          // the operating system's user, and the machine
	Present      []string          `json:"present"`      // as they were named
	Split        *hsmkeys.Split    `json:"so_split"`     // that gave the security officer's PIN; null if it came from a file
	Shares       []int             `json:"so_shares"`    // the custodians whose shares were used
	Made         map[string]string `json:"made"`
}

// ErrNoMinutes goes with an error after which a ceremony is done and has no minutes.
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

// Hold runs f with the security officer's PIN, and writes the minutes of what f has made. Without minutes, what f has
// made is to be handed to nobody. The security officer's login needs the token for itself: nobody else in the process
// may have it open.
func (c Ceremony) Hold(ctx context.Context, f func(token string, pin hsmkeys.OfficerPIN) (made map[string]string, err error)) (minutes string, err error) {
	m := Minutes{Ceremony: c.Name, Present: append([]string{}, c.Present...)}
	var pin hsmkeys.OfficerPIN
	err = withSigner(ctx, c.TokenURI, func(token *hsmkeys.Token, _ *directory.Signer) (err error) { // which can sign the minutes
		m.Token = token.Serial()
		pin, m.Shares, err = c.Officer.PIN(ctx, token, c.Basis)
		m.Split = pin.Split
		return err
	})
	if err != nil {
		return "", err
	}
	err = c.State.Log().Record(c.Command, m.Token, func() (err error) {
		if m.Made, err = f(m.Token, pin); err != nil {
			return err
		}
		err = withSigner(ctx, c.TokenURI, func(_ *hsmkeys.Token, signer *directory.Signer) (err error) {
			minutes, err = c.State.writeMinutes(signer, m)
			return err
		})
		if err != nil {
			err = fmt.Errorf("%s is %w: %w", c.Name, ErrNoMinutes, err)
		}
		return err
	}, func(head *auditlog.Head) error {
		return withToken(ctx, c.TokenURI, func(token *hsmkeys.Token) error { return c.State.SignLog(token, head) })
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
	if err := durable.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	path = filepath.Join(dir, fmt.Sprintf("%s-%s.jws", m.Time.Format("20060102T150405.000Z"), strings.ReplaceAll(m.Ceremony, " ", "-")))
	return path, durable.WriteFile(path, jws, 0o644)
}

// ReadMinutes gives minutes that the manufacturer's token has signed.
func ReadMinutes(path string, jws []byte, v *directory.Verifier) (*Minutes, error) {
	m := new(Minutes)
	return m, v.Verify(typeMinutes, path, jws, m)
}
