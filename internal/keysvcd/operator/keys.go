package operator

import (
	"context"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/kmehsm/kmehsm/binding/mark"
	"github.com/kmehsm/kmehsm/binding/tokenkeys"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/pemkey"
)

// WithToken runs f with the operator's token that a URI names.
func WithToken(ctx context.Context, uri string, f func(*hsmkeys.OperatorToken) error) error {
	token, err := hsmkeys.OpenOperator(ctx, uri, hsmkeys.Options{})
	if err != nil {
		return err
	}
	defer token.Close()
	return f(token)
}

// NewTransportKey makes a transport key, and writes its public half to a file for the manufacturer. It gives the
// thumbprint to read out.
func NewTransportKey(ctx context.Context, token *hsmkeys.OperatorToken, path string) (thumbprint string, err error) {
	if err := checkSpent(ctx, token, path); err != nil {
		return "", err
	}
	return handOut(ctx, token, handover.TypeTransportKey, path, token.NewTransportKey, token.DestroyTransportKey)
}

// NewRestoreKey makes the key that receives a backup, and writes its public half to a file for CreateBackup. The token
// becomes the operator's. It gives the thumbprint to read out.
func NewRestoreKey(
	ctx context.Context, token *hsmkeys.OperatorToken, acceptWeak bool, path string,
) (thumbprint string, err error) {
	if err := checkSpent(ctx, token, path); err != nil {
		return "", err
	}
	if _, _, err := tokenkeys.Dedicate(ctx, token, acceptWeak); err != nil {
		return "", err
	}
	return handOut(ctx, token, handover.TypeRestoreKey, path, token.NewRestoreKey, token.DestroyRestoreKey)
}

// checkSpent fails if there is a file at path, unless its key was this token's and is destroyed: then nobody needs it.
func checkSpent(ctx context.Context, token *hsmkeys.OperatorToken, path string) error {
	taken := durable.CheckNew(path)
	if taken == nil {
		return nil
	}
	data, err := durable.ReadFile(path)
	var k handover.TransportKey
	if err != nil || json.Unmarshal(data, &k) != nil || k.Token != token.Serial() {
		return taken
	}
	for _, waiting := range []func(context.Context) ([]*rsa.PublicKey, error){token.TransportKeys, token.RestoreKeys} {
		keys, err := waiting(ctx)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(keys, func(pub *rsa.PublicKey) bool {
			return pemkey.Thumbprint(pub) == k.Key.KeyID
		}) {
			return fmt.Errorf("%w; its key %s still waits for what it is to receive", taken, k.Key.KeyID)
		}
	}
	return nil
}

// handOut makes a key of a type, and writes the file of its public half. If that fails, the key is destroyed.
func handOut(
	ctx context.Context, token *hsmkeys.OperatorToken, typ, path string,
	newKey func(context.Context) (*rsa.PublicKey, error), destroy func(context.Context, *rsa.PublicKey) error,
) (thumbprint string, err error) {
	pub, err := newKey(ctx)
	if err != nil {
		return "", err
	}
	data, err := handover.NewReceiver(typ, pub, token.Serial())
	if err == nil {
		err = durable.WriteFile(path, data, 0o644)
	}
	if err != nil {
		return "", durable.NotWritten(errors.Join(err, destroy(ctx, pub)))
	}
	return pemkey.Thumbprint(pub), nil
}

// TransportKeys gives the transport keys that wait for their enrolment, by their thumbprints.
func TransportKeys(ctx context.Context, token *hsmkeys.OperatorToken) (map[string]*rsa.PublicKey, error) {
	keys, err := token.TransportKeys(ctx)
	all := map[string]*rsa.PublicKey{}
	for _, pub := range keys {
		all[pemkey.Thumbprint(pub)] = pub
	}
	return all, err
}

// TransportKey is the one of TransportKeys that has a thumbprint.
func TransportKey(ctx context.Context, token *hsmkeys.OperatorToken, thumbprint string) (*rsa.PublicKey, error) {
	all, err := TransportKeys(ctx, token)
	if err == nil && all[thumbprint] == nil {
		err = fmt.Errorf("%s has no transport key %s: see keysvc transport list", token, thumbprint)
	}
	return all[thumbprint], err
}

// A Backup is the file of a token's keys, for one other token.
type Backup struct {
	Data       []byte
	Thumbprint string   // to read out
	Token      string   // the serial number of the token whose keys they are
	Keys       []string // their labels
}

// CreateBackup wraps the storage and ledger keys of a token under another token's key, which it imports as the security
// officer.
func CreateBackup(ctx context.Context, uri string, officer hsmkeys.PIN, to *rsa.PublicKey) (b *Backup, err error) {
	// This comes first: a token allows few tries of the security officer's PIN, and a TRUSTED key would have to be
	// removed again.
	err = WithToken(ctx, uri, func(token *hsmkeys.OperatorToken) error { return token.MustBe(ctx, hsmkeys.Operator) })
	if err != nil {
		return nil, err
	}
	if err := hsmkeys.ImportRecipient(ctx, uri, officer, to); err != nil {
		return nil, err
	}
	return b, WithToken(ctx, uri, func(token *hsmkeys.OperatorToken) error {
		keys, err := token.CarryOut(ctx)
		if err != nil {
			return err
		}
		mark, err := mark.Read(ctx, token)
		if err != nil {
			return err
		}
		b = &Backup{Token: token.Serial()}
		for _, k := range keys {
			b.Keys = append(b.Keys, k.Key.Label())
		}
		b.Data, b.Thumbprint, err = tokenkeys.NewBackup(b.Token, to, keys, mark)
		return err
	})
}
