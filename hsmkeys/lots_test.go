package hsmkeys

import (
	"crypto/rsa"
	"errors"
	"strconv"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/testkeys"
)

// After RememberLotKeys no lot's key is looked for; but two of one name are refused as before.
func TestRememberLotKeys(t *testing.T) {
	token := newOperator(t)
	key := must[*rsa.PrivateKey](t)(testkeys.RSA(2048))
	lot := func(i int) Key { return Key{Role: RoleLot, Manufacturer: manufacturer, Name: "L" + strconv.Itoa(i)} }
	for i := range 3 {
		importLot(t, token, lot(i), key)
	}
	before := must[[]pkcs11.ObjectHandle](t)(p11.Do(t.Context(), token.hsm, "test",
		func(s *p11.Session) ([]pkcs11.ObjectHandle, error) {
			var all []pkcs11.ObjectHandle
			for i := range 3 {
				h, err := token.find(s, pkcs11.CKO_PRIVATE_KEY, lot(i))
				if err != nil {
					return nil, err
				}
				all = append(all, h)
			}
			_, err := s.Copy(all[2], ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, true)})
			return all, err
		}))
	token.hsm.Forget()
	if n := must[int](t)(token.RememberLotKeys(t.Context())); n != 2 {
		t.Errorf("%d keys", n)
	}
	looked := errors.New("it is looked for")
	for i, want := range before[:2] {
		h, err := token.hsm.Remembered(p11.Object{Class: pkcs11.CKO_PRIVATE_KEY, ID: string(lot(i).ID())},
			func() (pkcs11.ObjectHandle, error) { return 0, looked })
		if err != nil || h != want {
			t.Errorf("lot %d: handle %d, not %d, %v", i, h, want, err)
		}
	}
	// What it has found before a reconnect is not taken after it.
	epoch, of := token.hsm.Epoch(), p11.Object{Class: pkcs11.CKO_PRIVATE_KEY, ID: "old"}
	token.hsm.Forget()
	token.hsm.Remember(epoch, of, 1)
	if _, err := token.hsm.Remembered(of, func() (pkcs11.ObjectHandle, error) { return 0, looked }); err != looked {
		t.Errorf("a handle of before a reconnect: %v", err)
	}
	if has, err := token.Has(t.Context(), lot(2)); err == nil {
		t.Errorf("two keys of one name: %v", has)
	}
}
