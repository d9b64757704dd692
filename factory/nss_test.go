package factory

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/directory/filestore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/kme"
)

// signsElsewhere is a token whose manufacturer signs with another: NSS softoken signs for none.
type signsElsewhere struct {
	*hsmkeys.FactoryToken
	key *ecdsa.PrivateKey
}

func (s signsElsewhere) Signer(k hsmkeys.Key) (crypto.Signer, error) {
	if k.Generation > 1 {
		return nil, hsmkeys.ErrNoKey
	}
	return s.key, nil
}

// NSS softoken keeps no lot key: it is refused for what it does when it is tried, at init, and at lot create too where
// it is a factory's already. Nothing is made.
func TestNSSRefused(t *testing.T) {
	ctx := t.Context()
	token := must(hsmkeys.OpenFactory(ctx, softhsmtest.NSS(t).URI, hsmkeys.Options{}))
	t.Cleanup(func() { token.Close() })
	check := func(what string, err error) {
		t.Helper()
		for _, want := range []string{
			"wrap a lot key under a key that is not TRUSTED", "wrap a key that is not EXTRACTABLE",
			"wrap a sealed lot key", "make a TRUSTED key for the user, C_GenerateKey",
			"clear CKA_WRAP_WITH_TRUSTED of a lot key", "copy a lot key",
		} {
			if err == nil || !strings.Contains(err.Error(), "does not refuse to "+want) {
				t.Errorf("%s: %v; it does not say %q", what, err, want)
			}
		}
	}
	_, _, _, err := Init(ctx, token)
	check("init", err)
	if has := must(token.Has(ctx, signingKey)); has {
		t.Error("init has made a signing key")
	}
	must(token.Dedicate(ctx, hsmkeys.Dedication{Side: hsmkeys.Factory}))
	store := must(filestore.Open(t.TempDir()))
	line := must(NewLine(signsElsewhere{token, must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))}, store,
		State{Dir: t.TempDir()}))
	tac := must(kme.ParseTAC("35209900"))
	_, err = line.CreateLot(ctx, LotSpec{Lot: "L1", Range: directory.Range{TAC: tac, Count: 4}, Bits: 2048,
		Suite: kme.SuiteECDSA, ShardSize: 4, Primes: hsmkeys.PrimesAuto})
	check("lot create", err)
	if has := must(token.Has(ctx, hsmkeys.Key{Role: hsmkeys.RoleLot, Manufacturer: line.signer.KeyID(),
		Name: "L1"})); has {
		t.Error("lot create has made a key")
	}
	if lots := must(store.List(ctx, "lots")); len(lots) > 0 {
		t.Errorf("lots %q", lots)
	}
}
