package hsmkeys

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

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
	err := token.with(t.Context(), "test", func(s *session) error {
		class := attributes{attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY)}
		_, err := s.create(join(class, named(storageKey), storageTemplate(traits{true, true}),
			attributes{attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), attr(pkcs11.CKA_VALUE, value(storage))}))
		if err != nil {
			return err
		}
		_, err = s.create(join(class, named(ledgerKey), guarded(false), use(usages, pkcs11.CKA_SIGN),
			attributes{attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET), attr(pkcs11.CKA_VALUE, value(ledger))}))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tok.URI
}

func TestGroup(t *testing.T) {
	a, b := withKeys(t, 's', 'l'), withKeys(t, 's', 'l')
	if _, err := OpenGroup(t.Context(), a, withKeys(t, 'x', 'l')); err == nil || !strings.Contains(err.Error(), "the same storage and ledger keys") {
		t.Errorf("another storage key: %v", err)
	}
	if _, err := OpenGroup(t.Context(), a, withKeys(t, 's', 'x')); err == nil || !strings.Contains(err.Error(), "the same storage and ledger keys") {
		t.Errorf("another ledger key: %v", err)
	}
	if _, err := OpenGroup(t.Context(), a, a); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("one token twice: %v", err)
	}
	g := must[*Group](t)(OpenGroup(t.Context(), a, b))
	defer g.Close()
	_, sealed, err := g.tokens[0].sample(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := must[[]RAND](t)(g.EncryptRANDs(t.Context(), sealed, []RAND{{1}}))
	load := func(n int) {
		t.Helper()
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				for range n {
					if got, err := g.EncryptRANDs(t.Context(), sealed, []RAND{{1}}); err != nil || !slices.Equal(got, want) {
						t.Errorf("%x, %v", got, err)
					}
				}
			})
		}
		all.Wait()
	}
	used := func() (n [2]int64) { return [2]int64{g.tokens[0].uses.Load(), g.tokens[1].uses.Load()} }
	before := used()
	load(20)
	after := used()
	if one, two := after[0]-before[0], after[1]-before[1]; one < 60 || two < 60 {
		t.Errorf("the load is shared %d to %d", one, two)
	}
	// One is away: the other does it all, and no call fails.
	for i, away := range g.tokens {
		away.latch.close(errors.New("pulled out"))
		before = used()
		load(10)
		if err := g.Ping(t.Context()); err != nil {
			t.Error(err)
		}
		after = used()
		if n := after[1-i] - before[1-i]; n < 80 {
			t.Errorf("with token %d away the other was used %d times", i, n)
		}
		away.latch.open()
	}
	for _, away := range g.tokens {
		away.latch.close(errors.New("pulled out"))
	}
	if _, err := g.EncryptRANDs(t.Context(), sealed, make([]RAND, 1)); !errors.Is(err, ErrUnavailable) {
		t.Errorf("with both away: %v", err)
	}
	for _, away := range g.tokens {
		away.latch.open()
	}
	load(5)
}

// A token that really goes, its folder moved away under load, is stood in for without a call failing, and does its share again when it is back. It
// has a module of its own, since SoftHSM sees it again only after C_Finalize.
func TestGroupLosesAToken(t *testing.T) {
	module := filepath.Join(t.TempDir(), "softhsm-too.so")
	if err := os.WriteFile(module, must[[]byte](t)(os.ReadFile(softhsmtest.ModulePath())), 0o700); err != nil {
		t.Fatal(err)
	}
	second := strings.ReplaceAll(withKeys(t, 's', 'l'), softhsmtest.ModulePath(), module)
	g := must[*Group](t)(OpenGroup(t.Context(), withKeys(t, 's', 'l'), second))
	defer g.Close()
	_, sealed, err := g.tokens[0].sample(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := must[[]RAND](t)(g.EncryptRANDs(t.Context(), sealed, []RAND{{1}}))
	folder := filepath.Join(softhsmtest.Dir(), "tokens", strings.TrimRight(g.tokens[1].info.Label, " \x00"))
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	var done atomic.Int64
	for range 8 {
		all.Go(func() {
			for ctx.Err() == nil {
				if got, err := g.EncryptRANDs(context.Background(), sealed, []RAND{{1}}); err != nil || !slices.Equal(got, want) {
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
	if err := os.Rename(folder, folder+".away"); err != nil {
		t.Fatal(err)
	}
	before := done.Load()
	for deadline := time.Now().Add(testproc.Patience); g.tokens[1].Health().Cause == nil && time.Now().Before(deadline); {
		time.Sleep(20 * time.Millisecond)
	}
	away := g.tokens[1].Health().Cause
	time.Sleep(200 * time.Millisecond)
	if err := os.Rename(folder+".away", folder); err != nil {
		t.Fatal(err)
	}
	back := func(deadline time.Time) bool {
		for uses := g.tokens[1].uses.Load(); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
			if g.tokens[1].Health().Cause != nil {
				uses = g.tokens[1].uses.Load()
			} else if g.tokens[1].uses.Load() > uses+20 {
				return true
			}
		}
		return false
	}
	if !back(time.Now().Add(testproc.Patience)) {
		t.Errorf("it is not back: %+v", g.tokens[1].Health())
	}
	stop()
	all.Wait()
	if done.Load() == before || away == nil {
		t.Errorf("%d calls while a token was away: %v", done.Load()-before, away)
	}
}
