package binding

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/kme"
)

// An IntakeToken is what taking in enrolments and lots needs of the operator's HSM.
type IntakeToken interface {
	TransportKeys(ctx context.Context) ([]*rsa.PublicKey, error)
	DestroyTransportKey(ctx context.Context, pub *rsa.PublicKey) error
	Has(ctx context.Context, k hsmkeys.Key) (bool, error)
	UnwrapKEK(ctx context.Context, kek hsmkeys.Key, transport *rsa.PublicKey, wrapped []byte) error
	UnwrapLotKey(ctx context.Context, lot, kek hsmkeys.Key, wrapped []byte, pub *rsa.PublicKey) (taken bool, err error)
	RemoveLotKey(ctx context.Context, k hsmkeys.Key) error
	MustBe(ctx context.Context, side hsmkeys.Side) error
}

// An InitToken is what Init needs of the operator's HSM.
type InitToken interface {
	DedicateToken
	MarkToken
	EnsureStorageKey(ctx context.Context) (created bool, err error)
	EnsureLedgerKey(ctx context.Context) (created bool, err error)
}

// A DedicateToken is what Dedicate needs of it.
type DedicateToken interface {
	Weaknesses(ctx context.Context, side hsmkeys.Side) ([]hsmkeys.Finding, error)
	Weak(ctx context.Context) ([]string, error)
	Dedicate(ctx context.Context, d hsmkeys.Dedication) (created bool, err error)
}

// Init is Dedicate, and makes the token's storage key, ledger key and high-water mark unless it has them.
func Init(ctx context.Context, token InitToken, accept bool) (created bool, weak []string, err error) {
	created, weak, err = Dedicate(ctx, token, accept)
	mark := func(ctx context.Context) (bool, error) { return ensureMark(ctx, token) }
	for _, ensure := range []func(context.Context) (bool, error){token.EnsureStorageKey, token.EnsureLedgerKey, mark} {
		if err != nil {
			return false, nil, err
		}
		var made bool
		made, err = ensure(ctx)
		created = created || made
	}
	return created, weak, err
}

// Dedicate makes the token the operator's, unless that was done. A token that does not do what the secrecy of keys
// rests on is refused, unless it is accepted as it is: then weak is what it does not do, and the token itself says so
// from then on.
func Dedicate(ctx context.Context, token DedicateToken, accept bool) (created bool, weak []string, err error) {
	weak, err = token.Weak(ctx)
	if errors.Is(err, hsmkeys.ErrNotDedicated) {
		var found []hsmkeys.Finding
		if found, err = token.Weaknesses(ctx, hsmkeys.Operator); len(found) > 0 {
			weak = hsmkeys.Sentences(found)
			if !accept {
				return false, weak, fmt.Errorf("the token was tried, and keys would not be safe in it: %s: use another token; or accept this one with --accept-weak-token, "+
					"and the service says so in its log and at /readyz for ever", strings.Join(weak, "; "))
			}
		}
	}
	if err != nil {
		return false, nil, err
	}
	created, err = token.Dedicate(ctx, hsmkeys.Dedication{Side: hsmkeys.Operator, Weak: weak})
	return created, weak, err
}

// Enroll takes a manufacturer's enrolment: it pins the manufacturer's key, takes the operator's KEK into the token, and
// destroys the transport key that the KEK came under. pem is the manufacturer's key, and thumbprint what the
// manufacturer has read out of it, neither of which came with the enrolment. The KEK of an earlier enrolment with the
// same generation is replaced; one of another generation is taken beside those that are there. An enrolment that was
// taken before changes nothing but the directory.
func Enroll(ctx context.Context, token IntakeToken, registry Registry, jws, pem []byte, thumbprint, directoryURL string,
	tacs ...kme.TAC) (*Manufacturer, error) {
	verifier, err := directory.ParseVerifier(pem)
	if err != nil {
		return nil, fmt.Errorf("the manufacturer's key: %w", err)
	}
	if err := handover.CheckThumbprint(verifier.KeyID(), thumbprint); err != nil {
		return nil, fmt.Errorf("the manufacturer's key: %w", err)
	}
	var e handover.Enrolment
	if err := verifier.Verify(handover.TypeEnrolment, "the enrolment", jws, &e); err != nil {
		return nil, err
	}
	if err := e.Validate(); err != nil {
		return nil, fmt.Errorf("the enrolment: %w", err)
	}
	if e.Manufacturer != verifier.KeyID() {
		return nil, fmt.Errorf("the enrolment is of manufacturer %s, and the key given is that of %s", e.Manufacturer, verifier.KeyID())
	}
	manufacturers, err := registry.Manufacturers(ctx)
	if err != nil {
		return nil, err
	}
	for _, m := range manufacturers {
		if m.KeyID != e.Manufacturer {
			continue
		}
		if m.Verdict.Withdrawn {
			return nil, distrustedError(m.KeyID, m.Verdict)
		}
		if len(tacs) == 0 {
			tacs = m.TACs
		}
	}
	m := &Manufacturer{KeyID: e.Manufacturer, PEM: string(pem), Operator: e.Operator, Directory: directoryURL, TACs: tacs, Enrolled: time.Now()}
	lots, err := registry.Lots(ctx)
	if err == nil {
		err = checkPins(lots, manufacturers, m)
	}
	if err != nil {
		return nil, err
	}
	kek, ok := kekOf(e.Manufacturer, e.Operator).Named(e.KEK)
	if !ok {
		return nil, fmt.Errorf("the enrolment carries key %s: it does not fit the operator that it names", e.KEK)
	}
	transports, err := token.TransportKeys(ctx)
	if err != nil {
		return nil, err
	}
	at := slices.IndexFunc(transports, func(pub *rsa.PublicKey) bool { return directory.RSAThumbprint(pub) == e.TransportKey })
	if at < 0 {
		return m, enrolledBefore(ctx, token, registry, m, &e, kek)
	}
	if err := token.UnwrapKEK(ctx, kek, transports[at], e.Wrapped); err != nil {
		return nil, err
	}
	if err := registry.PutManufacturer(ctx, m); err != nil {
		return nil, err
	}
	return m, token.DestroyTransportKey(ctx, transports[at])
}

