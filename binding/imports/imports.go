// Package imports enters what manufacturers hand over, enrolments and lots, and ends what it has entered.
package imports

import (
	"cmp"
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/pemkey"
	"github.com/kmehsm/kmehsm/internal/weakkey"
	"github.com/kmehsm/kmehsm/kme"
)

// A Token is what imports need of the operator's HSM.
type Token interface {
	TransportKeys(ctx context.Context) ([]*rsa.PublicKey, error)
	DestroyTransportKey(ctx context.Context, pub *rsa.PublicKey) error
	Has(ctx context.Context, k hsmkeys.Key) (bool, error)
	UnwrapKEK(ctx context.Context, kek hsmkeys.Key, transport *rsa.PublicKey, wrapped []byte) error
	UnwrapLotKey(ctx context.Context, lot, kek hsmkeys.Key, wrapped []byte, pub *rsa.PublicKey) (fresh bool, err error)
	RemoveLotKey(ctx context.Context, k hsmkeys.Key) error
	MustBe(ctx context.Context, side hsmkeys.Side) error
}

// An Enrolment is what a manufacturer has handed over, and what else the operator knows of it.
type Enrolment struct {
	JWS        []byte // signed by the manufacturer
	PEM        []byte // the manufacturer's key, which did not come with the enrolment
	Thumbprint string // of that key, as the manufacturer has read it out
	Directory  string // where its public keys are; empty for the one of the enrolment before, or the service's default
	TACs       []kme.TAC
}

// Enroll imports a manufacturer's enrolment: it pins the manufacturer's key, imports the operator's KEK into the token,
// and destroys the transport key that the KEK came under. The KEK of an earlier enrolment with the same generation is
// replaced; one of another generation is imported beside those that are there. Without TACs or a directory, those of
// the enrolment before stay. If the enrolment was imported before, only these change.
func Enroll(ctx context.Context, token Token, store registry.Store, by Enrolment) (*registry.Manufacturer, error) {
	verifier, err := directory.ParseVerifier(by.PEM)
	if err != nil {
		return nil, fmt.Errorf("the manufacturer's key: %w", err)
	}
	if err := handover.CheckThumbprint(verifier.KeyID(), by.Thumbprint); err != nil {
		return nil, fmt.Errorf("the manufacturer's key: %w", err)
	}
	var e handover.Enrolment
	if err := verifier.Verify(handover.TypeEnrolment, "the enrolment", by.JWS, &e); err != nil {
		return nil, err
	}
	if err := e.Validate(); err != nil {
		return nil, fmt.Errorf("the enrolment: %w", err)
	}
	if e.Manufacturer != verifier.KeyID() {
		return nil, fmt.Errorf("the enrolment is of manufacturer %s, and the key given is that of %s", e.Manufacturer,
			verifier.KeyID())
	}
	manufacturers, err := store.Manufacturers(ctx)
	if err != nil {
		return nil, err
	}
	if before := registry.ManufacturerOf(manufacturers, e.Manufacturer); before != nil {
		if before.Verdict.Withdrawn {
			return nil, distrustedError(before)
		}
		if len(by.TACs) == 0 {
			by.TACs = before.TACs
		}
		by.Directory = cmp.Or(by.Directory, before.Directory)
	}
	m := &registry.Manufacturer{
		KeyID: e.Manufacturer, PEM: string(by.PEM), Operator: e.Operator, Directory: by.Directory, TACs: by.TACs,
		Enrolled: time.Now(),
	}
	lots, err := store.Lots(ctx)
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
	at := slices.IndexFunc(transports, func(pub *rsa.PublicKey) bool {
		return pemkey.Thumbprint(pub) == e.TransportKey
	})
	if at < 0 {
		return m, enrolledBefore(ctx, token, store, manufacturers, m, &e, kek)
	}
	if err := token.UnwrapKEK(ctx, kek, transports[at], e.Wrapped); err != nil {
		return nil, err
	}
	if err := store.PutManufacturer(ctx, m); err != nil {
		return nil, err
	}
	return m, token.DestroyTransportKey(ctx, transports[at])
}

