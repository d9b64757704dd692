package hsmkeys

import (
	"bytes"
	"context"
	"crypto/rsa"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testkeys"
)

// newOperatorClosed is newOperator, for those who log in as the security officer.
func newOperatorClosed(t *testing.T) softhsmtest.Tok {
	t.Helper()
	tok := softhsmtest.Token(t)
	whileOpen(t, tok, func(token *OperatorToken) {
		must[bool](t)(token.Dedicate(t.Context(), Dedication{Side: Operator}))
		must[bool](t)(token.EnsureStorageKey(t.Context()))
		must[bool](t)(token.EnsureLedgerKey(t.Context()))
	})
	return tok
}

// whileOpen has a token open meanwhile.
func whileOpen(t *testing.T, tok softhsmtest.Tok, f func(*OperatorToken)) {
	t.Helper()
	token := must[*OperatorToken](t)(OpenOperator(t.Context(), tok.URI, Options{}))
	f(token)
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
}

// backUp is the backup of a token for a receiving key.
func backUp(t *testing.T, tok softhsmtest.Tok, to *rsa.PublicKey) (all []Carried) {
	t.Helper()
	if err := ImportRecipient(t.Context(), tok.URI, PIN(tok.SOPIN), to); err != nil {
		t.Fatal(err)
	}
	whileOpen(t, tok, func(token *OperatorToken) { all = must[[]Carried](t)(token.CarryOut(t.Context())) })
	return all
}

