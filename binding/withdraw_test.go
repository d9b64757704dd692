package binding_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/imports"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/report"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/directory/filestore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/kme"
)

func verdict(t *testing.T, withdrawn bool, reason string) registry.Verdict {
	t.Helper()
	return must[registry.Verdict](t)(imports.NewVerdict(withdrawn, "somebody@here", reason))
}

// grantAgain is another grant of a lot that was taken.
func (m *maker) grantAgain(t *testing.T, l *lot, taken *registry.Lot) []byte {
	t.Helper()
	g := m.grant(t, l)
	g.Manifest = taken.ManifestJWS
	return m.sign(t, handover.TypeGrant, g)
}

// bind binds a new IMSI to a device, and gives it.
func (r *harness) bind(t *testing.T, d *device) kme.IMSI {
	t.Helper()
	imsi := newIMSI()
	payload, _ := d.payload(t)
	must[*binding.Established](t)(r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
		AttemptID: r.attempt(t, imsi), Payload: payload, Origin: here}))
	return imsi
}

// checkNotBindable insists on UNKNOWN_DEVICE, and that the token was not asked.
func (r *harness) checkNotBindable(t *testing.T, what string, d *device) {
	t.Helper()
	imsi := newIMSI()
	payload, _ := d.payload(t)
	attempt := r.attempt(t, imsi)
	r.recorder.take()
	_, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: attempt,
		Payload: payload, Origin: here})
	checkRefused(t, what, err, kme.UnknownDevice, "")
	if calls := r.recorder.takeToken(); len(calls) > 0 {
		t.Errorf("%s: the token was asked: %v", what, calls)
	}
}

// checkServedOn insists that vectors are made under an IMSI's active binding, and restored.
func (r *harness) checkServedOn(t *testing.T, what string, imsi kme.IMSI) {
	t.Helper()
	vector := newRANDs(1)
	p, err := r.service.PrepareVector(t.Context(), imsi, vector, here)
	if err != nil || p.AttemptID != "" {
		t.Fatalf("%s: vectors for who is bound: %+v, error %v", what, p, err)
	}
	if back, err := r.service.RestoreRAND(t.Context(), imsi, p.RANDs[0][:], here); err != nil ||
		!bytes.Equal(back[:], vector[0]) {
		t.Errorf("%s: restored %x, error %v; want %x", what, back, err, vector[0])
	}
}

func TestDistrust(t *testing.T) {
	r, m, l := newServed(t)
	ctx := t.Context()
	imsi := r.bind(t, l.devices[0])
	r.activate(t, imsi)
	v := verdict(t, true, "its signing key was stolen")
	if stands := must[registry.Verdict](t)(imports.Distrust(ctx, r.store, m.KeyID(), v)); stands != v {
		t.Errorf("stands %+v, want %+v", stands, v)
	}
	r.serve(t)
	r.checkNotBindable(t, "a device of a distrusted manufacturer", l.devices[1])
	r.checkServedOn(t, "a manufacturer was distrusted", imsi)
	if log := r.log.String(); !strings.Contains(log, "a manufacturer is distrusted") ||
		!strings.Contains(log, v.Reason) ||
		!strings.Contains(log, v.By) {
		t.Errorf("the log has no word of it: %s", log)
	}

	// Nothing of it is taken any more.
	_, err := imports.Enroll(ctx, r.token, r.store,
		imports.Enrolment{JWS: m.sign(t, handover.TypeEnrolment, m.enrolment(t, r)), PEM: m.pem, Thumbprint: m.KeyID()})
	checkSays(t, "an enrolment of a distrusted manufacturer", err, "is distrusted, by somebody@here")
	next := m.newLot(t, "L2", kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), 50, newDevices(t, 1)...)
	grant := m.sign(t, handover.TypeGrant, m.grant(t, next))
	_, err = imports.ImportLot(ctx, r.token, r.store, grant, nil)
	checkSays(t, "a grant of a distrusted manufacturer", err, "is distrusted")
	again := verdict(t, false, "no")
	_, err = imports.ImportLot(ctx, r.token, r.store, grant, &again)
	checkSays(t, "a grant of a distrusted manufacturer, to be served again", err, "is distrusted")
	checkLeft(t, "a distrusted manufacturer", r, map[hsmkeys.Key]bool{m.lotKey("L1"): true, m.lotKey("L2"): false}, 1,
		1)

	// A second verdict changes nothing.
	if stands := must[registry.Verdict](t)(imports.Distrust(ctx, r.store, m.KeyID(),
		verdict(t, true, "again"))); stands != v {
		t.Errorf("after a second verdict stands %+v, want %+v", stands, v)
	}

	// It may come back under another key, with the same devices; its old name then may not.
	reborn := newMaker(t)
	r.enroll(t, reborn)
	var keys []any
	for _, d := range l.devices {
		keys = append(keys, d.signer)
	}
	moved := reborn.newLot(t, "L1", kme.SuiteECDSA, l.key, 1, keys...)
	r.take(t, reborn, moved)
	r.activate(t, r.bind(t, moved.devices[1]))
	r.checkServedOn(t, "its devices are another manufacturer's", imsi)
	_, err = imports.Trust(ctx, r.store, m.KeyID(), verdict(t, false, "a mistake"))
	checkSays(t, "trusted beside its other name", err, "shares IMEIs with lot L1 of manufacturer "+reborn.KeyID())

	must[registry.Verdict](t)(imports.Distrust(ctx, r.store, reborn.KeyID(), verdict(t, true, "the wrong one")))
	must[registry.Verdict](t)(imports.Trust(ctx, r.store, m.KeyID(), verdict(t, false, "a mistake")))
	r.serve(t)
	r.activate(t, r.bind(t, l.devices[2]))
	must[*registry.Lot](t)(imports.ImportLot(ctx, r.token, r.store, grant, nil))
	_, err = imports.Distrust(ctx, r.store, "nobody", v)
	checkSays(t, "nobody", err, "no such manufacturer")
}

