package binding_test

import (
	"crypto/rsa"
	"testing"

	"github.com/kmehsm/kmehsm/binding/tokenkeys"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testkeys"
)

// Whoever restores to a token that is not prepared is not sent to init: to the keys that it
// makes, nothing can be restored.
func TestRestoreToUnprepared(t *testing.T) {
	token := must[*hsmkeys.OperatorToken](t)(hsmkeys.OpenOperator(t.Context(), softhsmtest.Token(t).URI,
		hsmkeys.Options{}))
	t.Cleanup(func() { token.Close() })
	to := must[*rsa.PrivateKey](t)(testkeys.RSA(3072))
	keys := []hsmkeys.Carried{{Key: hsmkeys.Key{Role: hsmkeys.RoleLedger}, Wrapped: []byte{1}, Check: []byte{1}}}
	data, thumbprint, err := tokenkeys.NewBackup("0123", &to.PublicKey, keys, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tokenkeys.Restore(t.Context(), token, data, thumbprint)
	checkSays(t, "a token that is not prepared", err, "run keysvc backup prepare on it, not init")
}