// checkPins fails if a TAC that m is to have is another's, pinned to it or in a lot of its that is served, or if a lot
// of m's has one that m is not to have.
func checkPins(lots []*Lot, manufacturers []*Manufacturer, m *Manufacturer) error {
	for _, t := range m.TACs {
		if o := pinned(t, manufacturers, m); o != nil {
			return fmt.Errorf("TAC %s is pinned to manufacturer %s: settle it with who made the devices", t, o.KeyID)
		}
		for _, l := range lots {
			if l.Manufacturer != m.KeyID && l.Served() && slices.ContainsFunc(l.Manifest.Ranges, func(r directory.Range) bool { return r.TAC == t }) {
				return fmt.Errorf("lot %s of manufacturer %s has TAC %s: settle it with who made them; keysvc lot retire ends a lot",
					l.Manifest.Lot, l.Manufacturer, t)
			}
		}
	}
	for _, l := range lots {
		if l.Manufacturer == m.KeyID && !l.Retired.Withdrawn {
			if err := checkTACs(l.Manifest, manufacturers, m); err != nil {
				return err
			}
		}
	}
	return nil
}

// pinned is the manufacturer, another than m, that a TAC is pinned to, or nil. A distrusted one has none: its devices
// may be another's, under a new signing key.
func pinned(t kme.TAC, manufacturers []*Manufacturer, m *Manufacturer) *Manufacturer {
	i := slices.IndexFunc(manufacturers, func(o *Manufacturer) bool {
		return o.KeyID != m.KeyID && !o.Verdict.Withdrawn && slices.Contains(o.TACs, t)
	})
	if i < 0 {
		return nil
	}
	return manufacturers[i]
}

// checkTACs fails if a lot of m's has a TAC that m may not have.
func checkTACs(lot *directory.Manifest, manufacturers []*Manufacturer, m *Manufacturer) error {
	for _, r := range lot.Ranges {
		if o := pinned(r.TAC, manufacturers, m); o != nil {
			return fmt.Errorf("lot %s has TAC %s, which is pinned to manufacturer %s: settle it with who made them",
				lot.Lot, r.TAC, o.KeyID)
		}
		if len(m.TACs) > 0 && !slices.Contains(m.TACs, r.TAC) {
			return fmt.Errorf("lot %s has TAC %s, and manufacturer %s was enrolled for %s alone: if that is its TAC too, run keysvc enroll "+
				"again with --tac for each; keysvc lot retire ends a lot", lot.Lot, r.TAC, m.KeyID, m.TACs)
		}
	}
	return nil
}

// enrolledBefore is Enroll where the transport key is gone: it went with an enrolment that was taken, or was never
// here.
func enrolledBefore(ctx context.Context, token IntakeToken, registry Registry, m *Manufacturer, e *handover.Enrolment, kek hsmkeys.Key) error {
	has, err := token.Has(ctx, kek)
	if err != nil {
		return err
	}
	all, err := registry.Manufacturers(ctx)
	if err != nil {
		return err
	}
	enrolled := slices.ContainsFunc(all, func(o *Manufacturer) bool { return o.KeyID == m.KeyID && o.Operator == m.Operator })
	if !has || !enrolled {
		return fmt.Errorf("the enrolment was made for transport key %s, which this token has not got: make one with keysvc transport new, and have the manufacturer enrol that", e.TransportKey)
	}
	return registry.PutManufacturer(ctx, m)
}