func TestRetireLot(t *testing.T) {
	r, m, l := newServed(t)
	ctx := t.Context()
	imsi, revoked := r.bind(t, l.devices[0]), r.bind(t, l.devices[1])
	r.activate(t, imsi)
	r.activate(t, revoked)
	taken := must[*registry.Lot](t)(imports.FindLot(ctx, r.store, "L1", ""))
	grant := m.grantAgain(t, l, taken)
	v := verdict(t, true, "P and Q are known")
	for range 2 { // the second changes nothing
		if stands := must[registry.Verdict](t)(imports.RetireLot(ctx, r.token, r.store, taken, v)); stands != v {
			t.Errorf("stands %+v, want %+v", stands, v)
		}
		checkLeft(t, "a retired lot", r, map[hsmkeys.Key]bool{m.lotKey("L1"): false}, 1, 1)
	}
	r.serve(t)
	r.checkNotBindable(t, "a device of a retired lot", l.devices[2])
	r.checkServedOn(t, "a lot was retired", imsi)
	if log := r.log.String(); !strings.Contains(log, "a lot is retired") || !strings.Contains(log, v.Reason) {
		t.Errorf("the log has no word of it: %s", log)
	}
	// What its manufacturer says of its devices still counts.
	r.revoke(t, m, l, l.devices[1])
	_, err := r.service.PrepareVector(ctx, revoked, newRANDs(1), here)
	checkRefused(t, "a revoked device of a retired lot", err, kme.RevokedDevice, "")

	// It does not come back by accident, also not by a grant that is under way. Others may have its IMEIs.
	_, err = imports.ImportLot(ctx, r.token, r.store, grant, nil)
	checkSays(t, "a retired lot", err, "was retired, by somebody@here")
	checkLeft(t, "a retired lot imported", r, map[hsmkeys.Key]bool{m.lotKey("L1"): false}, 1, 1)
	other := newMaker(t)
	r.enroll(t, other)
	r.take(t, other, other.newLot(t, "L1", kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), 1, newDevices(t, 1)...))
	_, err = imports.FindLot(ctx, r.store, "L1", "")
	checkSays(t, "a name of two lots", err, "say whose")
	found := must[*registry.Lot](t)(imports.FindLot(ctx, r.store, "L1", m.KeyID()))
	if found.Manufacturer != m.KeyID() {
		t.Errorf("found %+v", found)
	}
	_, err = imports.FindLot(ctx, r.store, "L9", "")
	checkSays(t, "no lot", err, "keysvc lot list")

	// On purpose it does, unless its IMEIs are another lot's by now.
	again := verdict(t, false, "the wrong lot was retired")
	_, err = imports.ImportLot(ctx, r.token, r.store, grant, &again)
	checkSays(t, "a retired lot whose IMEIs are another's", err, "settle it with whoever made them")
	checkLeft(t, "a retired lot whose IMEIs are another's", r, map[hsmkeys.Key]bool{m.lotKey("L1"): false}, 2, 2)
	must[registry.Verdict](t)(imports.Distrust(ctx, r.store, other.KeyID(), v))
	must[*registry.Lot](t)(imports.ImportLot(ctx, r.token, r.store, grant, &again))
	r.serve(t)
	r.activate(t, r.bind(t, l.devices[2]))
	if got := must[*registry.Lot](t)(imports.FindLot(ctx, r.store, "L1", m.KeyID())); got.Retired != again {
		t.Errorf("the verdict is %+v, want %+v", got.Retired, again)
	}
}