// Replaced says, a sentence each, what an enrolment has changed of the one before, which is among those of before, and
// what it has left. newTACs says whether the TACs were named now.
func Replaced(m *registry.Manufacturer, before []*registry.Manufacturer, newTACs bool) (says []string) {
	say := func(format string, args ...any) { says = append(says, fmt.Sprintf(format, args...)) }
	if was := registry.ManufacturerOf(before, m.KeyID); was != nil {
		if was.Operator != m.Operator {
			say("before, it was enrolled as operator %s, whose grants are refused from now on", was.Operator)
		}
		switch {
		case m.Directory == "":
		case was.Directory == m.Directory:
			say("its directory is %s, as before", m.Directory)
		case was.Directory != "":
			say("its directory is %s; before, it was %s", m.Directory, was.Directory)
		}
	}
	switch {
	case len(m.TACs) > 0 && newTACs:
		say("its lots may have TAC %s alone", m.TACs)
	case len(m.TACs) > 0:
		say("its lots may have TAC %s alone, as before", m.TACs)
	}
	return says
}

// checkPins fails if a TAC of m is pinned to another manufacturer, or is in a served lot of another one; and if a lot
// of m has a TAC that m may not have.
func checkPins(lots []*registry.Lot, manufacturers []*registry.Manufacturer, m *registry.Manufacturer) error {
	for _, t := range m.TACs {
		if o := pinned(t, manufacturers, m); o != nil {
			return fmt.Errorf("TAC %s is pinned to manufacturer %s: settle it with whoever made the devices", t,
				o.KeyID)
		}
		for _, l := range lots {
			if l.Manufacturer != m.KeyID && l.Served() &&
				slices.ContainsFunc(l.Manifest.Ranges, func(r directory.Range) bool { return r.TAC == t }) {
				return fmt.Errorf("lot %s of manufacturer %s has TAC %s: settle it with whoever made them; keysvc lot "+
					"retire ends a lot", l.Manifest.Lot, l.Manufacturer, t)
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

// pinned is the manufacturer other than m that a TAC is pinned to, or nil. A distrusted one does not count: its devices
// may get a new signing key, as another manufacturer's.
func pinned(t kme.TAC, manufacturers []*registry.Manufacturer, m *registry.Manufacturer) *registry.Manufacturer {
	i := slices.IndexFunc(manufacturers, func(o *registry.Manufacturer) bool {
		return o.KeyID != m.KeyID && !o.Verdict.Withdrawn && slices.Contains(o.TACs, t)
	})
	if i < 0 {
		return nil
	}
	return manufacturers[i]
}

// checkTACs fails if a lot of m has a TAC that m may not have.
func checkTACs(lot *directory.Manifest, manufacturers []*registry.Manufacturer, m *registry.Manufacturer) error {
	for _, r := range lot.Ranges {
		if o := pinned(r.TAC, manufacturers, m); o != nil {
			return fmt.Errorf("lot %s has TAC %s, which is pinned to manufacturer %s: settle it with whoever made them",
				lot.Lot, r.TAC, o.KeyID)
		}
		if len(m.TACs) > 0 && !slices.Contains(m.TACs, r.TAC) {
			return fmt.Errorf("lot %s has TAC %s, and manufacturer %s was enrolled for %s alone: if that is its TAC "+
				"too, run keysvc enroll again with --tac for each; keysvc lot retire ends a lot", lot.Lot, r.TAC,
				m.KeyID, m.TACs)
		}
	}
	return nil
}

// enrolledBefore is Enroll if the transport key is not there: an earlier import has destroyed it, or it was never in
// this token.
func enrolledBefore(ctx context.Context, token Token, store registry.Store, manufacturers []*registry.Manufacturer,
	m *registry.Manufacturer, e *handover.Enrolment, kek hsmkeys.Key) error {
	has, err := token.Has(ctx, kek)
	if err != nil {
		return err
	}
	before := registry.ManufacturerOf(manufacturers, m.KeyID)
	if !has || before == nil || before.Operator != m.Operator {
		return fmt.Errorf("the enrolment was made for transport key %s, which this token has not got: make one with "+
			"keysvc transport new, and have the manufacturer enrol that", e.TransportKey)
	}
	return store.PutManufacturer(ctx, m)
}

// ImportLot imports a granted lot, unless its key is weak: it imports the private key, proves with a decryption that it
// is the key of the manifest's modulus, and enters the lot. The same grant again changes nothing. It refuses a retired
// lot, unless again is a verdict that the lot is served again. Then the lot's Retired is that verdict, or the present
// one if the lot was not retired.
func ImportLot(
	ctx context.Context, token Token, store registry.Store, jws []byte, again *registry.Verdict,
) (*registry.Lot, error) {
	manufacturers, err := store.Manufacturers(ctx)
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
	m := registry.ManufacturerOf(manufacturers, signer)
	switch {
	case m == nil:
		return nil, fmt.Errorf("the grant is signed by %s, a manufacturer who is not enrolled", signer)
	case m.Verdict.Withdrawn:
		return nil, distrustedError(m)
	}
	return importLot(ctx, token, store, manufacturers, m, jws, again)
}

func importLot(
	ctx context.Context, token Token, store registry.Store, manufacturers []*registry.Manufacturer,
	m *registry.Manufacturer, jws []byte, again *registry.Verdict,
) (*registry.Lot, error) {
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
		return nil, fmt.Errorf("the grant is for operator %q, and this token was enrolled as %q",
			g.Operator, m.Operator)
	}
	kek, ok := kekOf(m.KeyID, m.Operator).Named(g.KEK)
	if !ok {
		return nil, fmt.Errorf("the grant was wrapped under key %s, which is not operator %s's", g.KEK, m.Operator)
	}
	manifest, err := verifier.Manifest(g.Lot, []byte(g.Manifest))
	if err != nil {
		return nil, err
	}
	pub := manifest.PublicKey()
	if err := weakkey.Check(ctx, pub, pub.N.BitLen()); err != nil {
		return nil, fmt.Errorf("lot %s is refused: %w: anybody could decrypt its payloads; have the manufacturer make "+
			"another lot, with another token", manifest.Lot, err)
	}
	if err := checkTACs(manifest, manufacturers, m); err != nil {
		return nil, err
	}
	lot := &registry.Lot{Manufacturer: m.KeyID, Manifest: manifest, ManifestJWS: g.Manifest, Imported: time.Now()}
	check := func(all []*registry.Lot) error { return checkLot(lot, all, again != nil) }
	// Checked before the key is imported, so that a refusal leaves nothing in the token; and again when the lot is
	// entered.
	all, err := store.Lots(ctx)
	if err == nil {
		err = check(all)
	}
	if err != nil {
		return nil, err
	}
	fresh, err := token.UnwrapLotKey(ctx, lot.Key(), kek, g.Wrapped, pub)
	if errors.Is(err, hsmkeys.ErrNoKey) {
		return nil, fmt.Errorf("lot %s was wrapped under generation %d of the KEK, which this token has not got: "+
			"have the manufacturer's enrolment with that one, and run keysvc enroll: %w", manifest.Lot,
			max(kek.Generation, 1), err)
	}
	if err != nil {
		return nil, fmt.Errorf("lot %s: %w", manifest.Lot, err)
	}
	retired := slices.ContainsFunc(all, func(l *registry.Lot) bool {
		return l.Key() == lot.Key() && l.Retired.Withdrawn
	})
	err = store.PutLot(ctx, lot, check)
	needed := err == nil && !retired // by a lot that is served, also if there is no verdict about it
	if err == nil && again != nil {
		lot.Retired, err = store.Decide(ctx, m.KeyID, manifest.Lot, *again, check)
	}
	if err != nil && fresh && !needed {
		err = errors.Join(err, token.RemoveLotKey(context.WithoutCancel(ctx), lot.Key()))
	}
	if err != nil {
		return nil, err
	}
	return lot, nil
}

// checkLot refuses a lot that differs from the one imported before under its name, that was retired (unless again), or
// that shares IMEIs with another served lot, of any manufacturer.
func checkLot(lot *registry.Lot, all []*registry.Lot, again bool) error {
	for _, other := range all {
		if other.Manufacturer == lot.Manufacturer && other.Manifest.Lot == lot.Manifest.Lot {
			if other.ManifestJWS != lot.ManifestJWS {
				return fmt.Errorf("lot %s of manufacturer %s was imported before with another manifest",
					lot.Manifest.Lot, lot.Manufacturer)
			}
			if other.Retired.Withdrawn && !again {
				return fmt.Errorf("lot %s of manufacturer %s was retired, %s; if that is to be undone, import it with "+
					"--reinstate REASON", lot.Manifest.Lot, lot.Manufacturer, other.Retired)
			}
			continue
		}
		if !other.Served() {
			continue
		}
		if r := lot.Manifest.Overlap(other.Manifest); r != nil {
			return fmt.Errorf("lot %s shares IMEIs with lot %s of manufacturer %s, which has %d from %s%06d on: one "+
				"of the two is wrong; settle it with whoever made them", lot.Manifest.Lot, other.Manifest.Lot,
				other.Manufacturer, r.Count, r.TAC, r.First)
		}
	}
	return nil
}

func kekOf(manufacturer, operator string) hsmkeys.Key {
	return hsmkeys.Key{Role: hsmkeys.RoleKEK, Manufacturer: manufacturer, Name: operator}
}
