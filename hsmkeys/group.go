package hsmkeys

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/kme"
)

// A Group is one token, or several with the same keys, as an HSM's own tool makes them: they share the load, and what one of them cannot do because it
// is away, another does. All methods may be called concurrently.
type Group struct {
	tokens []*Token
	next   atomic.Uint64
}

// OpenGroup opens the tokens that the URIs name. It refuses tokens whose storage or ledger keys are not the same: a KME sealed in one would be lost in
// the other, or accepted there a second time.
func OpenGroup(ctx context.Context, uris ...string) (g *Group, err error) {
	g = new(Group)
	defer func() {
		if err != nil {
			g.Close()
		}
	}()
	for _, uri := range uris {
		t, err := Open(ctx, uri)
		if err != nil {
			return g, err
		}
		g.tokens = append(g.tokens, t)
	}
	return g, g.checkSame(ctx)
}

func (g *Group) checkSame(ctx context.Context) error {
	if len(g.tokens) < 2 {
		return nil
	}
	first := g.tokens[0]
	tag, sealed, err := first.sample(ctx)
	if err != nil {
		return err
	}
	want, err := first.EncryptRANDs(ctx, sealed, make([]RAND, 1))
	if err != nil {
		return err
	}
	known := map[string]bool{first.Serial(): true}
	for _, t := range g.tokens[1:] {
		if known[t.Serial()] {
			return fmt.Errorf("%s is named twice", t)
		}
		known[t.Serial()] = true
		other, _, err := t.sample(ctx)
		if err != nil {
			return err
		}
		got, err := t.EncryptRANDs(ctx, sealed, make([]RAND, 1))
		if err != nil || got[0] != want[0] || !bytes.Equal(tag, other) {
			return fmt.Errorf("%s and %s do not have the same storage and ledger keys: copy the keys of the one to the other, with keysvc backup", first, t)
		}
	}
	return nil
}

// sample is what the ledger key makes of a fixed message, and the storage key of a random KME.
func (t *Token) sample(ctx context.Context) ([]byte, []byte, error) {
	type made struct{ tag, sealed []byte }
	m, err := do(ctx, t, "sample", func(s *session) (m made, err error) {
		h, err := t.find(s, pkcs11.CKO_SECRET_KEY, ledgerKey)
		if err != nil {
			return m, err
		}
		if m.tag, err = hmac(s, h, make([]byte, kme.SecretSize)); err != nil {
			return m, err
		}
		generation, h, err := t.newestStorage(s)
		if err != nil {
			return m, err
		}
		m.sealed, err = seal(s, generation, h, kme.RandomSecret())
		return m, err
	})
	if err != nil {
		return nil, nil, err
	}
	return m.tag, m.sealed, nil
}

// Tokens are those of the group.
func (g *Group) Tokens() []*Token { return g.tokens }

// Close closes all.
func (g *Group) Close() error {
	var errs []error
	for _, t := range g.tokens {
		errs = append(errs, t.Close())
	}
	return errors.Join(errs...)
}

func (g *Group) String() string {
	var names []string
	for _, t := range g.tokens {
		names = append(names, t.String())
	}
	return strings.Join(names, ", ")
}

// Sessions is how many operations can be in the tokens at once.
func (g *Group) Sessions() (n int) {
	for _, t := range g.tokens {
		n += t.Sessions()
	}
	return n
}

// SetHangTimeout and Observe are those of all tokens.
func (g *Group) SetHangTimeout(d time.Duration) {
	for _, t := range g.tokens {
		t.SetHangTimeout(d)
	}
}

// Observe is described at SetHangTimeout.
func (g *Group) Observe(o Observer) {
	for _, t := range g.tokens {
		t.Observe(o)
	}
}

// VerifyInSoftware is that of all tokens.
func (g *Group) VerifyInSoftware() {
	for _, t := range g.tokens {
		t.VerifyInSoftware()
	}
}

// inGroup does an operation on one token after the other, beginning with another one each time, until one is there and has the key: of a storage key
// that is being rotated, the newest generation is in one token first. All that a Group does can be done twice.
func inGroup[T any](g *Group, f func(*Token) (T, error)) (out T, err error) {
	first := int(g.next.Add(1) % uint64(len(g.tokens)))
	for i := range g.tokens {
		out, err = f(g.tokens[(first+i)%len(g.tokens)])
		if c := classify(err); !errors.Is(err, ErrUnavailable) && c != classDevice && c != classSession && c != classSuspect && !errors.Is(err, ErrNoKey) {
			return out, err
		}
	}
	return out, err
}

// OpenPayload is Token.OpenPayload.
func (g *Group) OpenPayload(ctx context.Context, p Payload) (*Opened, error) {
	return inGroup(g, func(t *Token) (*Opened, error) { return t.OpenPayload(ctx, p) })
}

// ExportKME is Token.ExportKME.
func (g *Group) ExportKME(ctx context.Context, p Payload) (kme.Secret, error) {
	return inGroup(g, func(t *Token) (kme.Secret, error) { return t.ExportKME(ctx, p) })
}

// EncryptRANDs is Token.EncryptRANDs.
func (g *Group) EncryptRANDs(ctx context.Context, sealed []byte, rands []RAND) ([]RAND, error) {
	return inGroup(g, func(t *Token) ([]RAND, error) { return t.EncryptRANDs(ctx, sealed, rands) })
}

// DecryptRAND is Token.DecryptRAND.
func (g *Group) DecryptRAND(ctx context.Context, sealed []byte, rand RAND) (RAND, error) {
	return inGroup(g, func(t *Token) (RAND, error) { return t.DecryptRAND(ctx, sealed, rand) })
}

// Ping shows that one of the tokens can work.
func (g *Group) Ping(ctx context.Context) error {
	_, err := inGroup(g, func(t *Token) (struct{}, error) { return struct{}{}, t.Ping(ctx) })
	return err
}

// Derive is Token.Derive.
func (g *Group) Derive(ctx context.Context, purpose string) (kme.Secret, error) {
	return inGroup(g, func(t *Token) (kme.Secret, error) { return t.Derive(ctx, purpose) })
}
