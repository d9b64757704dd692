package hsmkeys

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/kme"
)

// An OperatorPool is an operator's token, or several with the same keys, which the HSM's own tool has copied. They
// share the load; if one is away, the others do its work. All methods may be called concurrently.
type OperatorPool struct{ pool *p11.Pool[*OperatorToken] }

// OpenOperatorPool opens the tokens that the URIs name. It refuses tokens whose storage or ledger keys are not the
// same: a KME that one has sealed would be lost in the other, or accepted there a second time.
func OpenOperatorPool(ctx context.Context, uris []string, o Options) (*OperatorPool, error) {
	if len(uris) == 0 {
		return nil, errors.New("no token is named")
	}
	var tokens []*OperatorToken
	for _, uri := range uris {
		t, err := OpenOperator(ctx, uri, o)
		if err != nil {
			return nil, errors.Join(err, newPool(tokens).Close())
		}
		tokens = append(tokens, t)
	}
	p := newPool(tokens)
	if err := p.checkSame(ctx); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

func newPool(all []*OperatorToken) *OperatorPool { return &OperatorPool{pool: p11.NewPool(all...)} }

func (p *OperatorPool) checkSame(ctx context.Context) error {
	tokens := p.pool.Tokens()
	if len(tokens) < 2 {
		return nil
	}
	first := tokens[0]
	tag, sealed, err := first.sample(ctx)
	if err != nil {
		return err
	}
	want, err := first.EncryptRANDs(ctx, sealed, make([]RAND, 1))
	if err != nil {
		return err
	}
	known := map[string]bool{first.Serial(): true}
	for _, t := range tokens[1:] {
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
			return fmt.Errorf("%s and %s do not have the same storage and ledger keys: copy the keys of the one to "+
				"the other, with keysvc backup", first, t)
		}
	}
	return nil
}

// sample is what the ledger key makes of a fixed message, and the storage key of a random KME.
func (t *OperatorToken) sample(ctx context.Context) ([]byte, []byte, error) {
	type made struct{ tag, sealed []byte }
	m, err := p11.Do(ctx, t.hsm, "sample", func(s *p11.Session) (m made, err error) {
		h, err := t.find(s, pkcs11.CKO_SECRET_KEY, keyspec.Ledger)
		if err != nil {
			return m, err
		}
		if m.tag, err = keyop.HMAC(s, h, make([]byte, kme.SecretSize)); err != nil {
			return m, err
		}
		generation, h, err := t.newestStorage(s)
		if err != nil {
			return m, err
		}
		m.sealed, err = keyop.Seal(s, generation, h, kme.RandomSecret())
		return m, err
	})
	if err != nil {
		return nil, nil, err
	}
	return m.tag, m.sealed, nil
}

// Tokens are those of the pool.
func (p *OperatorPool) Tokens() []*OperatorToken { return p.pool.Tokens() }

// Close closes all.
func (p *OperatorPool) Close() error {
	var errs []error
	for _, t := range p.pool.Tokens() {
		errs = append(errs, t.Close())
	}
	return errors.Join(errs...)
}

func (p *OperatorPool) String() string {
	var names []string
	for _, t := range p.pool.Tokens() {
		names = append(names, t.String())
	}
	return strings.Join(names, ", ")
}

// Sessions is how many operations can be in the tokens at once.
func (p *OperatorPool) Sessions() (n int) {
	for _, t := range p.pool.Tokens() {
		n += t.Sessions()
	}
	return n
}

// OpenPayload is OperatorToken.OpenPayload.
func (p *OperatorPool) OpenPayload(ctx context.Context, in Payload) (*Opened, error) {
	return p11.OnAny(ctx, p.pool, func(t *OperatorToken) (*Opened, error) { return t.OpenPayload(ctx, in) })
}

// ExportKME is OperatorToken.ExportKME.
func (p *OperatorPool) ExportKME(ctx context.Context, in Payload) (kme.Secret, error) {
	return p11.OnAny(ctx, p.pool, func(t *OperatorToken) (kme.Secret, error) { return t.ExportKME(ctx, in) })
}

// EncryptRANDs is OperatorToken.EncryptRANDs.
func (p *OperatorPool) EncryptRANDs(ctx context.Context, sealed []byte, rands []RAND) ([]RAND, error) {
	return p11.OnAny(ctx, p.pool, func(t *OperatorToken) ([]RAND, error) { return t.EncryptRANDs(ctx, sealed, rands) })
}

// DecryptRAND is OperatorToken.DecryptRAND.
func (p *OperatorPool) DecryptRAND(ctx context.Context, sealed []byte, rand RAND) (RAND, error) {
	return p11.OnAny(ctx, p.pool, func(t *OperatorToken) (RAND, error) { return t.DecryptRAND(ctx, sealed, rand) })
}

// Ping shows that one of the tokens can work.
func (p *OperatorPool) Ping(ctx context.Context) error {
	_, err := p11.OnAny(ctx, p.pool, func(t *OperatorToken) (struct{}, error) { return struct{}{}, t.Ping(ctx) })
	return err
}

// Derive is OperatorToken.Derive.
func (p *OperatorPool) Derive(ctx context.Context, purpose string) (kme.Secret, error) {
	return p11.OnAny(ctx, p.pool, func(t *OperatorToken) (kme.Secret, error) { return t.Derive(ctx, purpose) })
}
