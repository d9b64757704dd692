package hsmkeys

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// withKeys is a token with storage and ledger keys of known values, as a copy has them.
func withKeys(t *testing.T, storage, ledger byte) (uri string) {
	t.Helper()
	tok := softhsmtest.Token(t)
	token := open(t, tok)
	must[bool](t)(token.Dedicate(t.Context(), Dedication{Side: Operator}))
	value := func(b byte) []byte { return []byte(strings.Repeat(string(b), 32)) }
	err := token.hsm.With(t.Context(), "test", func(s *p11.Session) error {
		class := ck.Attributes{ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY)}
		_, err := s.Create(ck.Join(class, keyspec.Named(keyspec.Storage),
			keyspec.StorageTemplate(keyspec.Traits{UnwrapTemplate: true, LeavesTrusted: true}),
			ck.Attributes{ck.Attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), ck.Attr(pkcs11.CKA_VALUE, value(storage))}))
		if err != nil {
			return err
		}
		_, err = s.Create(ck.Join(class, keyspec.Named(keyspec.Ledger), ck.Guarded(false),
			ck.Use(ck.Usages, pkcs11.CKA_SIGN),
			ck.Attributes{ck.Attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
				ck.Attr(pkcs11.CKA_VALUE, value(ledger))}))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tok.URI
}

func TestPool(t *testing.T) {
	openPool := func(uris ...string) (*OperatorPool, error) { return OpenOperatorPool(t.Context(), uris, Options{}) }
	a, b := withKeys(t, 's', 'l'), withKeys(t, 's', 'l')
	if _, err := openPool(a, withKeys(t, 'x', 'l')); err == nil ||
		!strings.Contains(err.Error(), "the same storage and ledger keys") {
		t.Errorf("another storage key: %v", err)
	}
	if _, err := openPool(a, withKeys(t, 's', 'x')); err == nil ||
		!strings.Contains(err.Error(), "the same storage and ledger keys") {
		t.Errorf("another ledger key: %v", err)
	}
	if _, err := openPool(a, a); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("one token twice: %v", err)
	}
	g := must[*OperatorPool](t)(openPool(a, b))
	defer g.Close()
	_, sealed, err := g.Tokens()[0].sample(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := must[[]RAND](t)(g.EncryptRANDs(t.Context(), sealed, []RAND{{1}}))
	for range 20 { // whichever token it is
		if got := must[[]RAND](t)(g.EncryptRANDs(t.Context(), sealed, []RAND{{1}})); !slices.Equal(got, want) {
			t.Errorf("%x, want %x", got, want)
		}
		if err := g.Ping(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if _, err := openPool(); err == nil {
		t.Error("a pool without tokens was opened")
	}
}

// A counter counts operations that a token did.
type counter struct{ atomic.Int64 }

func (c *counter) Waited(time.Duration) {}

func (c *counter) Worked(_ string, _ time.Duration, err error) {
	if err == nil {
		c.Add(1)
	}
}

// A token that really goes, its folder moved away under load, is stood in for without a call failing, and does its
// share again when it is back. It has a module of its own, since SoftHSM sees it again only after C_Finalize.
func TestPoolLosesAToken(t *testing.T) {
	module := filepath.Join(t.TempDir(), "softhsm-too.so")
	if err := os.WriteFile(module, must[[]byte](t)(os.ReadFile(softhsmtest.Library())), 0o700); err != nil {
		t.Fatal(err)
	}
	second := strings.ReplaceAll(withKeys(t, 's', 'l'), softhsmtest.ModulePath(), module)
	var served counter
	other := must[*OperatorToken](t)(OpenOperator(t.Context(), second, Options{Observer: &served}))
	g := newPool([]*OperatorToken{must[*OperatorToken](t)(OpenOperator(t.Context(), withKeys(t, 's', 'l'), Options{})),
		other})
	defer g.Close()
	if err := g.checkSame(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, sealed, err := g.Tokens()[0].sample(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := must[[]RAND](t)(g.EncryptRANDs(t.Context(), sealed, []RAND{{1}}))
	folder := filepath.Join(softhsmtest.Dir(), "tokens", p11.Trim(other.hsm.Info().Label))
	elsewhere := filepath.Join(softhsmtest.Dir(), "away") // SoftHSM finds a token by any name of its folder in tokens
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	var done atomic.Int64
	for range 8 {
		all.Go(func() {
			for ctx.Err() == nil {
				if got, err := g.EncryptRANDs(context.Background(), sealed, []RAND{{1}}); err != nil ||
					!slices.Equal(got, want) {
					t.Errorf("%x, %v", got, err)
					return
				}
				done.Add(1)
			}
		})
	}
	for done.Load() < 100 && !t.Failed() {
		time.Sleep(time.Millisecond)
	}
	if err := os.Rename(folder, elsewhere); err != nil {
		t.Fatal(err)
	}
	before := done.Load()
	for deadline := time.Now().Add(testproc.Patience); other.Health().Cause == nil && time.Now().Before(deadline); {
		time.Sleep(20 * time.Millisecond)
	}
	away := other.Health().Cause
	time.Sleep(200 * time.Millisecond)
	if err := os.Rename(elsewhere, folder); err != nil {
		t.Fatal(err)
	}
	back := func(deadline time.Time) bool {
		for uses := served.Load(); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
			if other.Health().Cause != nil {
				uses = served.Load()
			} else if served.Load() > uses+20 {
				return true
			}
		}
		return false
	}
	if !back(time.Now().Add(testproc.Patience)) {
		t.Errorf("it is not back: %+v", other.Health())
	}
	stop()
	all.Wait()
	if done.Load() == before || away == nil {
		t.Errorf("%d calls while a token was away: %v", done.Load()-before, away)
	}
}
