package tokenkeys

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/mark"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/strict"
)

// A backup carries a token's storage and ledger key to another token of the operator's, and how far the ledger had
// come. Nobody signs it: an operator's token has no key for that.
type backup struct {
	Type       string        `json:"typ"`   // typeBackup
	Token      string        `json:"token"` // the serial number of the token whose keys they are
	Created    time.Time     `json:"created"`
	RestoreKey string        `json:"restore_key"` // RFC 7638 thumbprint of the key that they are wrapped under
	Algorithm  string        `json:"alg"`
	Keys       []backupKey   `json:"keys"`
	Mark       *binding.Mark `json:"mark,omitempty"`
}

type backupKey struct {
	Role       hsmkeys.Role  `json:"role"`
	Generation int           `json:"generation,omitempty"`
	Wrapped    strict.Base64 `json:"wrapped"`
	Check      strict.Base64 `json:"check"` // see hsmkeys.Carried
}

const typeBackup = "kme-token-backup"

// NewBackup makes the file, and what identifies it: the SHA-256 of its bytes, for people to read out.
func NewBackup(
	token string, to *rsa.PublicKey, keys []hsmkeys.Carried, mark *binding.Mark,
) (data []byte, thumbprint string, err error) {
	b := backup{
		Type: typeBackup, Token: token, Created: time.Now().UTC().Truncate(time.Second),
		RestoreKey: pemkey.Thumbprint(to), Algorithm: handover.RSAOAEP, Mark: mark,
	}
	for _, k := range keys {
		b.Keys = append(b.Keys, backupKey{Role: k.Key.Role, Generation: k.Key.Generation, Wrapped: k.Wrapped,
			Check: k.Check})
	}
	data, err = json.MarshalIndent(b, "", "  ")
	data = append(data, '\n')
	return data, backupThumbprint(data), err
}

func backupThumbprint(data []byte) string {
	sum := sha256.Sum256(data)
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// A RestoreToken is what Restore needs of the operator's HSM.
type RestoreToken interface {
	mark.Token
	RestoreKeys(ctx context.Context) ([]*rsa.PublicKey, error)
	CarryIn(ctx context.Context, to *rsa.PublicKey, all []hsmkeys.Carried) ([]hsmkeys.Key, error)
	DestroyRestoreKey(ctx context.Context, pub *rsa.PublicKey) error
}

// Restore imports the keys of a backup into the token, and destroys the key that they came under. Whoever made the
// backup has read out its thumbprint: without it, somebody who swaps the file could give the token keys that they know.
// A backup that was restored before changes nothing. It gives the keys that were imported.
func Restore(ctx context.Context, token RestoreToken, data []byte, thumbprint string) ([]hsmkeys.Key, error) {
	if have := backupThumbprint(data); have != thumbprint {
		return nil, fmt.Errorf("the backup's thumbprint is %s, and the one given is %s: have it read out again, and "+
			"if it differs, do not use this file: it was swapped or damaged on its way", have, thumbprint)
	}
	var b backup
	if err := strict.Parse(data, &b); err != nil {
		return nil, fmt.Errorf("it is no backup, as keysvc backup create writes it: %w", err)
	}
	if b.Type != typeBackup || b.Algorithm != handover.RSAOAEP || len(b.Keys) == 0 {
		return nil, errors.New("it is no backup, as keysvc backup create writes it")
	}
	var all []hsmkeys.Carried
	for _, k := range b.Keys {
		all = append(all, hsmkeys.Carried{Key: hsmkeys.Key{Role: k.Role, Generation: k.Generation}, Wrapped: k.Wrapped,
			Check: k.Check})
	}
	own, err := token.RestoreKeys(ctx)
	if errors.Is(err, hsmkeys.ErrNotDedicated) { // whose advice, init, would make other keys
		return nil, errors.New("this token has no key that a backup can be made for: run keysvc backup prepare on " +
			"it, not init, and make a backup for that key")
	}
	if err != nil {
		return nil, err
	}
	to := &rsa.PublicKey{}
	if at := slices.IndexFunc(own, func(pub *rsa.PublicKey) bool {
		return pemkey.Thumbprint(pub) == b.RestoreKey
	}); at >= 0 {
		to = own[at]
	}
	taken, err := token.CarryIn(ctx, to, all)
	switch {
	case errors.Is(err, hsmkeys.ErrNoKey):
		return nil, fmt.Errorf("the backup was made for key %s, which this token has not got: run keysvc backup "+
			"prepare on it, and make a backup for that: %w", b.RestoreKey, err)
	case err != nil:
		return taken, err
	}
	if err := mark.RaiseTo(ctx, token, b.Mark); err != nil || to.N == nil {
		return taken, err
	}
	return taken, token.DestroyRestoreKey(ctx, to)
}