// A grant that is imported while its lot is retired leaves no key. Of a manufacturer's token, nothing is destroyed: it
// has the lot's key under the same name, and may be the only one that has.
func TestRetireLotOfAFactory(t *testing.T) {
	r, m, _ := newServed(t)
	ctx := t.Context()
	uri := softhsmtest.Token(t).URI
	factory := must[*hsmkeys.FactoryToken](t)(hsmkeys.OpenFactory(ctx, uri, hsmkeys.Options{}))
	t.Cleanup(func() { factory.Close() })
	given := must[*hsmkeys.OperatorToken](t)(hsmkeys.OpenOperator(ctx, uri, hsmkeys.Options{})) // by mistake
	t.Cleanup(func() { given.Close() })
	must[bool](t)(factory.Dedicate(ctx, hsmkeys.Dedication{Side: hsmkeys.Factory}))
	if _, _, err := factory.EnsureLotKey(ctx, m.lotKey("L1"), 2048, hsmkeys.PrimesAuto); err != nil {
		t.Fatal(err)
	}
	taken := must[*registry.Lot](t)(imports.FindLot(ctx, r.store, "L1", ""))
	_, err := imports.RetireLot(ctx, given, r.store, taken, verdict(t, true, "P and Q are known"))
	checkSays(t, "a lot of a factory's token", err, "a token of the factory's")
	if !must[bool](t)(factory.Has(ctx, m.lotKey("L1"))) {
		t.Error("the manufacturer's lot key is destroyed")
	}
	if taken = must[*registry.Lot](t)(imports.FindLot(ctx, r.store, "L1", "")); taken.Retired.Withdrawn {
		t.Error("the lot is retired")
	}
}

func TestRetiredMeanwhile(t *testing.T) {
	r, m, l := newServed(t)
	taken := must[*registry.Lot](t)(imports.FindLot(t.Context(), r.store, "L1", ""))
	store := overtaken{r.store, func() {
		must[registry.Verdict](t)(imports.RetireLot(t.Context(), r.token, r.store, taken, verdict(t, true, "old")))
	}}
	_, err := imports.ImportLot(t.Context(), r.token, store, m.grantAgain(t, l, taken), nil)
	checkSays(t, "a lot that was retired meanwhile", err, "was retired")
	checkLeft(t, "a lot that was retired meanwhile", r, map[hsmkeys.Key]bool{m.lotKey("L1"): false}, 1, 1)
}

// undecided is a registry that takes no verdict.
type undecided struct{ registry.Store }

var errUndecided = errors.New("no verdict")

func (undecided) Decide(context.Context, string, string, registry.Verdict, func([]*registry.Lot) error) (
	registry.Verdict, error) {
	return registry.Verdict{}, errUndecided
}

// A lot that could not be reinstated stays retired, and its key does not stay in the token. One that was not retired
// needs its key.
func TestNotReinstated(t *testing.T) {
	r, m, l := newServed(t)
	again := verdict(t, false, "the wrong lot was retired")
	taken := must[*registry.Lot](t)(imports.FindLot(t.Context(), r.store, "L1", ""))
	must[registry.Verdict](t)(imports.RetireLot(t.Context(), r.token, r.store, taken, verdict(t, true, "old")))
	next := m.newLot(t, "L2", kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), 100, newDevices(t, 1)...)
	for grant, want := range map[string]map[hsmkeys.Key]bool{
		string(m.grantAgain(t, l, taken)):                       {m.lotKey("L1"): false},
		string(m.sign(t, handover.TypeGrant, m.grant(t, next))): {m.lotKey("L2"): true},
	} {
		_, err := imports.ImportLot(t.Context(), r.token, undecided{r.store}, []byte(grant), &again)
		if !errors.Is(err, errUndecided) {
			t.Errorf("imported: %v", err)
		}
		for key, has := range want {
			if got := must[bool](t)(r.token.Has(t.Context(), key)); got != has {
				t.Errorf("the token has %s: %v, want %v", key, got, has)
			}
		}
	}
}