// ImportLot takes a granted lot: it takes the lot's private key into the token, proves with a decryption that it is the
// key of the manifest's modulus, and enters the lot. The same grant again changes nothing. A lot that was retired is
// refused, unless again is the verdict that it is served again.
func ImportLot(ctx context.Context, token IntakeToken, registry Registry, jws []byte, again *Verdict) (*Lot, error) {
	manufacturers, err := registry.Manufacturers(ctx)
	if err != nil {
		return nil, err
	}
	if len(manufacturers) == 0 {
		return nil, errors.New("no manufacturer is enrolled yet: run keysvc enroll first")
	}
	signer, err := directory.SignerOf(jws)
	if err != nil {
		return nil, fmt.Errorf("the grant is refused: %w", err)
	}
	for _, m := range manufacturers {
		if m.KeyID == signer {
			return importLot(ctx, token, registry, manufacturers, m, jws, again)
		}
	}
	return nil, fmt.Errorf("the grant is signed by %s, a manufacturer who is not enrolled", signer)
}

func importLot(ctx context.Context, token IntakeToken, registry Registry, manufacturers []*Manufacturer, m *Manufacturer, jws []byte,
	again *Verdict) (*Lot, error) {
	if m.Verdict.Withdrawn {
		return nil, distrustedError(m.KeyID, m.Verdict)
	}
	verifier, err := directory.ParseVerifier([]byte(m.PEM))
	if err != nil {
		return nil, err
	}
	var g handover.Grant
	if err := verifier.Verify(handover.TypeGrant, "the grant", jws, &g); err != nil {
		return nil, err
	}
	if err := g.Validate(); err != nil {
		return nil, fmt.Errorf("the grant: %w", err)
	}
	if g.Operator != m.Operator {
		return nil, fmt.Errorf("the grant is for operator %q, and this token was enrolled as %q", g.Operator, m.Operator)
	}
	kek, ok := kekOf(m.KeyID, m.Operator).Named(g.KEK)
	if !ok {
		return nil, fmt.Errorf("the grant was wrapped under key %s, which is not operator %s's", g.KEK, m.Operator)
	}
	manifest, err := verifier.Manifest(g.Lot, []byte(g.Manifest))
	if err != nil {
		return nil, err
	}
	if err := checkTACs(manifest, manufacturers, m); err != nil {
		return nil, err
	}
	lot := &Lot{Manufacturer: m.KeyID, Manifest: manifest, ManifestJWS: g.Manifest, Imported: time.Now()}
	check := func(all []*Lot) error { return checkLot(lot, all, again != nil) }
	// Before the key is in the token, so that a refusal leaves nothing there; again when it is entered.
	all, err := registry.Lots(ctx)
	if err == nil {
		err = check(all)
	}
	if err != nil {
		return nil, err
	}
	key := lotKey(m.KeyID, manifest.Lot)
	taken, err := token.UnwrapLotKey(ctx, key, kek, g.Wrapped, manifest.PublicKey())
	if errors.Is(err, hsmkeys.ErrNoKey) {
		return nil, fmt.Errorf("lot %s was wrapped under generation %d of the KEK, which this token has not got: have the manufacturer's enrolment with that one, and run keysvc enroll: %w", manifest.Lot, max(kek.Generation, 1), err)
	}
	if err != nil {
		return nil, fmt.Errorf("lot %s: %w", manifest.Lot, err)
	}
	if err := registry.PutLot(ctx, lot, check); err != nil {
		if taken {
			err = errors.Join(err, token.RemoveLotKey(context.WithoutCancel(ctx), key))
		}
		return nil, err
	}
	if again != nil {
		if _, err := registry.Decide(ctx, m.KeyID, manifest.Lot, *again, check); err != nil {
			return nil, err
		}
	}
	return lot, nil
}

// checkLot refuses a lot that is not the one taken before under its name, that was retired, unless again, or whose
// IMEIs are another lot's that is served, whoever made that.
func checkLot(lot *Lot, all []*Lot, again bool) error {
	for _, other := range all {
		if other.Manufacturer == lot.Manufacturer && other.Manifest.Lot == lot.Manifest.Lot {
			if other.ManifestJWS != lot.ManifestJWS {
				return fmt.Errorf("lot %s of manufacturer %s was imported before with another manifest", lot.Manifest.Lot, lot.Manufacturer)
			}
			if other.Retired.Withdrawn && !again {
				return fmt.Errorf("lot %s of manufacturer %s was retired, %s; if that is to be undone, import it with --reinstate REASON",
					lot.Manifest.Lot, lot.Manufacturer, other.Retired)
			}
			continue
		}
		if !other.Served() {
			continue
		}
		if r := lot.Manifest.Overlap(other.Manifest); r != nil {
			return fmt.Errorf("lot %s shares IMEIs with lot %s of manufacturer %s, which has %d from %s%06d on: one of the two is wrong; settle it with who made them", lot.Manifest.Lot, other.Manifest.Lot, other.Manufacturer, r.Count, r.TAC, r.First)
		}
	}
	return nil
}

func kekOf(manufacturer, operator string) hsmkeys.Key {
	return hsmkeys.Key{Role: hsmkeys.RoleKEK, Manufacturer: manufacturer, Name: operator}
}
