package factory

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/who"
)

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

// WriteMinutes adds manufacturer, time and who, has the token sign the minutes, and writes them into the state folder.
func WriteMinutes(state string, token Token, m Minutes) (path string, err error) {
	signer, err := openSigner(token)
	if err != nil {
		return "", err
	}
	m.Manufacturer, m.Time, m.Who = signer.KeyID(), time.Now().UTC().Truncate(time.Millisecond), who.Name()
	jws, err := signer.Sign(directory.TypeMinutes, m)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(state, "minutes")
	if err := durable.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	path = filepath.Join(dir, fmt.Sprintf("%s-%s.jws", m.Time.Format("20060102T150405.000Z"), strings.ReplaceAll(m.Ceremony, " ", "-")))
	return path, durable.WriteFile(path, jws, 0o644)
}

// ReadMinutes gives minutes that the manufacturer's token has signed.
func ReadMinutes(path string, jws []byte, v *directory.Verifier) (*Minutes, error) {
	m := new(Minutes)
	return m, v.Verify(directory.TypeMinutes, path, jws, m)
}

// CanSign says whether the token has a signing key.
func CanSign(token Token) error {
	_, err := openSigner(token)
	return err
}