func TestSuspects(t *testing.T) {
	r, m, l := newServed(t)
	ctx := t.Context()
	other := newMaker(t)
	r.enroll(t, other)
	second := other.newLot(t, "L1", kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), 50, newDevices(t, 2)...)
	r.take(t, other, second)
	reissue := func(d *device, reason string) {
		t.Helper()
		key := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		entry := directory.DeviceKey{IMEI: d.imei, Key: &key.PublicKey}
		if err := directory.Reissue(ctx, m.store, m.Signer, l.Manifest, entry, make([]byte, 32), reason,
			time.Now()); err != nil {
			t.Fatal(err)
		}
		r.refresh(t, m, l)
		d.signer = key
	}
	revoke := func(d *device, reason string) {
		t.Helper()
		if err := directory.Revoke(ctx, m.store, m.Signer, l.Manifest, []kme.IMEI{d.imei}, reason, time.Now(),
			nil); err != nil {
			t.Fatal(err)
		}
		r.refresh(t, m, l)
	}
	want := map[string][]registry.Why{}
	check := func(what string) {
		t.Helper()
		got := map[string][]registry.Why{}
		for s, err := range report.Suspects(ctx, r.lots(t), r.store, time.Now()) {
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if len(s.Doubts) == 0 {
				t.Errorf("%s: IMSI %s is reported for no reason", what, s.IMSI)
			}
			for _, d := range s.Doubts {
				if d.Reason == "" || d.Time.IsZero() {
					t.Errorf("%s: %+v says nothing", what, d)
				}
				got[s.IMSI.String()+" "+s.IMEI.String()] = append(got[s.IMSI.String()+" "+s.IMEI.String()], d.Why)
			}
		}
		if !maps.EqualFunc(got, want, slices.Equal) {
			t.Errorf("%s: reported %v, want %v", what, got, want)
		}
	}
	at := func(imsi kme.IMSI, d *device) string { return imsi.String() + " " + d.imei.String() }

	old, fresh, gone, good, pending := l.devices[0], l.devices[1], l.devices[2], l.devices[3], l.devices[4]
	reissue(fresh, "repaired before it was bound")
	imsis := map[*device]kme.IMSI{}
	for _, d := range []*device{old, fresh, gone, good, second.devices[0]} {
		imsis[d] = r.bind(t, d)
		r.activate(t, imsis[d])
	}
	imsis[pending] = r.bind(t, pending)
	check("all is well")

	revoke(gone, "stolen")
	want[at(imsis[gone], gone)] = []registry.Why{registry.DeviceRevoked}
	check("a device was revoked")
	reissue(old, "repaired")
	want[at(imsis[old], old)] = []registry.Why{registry.DeviceReissued}
	reissue(pending, "repaired")
	want[at(imsis[pending], pending)] = []registry.Why{registry.DeviceReissued}
	check("devices have new keys")

	// What it is bound with from now on is another thing, what is bound stays in doubt.
	again := r.bind(t, old)
	r.activate(t, again)
	check("a device was bound with its new key")
	reissue(old, "repaired again")
	want[at(again, old)] = []registry.Why{registry.DeviceReissued}
	check("its new key was replaced too")

	// Beside an active binding, a pending one of another device: both are looked at.
	must[*binding.Attempt](t)(r.service.OpenProvisioning(ctx, imsis[gone], 0))
	payload, _ := good.payload(t)
	must[*binding.Established](t)(r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsis[gone],
		IMEI: good.imei, AttemptID: r.attempt(t, imsis[gone]), Payload: payload, Origin: here}))
	check("a suspect binding beside a pending one")

	must[*binding.Binding](t)(r.service.RevokeBinding(ctx, again))
	delete(want, at(again, old))
	check("a binding was revoked")

	must[registry.Verdict](t)(imports.Distrust(ctx, r.store, other.KeyID(), verdict(t, true, "its key was stolen")))
	r.readers[other.KeyID()] = nil // its directory is not asked
	want[at(imsis[second.devices[0]], second.devices[0])] = []registry.Why{registry.ManufacturerDistrusted}
	check("a manufacturer was distrusted")

	if err := directory.RevokeLot(ctx, m.store, m.Signer, l.Manifest, "its key has leaked", time.Now()); err != nil {
		t.Fatal(err)
	}
	r.refresh(t, m, l)
	for _, d := range []*device{old, fresh, gone, good, pending} {
		want[at(imsis[d], d)] = append([]registry.Why{registry.LotRevoked}, want[at(imsis[d], d)]...)
	}
	want[at(imsis[gone], good)] = []registry.Why{registry.LotRevoked}
	check("a lot was revoked")

	must[registry.Verdict](t)(imports.RetireLot(ctx, r.token, r.store,
		must[*registry.Lot](t)(imports.FindLot(ctx, r.store, "L1", m.KeyID())), verdict(t, true, "too old")))
	for _, d := range []*device{old, fresh, gone, good, pending} {
		want[at(imsis[d], d)] = append([]registry.Why{registry.LotRetired}, want[at(imsis[d], d)]...)
	}
	want[at(imsis[gone], good)] = []registry.Why{registry.LotRetired, registry.LotRevoked}
	check("a lot was retired")

	// Without the directory it is not known who is suspect.
	m.store = must[*filestore.Store](t)(filestore.Open(t.TempDir()))
	r.readers[m.KeyID()] = m.reader(t)
	var failed error
	for _, err := range report.Suspects(ctx, r.lots(t), r.store, time.Now()) {
		failed = err
	}
	checkSays(t, "without the directory", failed, "is not known")
}