func TestBackup(t *testing.T) {
	ctx := t.Context()
	first := newOperatorClosed(t)
	secondTok := softhsmtest.Token(t)
	second := open(t, secondTok)
	must[bool](t)(second.Dedicate(ctx, Dedication{Side: Operator}))
	to := must[*rsa.PublicKey](t)(second.NewRestoreKey(ctx))
	all := backUp(t, first, to)

	// Whoever has the PIN of the token cannot make another backup, and under the recipient of one nothing else leaves.
	whileOpen(t, first, func(token *OperatorToken) {
		if _, err := token.CarryOut(ctx); !errors.Is(err, ErrNoKey) {
			t.Errorf("a backup without the security officer: %v", err)
		}
	})
	if err := ImportRecipient(ctx, first.URI, PIN(first.SOPIN), to); err != nil {
		t.Fatal(err)
	}
	whileOpen(t, first, func(token *OperatorToken) {
		if err := token.hsm.With(ctx, "test", func(s *p11.Session) error {
			recipient, err := token.find(s, pkcs11.CKO_PUBLIC_KEY, keyspec.Backup)
			if err != nil {
				return err
			}
			h, err := s.Generate(pkcs11.CKM_AES_KEY_GEN,
				ck.Join(keyspec.SealableKME, ck.Attributes{ck.Attr(pkcs11.CKA_VALUE_LEN, 32)}))
			if err != nil {
				return err
			}
			if _, err := s.Wrap(keyspec.OAEP, recipient, h, make([]byte, keyspec.WrappedRoom)); err == nil {
				t.Error("another key leaves under the recipient of a backup")
			}
			own, _, err := s.GeneratePair(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN,
				ck.Join(keyspec.RSAPublic(3072), ck.Attributes{ck.Attr(pkcs11.CKA_WRAP, true)}),
				ck.Join(ck.Guarded(false), ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, false)}))
			if err != nil {
				return err
			}
			for _, k := range []Key{keyspec.Storage, keyspec.Ledger} {
				h, err := token.find(s, pkcs11.CKO_SECRET_KEY, k)
				if err != nil {
					return err
				}
				if _, err := s.Wrap(keyspec.OAEP, own, h, make([]byte, keyspec.WrappedRoom)); !ck.IsCKR(err,
					pkcs11.CKR_KEY_NOT_WRAPPABLE) {
					t.Errorf("%s leaves under a key of the user's: %v", k, err)
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		must[[]Carried](t)(token.CarryOut(ctx))
	})

	// What is not as it was made is not taken, and leaves nothing.
	for _, c := range []struct {
		name   string
		change func(all []Carried) []Carried
		want   string
	}{
		{"a damaged key", func(all []Carried) []Carried {
			all[1].Wrapped[5] ^= 1
			return all
		}, "wrapped for another key"},
		{"for another token", func(all []Carried) []Carried {
			other := must[*rsa.PrivateKey](t)(testkeys.RSA(3072))
			return backUp(t, first, &other.PublicKey)
		}, "wrapped for another key"},
		{"another ledger key", func(all []Carried) []Carried { all[0].Check[0] ^= 1; return all }, "make another"},
		{"another storage key", func(all []Carried) []Carried { all[1].Check[9] ^= 1; return all }, "make another"},
		{"keys that were exchanged", func(all []Carried) []Carried {
			all[0].Wrapped, all[1].Wrapped = all[1].Wrapped, all[0].Wrapped
			return all
		}, "make another"},
		{"a key of another kind", func(all []Carried) []Carried { all[1].Key = testKEK; return all }, "no backup has"},
		{"a generation that there is not", func(all []Carried) []Carried {
			all[1].Key.Generation = 65
			return all
		}, "no backup has"},
		{"nothing in it", func(all []Carried) []Carried { all[1].Wrapped = nil; return all }, "no backup has"},
	} {
		changed := slices.Clone(all)
		for i := range changed {
			changed[i].Wrapped, changed[i].Check = bytes.Clone(all[i].Wrapped), bytes.Clone(all[i].Check)
		}
		if _, err := second.CarryIn(ctx, to, c.change(changed)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		for _, k := range []Key{keyspec.Storage, keyspec.Ledger} {
			if must[bool](t)(second.Has(ctx, k)) {
				t.Errorf("%s: the token has %s", c.name, k)
			}
		}
	}

	if taken := must[[]Key](t)(second.CarryIn(ctx, to, all)); len(taken) != 2 {
		t.Errorf("taken %v", taken)
	}
	if err := second.DestroyRestoreKey(ctx, to); err != nil {
		t.Fatal(err)
	}
	if taken := must[[]Key](t)(second.CarryIn(ctx, to, all)); len(taken) != 0 {
		t.Errorf("taken again %v", taken)
	}
	group, err := OpenOperatorPool(ctx, []string{first.URI, secondTok.URI}, Options{})
	if err != nil {
		t.Fatalf("the two are not the same: %v", err)
	}
	defer group.Close()
	// They are as init makes them.
	for _, k := range []Key{keyspec.Storage, keyspec.Ledger} {
		checkSameAttributes(t, group.Tokens()[0], second, k)
	}
	_, sealed, err := group.Tokens()[0].sample(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.hsm.With(ctx, "test", func(s *p11.Session) error {
		h, err := second.find(s, pkcs11.CKO_SECRET_KEY, keyspec.Storage)
		if err != nil {
			return err
		}
		if _, err := s.Unwrap(pkcs11.CKM_AES_KEY_WRAP, h, sealed[1:],
			ck.With(keyspec.UsableKME, ck.Attr(pkcs11.CKA_SENSITIVE, false))); err == nil {
			t.Error("a KME is unwrapped in the restored token as one that can be read")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}

	// A token with keys of its own stays as it is.
	third := open(t, newOperatorClosed(t))
	to = must[*rsa.PublicKey](t)(third.NewRestoreKey(ctx))
	if _, err := third.CarryIn(ctx, to, all); err == nil ||
		!strings.Contains(err.Error(), "restore to a token without keys") {
		t.Errorf("a token with keys of its own: %v", err)
	}
}

// checkSameAttributes compares what says who may do what with a key.
func checkSameAttributes(t *testing.T, a, b *OperatorToken, k Key) {
	t.Helper()
	types := append(slices.Clone(ck.Usages), pkcs11.CKA_TOKEN, pkcs11.CKA_PRIVATE, pkcs11.CKA_SENSITIVE,
		pkcs11.CKA_EXTRACTABLE, pkcs11.CKA_WRAP_WITH_TRUSTED,
		pkcs11.CKA_TRUSTED, pkcs11.CKA_COPYABLE, pkcs11.CKA_MODIFIABLE, pkcs11.CKA_LABEL, pkcs11.CKA_KEY_TYPE)
	read := func(token *OperatorToken) (out ck.Attributes) {
		if err := token.hsm.With(context.Background(), "test", func(s *p11.Session) error {
			h, err := token.find(s, pkcs11.CKO_SECRET_KEY, k)
			if err != nil {
				return err
			}
			for _, typ := range types {
				out = append(out, ck.Attr(typ, nil))
			}
			out, err = s.Ctx.GetAttributeValue(s.ID, h, out)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return out
	}
	for i, x := range read(a) {
		if y := read(b)[i]; !bytes.Equal(x.Value, y.Value) {
			t.Errorf("%s: attribute %#x is %x in one token, %x in the other", k, x.Type, x.Value, y.Value)
		}
	}
}

func TestRotation(t *testing.T) {
	ctx := t.Context()
	tok := newOperatorClosed(t)
	var old [][]byte
	var want []RAND
	whileOpen(t, tok, func(token *OperatorToken) {
		for range 50 {
			_, sealed, err := token.sample(ctx)
			if err != nil {
				t.Fatal(err)
			}
			old = append(old, sealed)
			want = append(want, must[[]RAND](t)(token.EncryptRANDs(ctx, sealed, make([]RAND, 1)))[0])
		}
	})
	if _, err := OpenRotation(ctx, tok.URI, "not the PIN", Options{}); err == nil {
		t.Fatal("without the security officer's PIN")
	}
	whileOpen(t, tok, func(token *OperatorToken) {
		if all := must[[]int](t)(token.StorageGenerations(ctx)); !slices.Equal(all, []int{1}) {
			t.Errorf("after a wrong PIN there are generations %v", all)
		}
	})
	r := must[*Rotation](t)(OpenRotation(ctx, tok.URI, PIN(tok.SOPIN), Options{}))
	// One that was interrupted goes on, under the same generation.
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	// it is reinitialised meanwhile
	r = must[*Rotation](t)(OpenRotation(ctx, tok.URI, PIN(tok.SOPIN), Options{renewAfter: 20}))
	if r.Newest != 2 {
		t.Errorf("it seals under generation %d", r.Newest)
	}
	fresh := make([][]byte, len(old))
	var wg sync.WaitGroup
	for i, sealed := range old {
		wg.Go(func() {
			var err error
			if fresh[i], err = r.Reseal(ctx, sealed); err != nil {
				t.Errorf("reseal: %v", err)
			}
		})
	}
	wg.Wait()
	damaged := bytes.Clone(old[0])
	damaged[20] ^= 1
	if _, err := r.Reseal(ctx, damaged); err == nil {
		t.Error("a damaged KME was sealed again")
	}
	if _, err := r.Reseal(ctx, append([]byte{9}, old[0][1:]...)); !errors.Is(err, ErrNoKey) {
		t.Errorf("a KME of a generation that there is not: %v", err)
	}
	if _, err := r.Reseal(ctx, nil); err == nil {
		t.Error("no KME was sealed again")
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	whileOpen(t, tok, func(token *OperatorToken) {
		for i, sealed := range fresh {
			if bytes.Compare(old[i], SealedFrom(2)) >= 0 || bytes.Compare(sealed, SealedFrom(2)) < 0 {
				t.Fatalf("%x became %x", old[i], sealed)
			}
			for _, s := range [][]byte{old[i], sealed} {
				if got := must[[]RAND](t)(token.EncryptRANDs(ctx, s, make([]RAND, 1))); got[0] != want[i] {
					t.Errorf("under %x, a RAND is another", s)
				}
			}
		}
		// Nothing is left that could do it again.
		if err := token.hsm.With(ctx, "test", func(s *p11.Session) error {
			for _, class := range []uint{pkcs11.CKO_PUBLIC_KEY, pkcs11.CKO_PRIVATE_KEY} {
				if left, err := s.Find(ck.Attributes{ck.Attr(pkcs11.CKA_CLASS, class)}); err != nil || len(left) > 0 {
					t.Errorf("%d keys of class %d are left, error %v", len(left), class, err)
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for _, k := range []Key{keyspec.StorageGeneration(1), keyspec.StorageGeneration(2)} {
			checkSameAttributes(t, token, token, k)
		}
		if err := token.DestroyStorageKey(ctx, 2); err == nil || !strings.Contains(err.Error(), "in use") {
			t.Errorf("the newest destroyed: %v", err)
		}
		if err := token.DestroyStorageKey(ctx, 1); err != nil {
			t.Error(err)
		}
		if all := must[[]int](t)(token.StorageGenerations(ctx)); !slices.Equal(all, []int{2}) {
			t.Errorf("there are generations %v", all)
		}
	})
	// The next rotation begins from there.
	r = must[*Rotation](t)(OpenRotation(ctx, tok.URI, PIN(tok.SOPIN), Options{}))
	defer r.Close()
	if r.Newest != 3 {
		t.Errorf("the next rotation seals under generation %d", r.Newest)
	}
	must[[]byte](t)(r.Reseal(ctx, fresh[0]))
}

// Whoever has the token open notices a new storage key: when it meets a KME under it, and by itself.
func TestNewStorageKeyIsNoticed(t *testing.T) {
	ctx := t.Context()
	tok := newOperatorClosed(t)
	serving, other := open(t, tok), open(t, tok)
	sealedUnder := func(token *OperatorToken) int {
		t.Helper()
		_, sealed, err := token.sample(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return int(sealed[0])
	}
	sealedUnder(serving)
	// it is not asked again by itself
	serving.sealing.Store(&sealing{1, serving.sealing.Load().until.Add(1 << 40), serving.hsm.Epoch()})
	must[bool](t)(other.makeStorage(ctx, keyspec.StorageGeneration(2)))
	if g := sealedUnder(serving); g != 1 {
		t.Fatalf("sealed under %d already: this test tests nothing", g)
	}
	_, sealed, err := other.sample(ctx)
	if err != nil {
		t.Fatal(err)
	}
	must[[]RAND](t)(serving.EncryptRANDs(ctx, sealed, make([]RAND, 1)))
	if g := sealedUnder(serving); g != 2 {
		t.Errorf("after a KME of generation 2, sealed under %d", g)
	}
	must[bool](t)(other.makeStorage(ctx, keyspec.StorageGeneration(3)))
	// time has passed
	serving.sealing.Store(&sealing{2, serving.sealing.Load().until.Add(-LookAgain), serving.hsm.Epoch()})
	if g := sealedUnder(serving); g != 3 {
		t.Errorf("after a while, sealed under %d", g)
	}
}

// What a rotation that was killed and a backup that nobody has restored leave behind, the doctor says how to get rid
// of.
func TestDoctorOfWhatWaits(t *testing.T) {
	token := newOperatorOn(t, softhsmtest.Token(t))
	must[*rsa.PublicKey](t)(token.NewRestoreKey(t.Context()))
	must[*rsa.PublicKey](t)(token.newReceiver(t.Context(), keyspec.RotationLabel, keyspec.ImportedKEK))
	says := map[string]string{keyspec.RestoreLabel: "keysvc backup restore",
		keyspec.RotationLabel: "keysvc storage rotate again"}
	for _, f := range must[[]Finding](t)(token.DoctorOperator(t.Context())) {
		for label, want := range says {
			if strings.HasPrefix(f.Check, `key "`+label) {
				if f.OK || !strings.Contains(f.Consequence, want) {
					t.Errorf("%s: %v, %s", f.Check, f.OK, f.Consequence)
				}
				delete(says, label)
			}
		}
	}
	if len(says) > 0 {
		t.Errorf("not reported: %v", says)
	}
}
