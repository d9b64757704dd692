package hsmkeys

import (
	"context"
	"crypto/rsa"
	"time"

	"github.com/kmehsm/kmehsm/hsmkeys/doctor"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/kme"
)

// Weaknesses are the failed trials of what a side's keys depend on. No key of the token is touched.
func (b *base) Weaknesses(ctx context.Context, side Side) ([]Finding, error) {
	return doctor.Weaknesses(ctx, b.hsm, side)
}

// DoctorFactory says what the token can and cannot do as a manufacturer's.
func (t *FactoryToken) DoctorFactory(ctx context.Context, keys ...Key) ([]Finding, error) {
	report, err := t.mechanisms(ctx, Factory, keys)
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		if k.Role == RoleInjection {
			report = append(report, doctor.Measured("device key made, wrapped, destroyed",
				"lot provision, on one session", 20,
				func() error { _, _, err := t.MakeDeviceKey(ctx, kme.SuiteECDSA, k); return err }))
		}
	}
	return t.examine(ctx, Factory, report)
}

// DoctorOperator says what the token can and cannot do as an operator's.
func (t *OperatorToken) DoctorOperator(ctx context.Context) ([]Finding, error) {
	keys := []Key{keyspec.Ledger}
	if has, err := t.hasStorage(ctx); err != nil {
		return nil, err
	} else if !has {
		keys = append(keys, keyspec.Storage)
	}
	report, err := t.mechanisms(ctx, Operator, keys)
	if err != nil {
		return nil, err
	}
	return t.examine(ctx, Operator, report)
}

// mechanisms reports the mechanisms, and which keys are missing. Keys that are there are reported by examine.
func (b *base) mechanisms(ctx context.Context, side Side, keys []Key) ([]Finding, error) {
	report, err := doctor.Mechanisms(ctx, b.hsm, side)
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		has, err := b.Has(ctx, k)
		if err != nil {
			return nil, err
		}
		if !has {
			report = append(report, doctor.Missing(k))
		}
	}
	return report, nil
}

// examine adds the trials to a report, and how the keys and the token are.
func (b *base) examine(ctx context.Context, side Side, report []Finding) ([]Finding, error) {
	seen, err := doctor.Examine(ctx, b.hsm, side)
	if err != nil {
		return nil, err
	}
	id, err := b.Identity(ctx)
	return append(append(report, seen...), id.ReportPINs()), err
}

// Identity asks the token what it is.
func (b *base) Identity(ctx context.Context) (Identity, error) {
	return p11.Do(ctx, b.hsm, "ask the token what it is", func(s *p11.Session) (Identity, error) {
		id, err := doctor.Identify(b.hsm, s)
		if d, derr := b.dedication(s); err == nil && derr == nil {
			id.Dedicated, id.Weak = d.Side, d.Weak
		}
		return id, err
	})
}

// BareDecryptions is the baseline of OpenPayload: raw decryptions a second with a lot key, on so many sessions; with 0
// on as many as SoftHSM is the fastest with.
func (t *OperatorToken) BareDecryptions(
	ctx context.Context, lot Key, n *rsa.PublicKey, sessions int, d time.Duration,
) (float64, error) {
	return doctor.BareDecryptions(ctx, t.hsm, lot, n, sessions, d)
}

// BareDeviceKeys is the baseline of MakeDeviceKey in the suites with P-256.
func (t *FactoryToken) BareDeviceKeys(ctx context.Context, injection Key, d time.Duration) (float64, error) {
	return doctor.BareDeviceKeys(ctx, t.hsm, injection, d)
}
