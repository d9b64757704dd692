package binding_test

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/devicelist"
	"github.com/kmehsm/kmehsm/binding/imports"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/kme"
)

// prove has a device prove itself for an IMSI that it is new to.
func (r *harness) prove(t *testing.T, d *device) kme.IMSI {
	t.Helper()
	imsi := r.bind(t, d)
	r.activate(t, imsi)
	return imsi
}

// A rule is a row of the table in docs/equipment.md.
type rule struct {
	status binding.EquipmentStatus // of one that a policy gives, the default; empty: as listed
	policy string                  // the setting
	reason binding.EquipmentReason
}

func documentedRules(t *testing.T) map[string]rule {
	t.Helper()
	row := regexp.MustCompile("(?m)^\\| (\\d+) \\| .* \\| (?:policy `(\\w+)`: )?([\\w ]+) \\| `(\\w+)` \\|$")
	rules := map[string]rule{}
	for _, m := range row.FindAllStringSubmatch(string(must[[]byte](t)(os.ReadFile("../docs/equipment.md"))), -1) {
		status := binding.EquipmentStatus(strings.ToUpper(m[3]))
		if m[3] == "as listed" {
			status = ""
		}
		rules[m[1]] = rule{status, m[2], binding.EquipmentReason(m[4])}
	}
	return rules
}

// policyOf has another status than the default where a setting leaves it open.
func policyOf(setting string, s binding.EquipmentStatus) binding.EquipmentPolicy {
	p := binding.DefaultEquipmentPolicy()
	switch setting {
	case "other_device":
		p.OtherDevice = s
	case "other_subscription":
		p.OtherSubscription = s
	case "not_in_lot":
		p.NotInLot = s
	}
	return p
}

// Every row of the table in docs/equipment.md, in its cases, by its default and by every other status that the policy
// may give; for one read of the store at most, and nothing of the token.
func TestEquipmentRules(t *testing.T) {
	r, m, other := newHarness(t), newMaker(t), newMaker(t)
	ctx, key := t.Context(), vectors(t).lot(t, "lot-2048")
	r.enroll(t, m)
	r.enroll(t, other)
	l := m.newLot(t, "L1", kme.SuiteECDSA, key, 1, newDevices(t, 11)...)
	r.take(t, m, l)
	d := l.devices
	retired := m.newLot(t, "L2", kme.SuiteECDSA, key, 100, newDevices(t, 3)...)
	r.take(t, m, retired)
	revoked := m.newLot(t, "L3", kme.SuiteECDSA, key, 200, newDevices(t, 1)...)
	r.take(t, m, revoked)
	distrusted := other.newLot(t, "L1", kme.SuiteECDSA, key, 300, newDevices(t, 2)...)
	r.take(t, other, distrusted)

	none, unbound := kme.IMSI{}, newIMSI()
	outside := must[kme.IMEI](t)(kme.ParseIMEI("49015420323751"))
	reissue := func(d *device) {
		t.Helper()
		fresh := newDevices(t, 1)[0].(*ecdsa.PrivateKey)
		if err := directory.Reissue(ctx, m.store, m.Signer, l.Manifest, directory.DeviceKey{IMEI: d.imei,
			Key: fresh.Public()}, make([]byte, 32), "repaired", time.Now()); err != nil {
			t.Fatal(err)
		}
		r.refresh(t, m, l)
		d.signer = fresh
	}
	open := func(imsi kme.IMSI) {
		t.Helper()
		must[*binding.Attempt](t)(r.service.OpenProvisioning(ctx, imsi, 0))
	}
	rebind := func(imsi kme.IMSI, d *device) { // beside what it has
		t.Helper()
		open(imsi)
		payload, _ := d.payload(t)
		must[*binding.Established](t)(r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
			AttemptID: r.attempt(t, imsi), Payload: payload, Origin: here}))
	}
	revoke := func(l *lot, d *device) {
		t.Helper()
		r.revoke(t, m, l, d)
	}

	ofGone := r.prove(t, d[1]) // and its device is revoked
	revoke(l, d[1])
	revoke(l, d[2])
	ofRevokedLot := r.prove(t, revoked.devices[0])
	if err := directory.RevokeLot(ctx, m.store, m.Signer, revoked.Manifest, "leaked", time.Now()); err != nil {
		t.Fatal(err)
	}
	r.refresh(t, m, revoked)
	ofOldKey := r.prove(t, d[3])
	reissue(d[3])
	both, bothOld := r.prove(t, d[4]), r.prove(t, d[4]) // of one device, by its old key and its new one
	reissue(d[4])
	rebind(both, d[4])
	r.activate(t, both)
	fresh := d[5] // whose key was replaced before it was bound
	reissue(fresh)
	ofFresh := r.prove(t, fresh)
	own := r.prove(t, d[6])
	moving := r.prove(t, d[7]) // to d[8]
	rebind(moving, d[8])
	opened := r.prove(t, d[9])
	open(opened)
	pending := r.bind(t, d[10])
	ofRetired := [...]kme.IMSI{r.prove(t, retired.devices[0]), r.prove(t, retired.devices[1])}
	revoke(retired, retired.devices[1])
	ofDistrusted := r.prove(t, distrusted.devices[0])
	must[registry.Verdict](t)(imports.RetireLot(ctx, r.token, r.store,
		must[*registry.Lot](t)(imports.FindLot(ctx, r.store, "L2", m.KeyID())), verdict(t, true, "over")))
	must[registry.Verdict](t)(imports.Distrust(ctx, r.store, other.KeyID(), verdict(t, true, "stolen")))
	r.serve(t)

	// Listed, whatever the device is otherwise; the longer entry counts.
	list := []binding.Listing{}
	for text, status := range map[string]binding.EquipmentStatus{
		d[1].imei.String(): binding.Whitelisted, "4901542*": binding.Greylisted, "490154203237*": binding.Blacklisted,
		retired.devices[0].imei.String(): binding.Blacklisted, d[6].imei.String(): binding.Greylisted,
	} {
		list = append(list, must[[]binding.Listing](t)(devicelist.New(text, status, "x", time.Now()))...)
	}
	must[int](t)(r.store.List(ctx, list))

	const first, last = "first", "last"
	rules, seen := documentedRules(t), map[string]bool{}
	for _, c := range []struct {
		what   string
		imei   kme.IMEI
		imsi   kme.IMSI
		lists  string // first or last; empty: the operator has no list
		rule   string
		status binding.EquipmentStatus // as listed
	}{
		{"revoked, and listed first", d[1].imei, ofGone, first, "1", binding.Whitelisted},
		{"proven, and listed first", d[6].imei, own, first, "1", binding.Greylisted},
		{"in no lot, and listed first", outside, none, first, "1", binding.Blacklisted},
		{"revoked while bound", d[1].imei, ofGone, "", "2", ""},
		{"revoked while bound, listed last", d[1].imei, ofGone, last, "2", ""},
		{"revoked while bound, alone", d[1].imei, none, "", "2", ""},
		{"revoked, never bound", d[2].imei, unbound, "", "2", ""},
		{"revoked, with another's IMSI", d[2].imei, own, "", "2", ""},
		{"of a revoked lot", revoked.devices[0].imei, ofRevokedLot, "", "2", ""},
		{"revoked, of a retired lot", retired.devices[1].imei, ofRetired[1], "", "2", ""},
		{"on its old key", d[3].imei, ofOldKey, "", "3", ""},
		{"on its old key, alone", d[3].imei, none, "", "3", ""},
		{"on its old key, with a new IMSI", d[3].imei, unbound, "", "3", ""},
		{"on its old key for this IMSI", d[4].imei, bothOld, "", "3", ""},
		{"on its new key for this IMSI", d[4].imei, both, "", "4", ""},
		{"on its new key for one, alone", d[4].imei, none, "", "4", ""},
		{"reissued before it was bound", fresh.imei, ofFresh, "", "4", ""},
		{"proven", d[6].imei, own, "", "4", ""},
		{"proven, listed last", d[6].imei, own, last, "4", ""},
		{"proven, alone", d[6].imei, none, "", "4", ""},
		{"proven, and about to lose the IMSI", d[7].imei, moving, "", "4", ""},
		{"proven, of a retired lot", retired.devices[0].imei, ofRetired[0], last, "4", ""},
		{"with another's IMSI, never bound", d[0].imei, own, "", "5", ""},
		{"with another's IMSI, proven for others", d[6].imei, ofFresh, "", "5", ""},
		{"with another's IMSI, in no lot", outside, own, "", "5", ""},
		{"with another's IMSI that is open, in no lot", outside, opened, "", "5", ""},
		{"proven for others", d[6].imei, unbound, "", "6", ""},
		{"in a lot", d[0].imei, unbound, "", "7", ""},
		{"in a lot, alone", d[0].imei, none, "", "7", ""},
		{"in a lot, listed last", d[0].imei, none, last, "7", ""},
		{"pending", d[10].imei, pending, "", "7", ""},
		{"pending beside another's", d[8].imei, moving, "", "7", ""},
		{"with an IMSI that is open", d[0].imei, opened, "", "7", ""},
		{"proven for others, with an IMSI that is open", d[6].imei, opened, "", "7", ""},
		{"in no lot, and listed last", outside, unbound, last, "8", binding.Blacklisted},
		{"in no lot", outside, unbound, "", "9", ""},
		{"in no lot, alone", outside, none, "", "9", ""},
		{"of a retired lot, never bound", retired.devices[2].imei, unbound, "", "9", ""},
		{"of a distrusted manufacturer, proven", distrusted.devices[0].imei, ofDistrusted, "", "9", ""},
		{"of a distrusted manufacturer, never bound", distrusted.devices[1].imei, unbound, "", "9", ""},
	} {
		rule := rules[c.rule]
		seen[c.rule] = true
		statuses := []binding.EquipmentStatus{cmp.Or(c.status, rule.status)}
		if rule.policy != "" {
			statuses = append(statuses, binding.Whitelisted, binding.Greylisted, binding.Blacklisted, binding.Unknown)
		}
		for i, status := range statuses {
			policy := binding.DefaultEquipmentPolicy()
			if i > 0 {
				policy = policyOf(rule.policy, status)
			}
			policy.ListsLast = c.lists == last
			o := binding.Options{Equipment: &policy}
			if c.lists != "" {
				o.Listings = r.store
			}
			service := r.newService(o).WithLots(r.lots(t))
			if err := service.LoadListings(ctx); err != nil {
				t.Fatal(err)
			}
			r.recorder.take()
			got, err := service.CheckEquipment(ctx, c.imei, c.imsi)
			if want := (binding.Equipment{Status: status, Reason: rule.reason}); err != nil || got != want {
				t.Errorf("%s: %+v, %v; want %+v, rule %s", c.what, got, err, want, c.rule)
			}
			if calls := r.recorder.take(); len(calls) > 1 || len(calls) == 1 && calls[0] != "Equipment" {
				t.Errorf("%s: it called %q", c.what, calls)
			}
		}
	}
	if len(seen) != len(rules) || len(rules) != 9 {
		t.Errorf("docs/equipment.md has %d rules, and %d were tried", len(rules), len(seen))
	}
}

// Where a lot is replaced by another with the same IMEIs, what a device has proven by the key of the one before counts
// for that IMSI by what its own lot and manufacturer are now.
func TestEquipmentOfReplacedLot(t *testing.T) {
	r, before, after := newHarness(t), newMaker(t), newMaker(t)
	ctx, key := t.Context(), vectors(t).lot(t, "lot-2048")
	r.enroll(t, before)
	r.enroll(t, after)
	check := func(what string, d *device, imsi kme.IMSI, status binding.EquipmentStatus,
		reason binding.EquipmentReason) {
		t.Helper()
		for range 10 { // in whatever order the bindings of a device are
			got, err := r.service.CheckEquipment(ctx, d.imei, imsi)
			if want := (binding.Equipment{Status: status, Reason: reason}); err != nil || got != want {
				t.Fatalf("%s: %+v, %v; want %+v", what, got, err, want)
			}
		}
	}
	old := before.newLot(t, "L1", kme.SuiteECDSA, key, 1, newDevices(t, 1)...)
	r.take(t, before, old)
	ofOld := r.prove(t, old.devices[0])
	must[registry.Verdict](t)(imports.RetireLot(ctx, r.token, r.store,
		must[*registry.Lot](t)(imports.FindLot(ctx, r.store, "L1", before.KeyID())), verdict(t, true, "replaced")))
	fresh := after.newLot(t, "L9", kme.SuiteECDSA, key, 1, newDevices(t, 1)...)
	r.take(t, after, fresh)
	d := fresh.devices[0]
	ofFresh := r.prove(t, d)
	check("retired, for the IMSI of before", d, ofOld, binding.Whitelisted, binding.Proven)

	if err := directory.RevokeLot(ctx, before.store, before.Signer, old.Manifest, "leaked", time.Now()); err != nil {
		t.Fatal(err)
	}
	r.refresh(t, before, old)
	check("revoked, for the IMSI of before", d, ofOld, binding.Blacklisted, binding.RevokedDevice)
	_, err := r.service.PrepareVector(ctx, ofOld, newRANDs(1), here)
	checkRefused(t, "a vector by a key of a revoked lot", err, kme.RevokedDevice, "")
	check("revoked, for the IMSI since", d, ofFresh, binding.Whitelisted, binding.Proven)
	check("revoked, alone", d, kme.IMSI{}, binding.Whitelisted, binding.Proven)

	must[registry.Verdict](t)(imports.Distrust(ctx, r.store, before.KeyID(), verdict(t, true, "stolen")))
	r.serve(t)
	check("distrusted, for the IMSI of before", d, ofOld, binding.Greylisted, binding.NotProven)
	check("distrusted, for the IMSI since", d, ofFresh, binding.Whitelisted, binding.Proven)
}

// While the operator's list is not known, or is damaged, nothing is said of any device; while the store is away, a list
// that is known stands.
func TestEquipmentListUnknown(t *testing.T) {
	r := newHarness(t)
	failing := &failingListings{Listings: r.store}
	service := r.newService(binding.Options{Listings: failing})
	imei := must[kme.IMEI](t)(kme.ParseIMEI("49015420323751"))
	check := func(what string, want kme.Reason) {
		t.Helper()
		_, err := service.CheckEquipment(t.Context(), imei, kme.IMSI{})
		if want == "" && err != nil {
			t.Errorf("%s: %v", what, err)
		} else if want != "" {
			checkRefused(t, what, err, want, "")
		}
	}
	check("before it was read", kme.StoreUnavailable)
	failing.err = binding.ErrRolledBack
	service.LoadListings(t.Context())
	check("of a store that is rolled back", kme.RolledBack)
	failing.err = nil
	service.LoadListings(t.Context())
	check("of an empty one", "")
	if service.ListingsFailed() {
		t.Error("a list that was read has failed")
	}
	failing.err = errors.New("the store is away")
	service.LoadListings(t.Context())
	check("while the store is away", "")
	if !service.ListingsFailed() {
		t.Error("a list that cannot be read has not failed")
	}
	failing.err = &binding.DamagedRow{Table: "equipment"}
	service.LoadListings(t.Context())
	check("of one that is damaged", kme.Damaged)
	failing.err = nil
	service.LoadListings(t.Context())
	check("of one that was mended", "")
	failing.err = fmt.Errorf("%w (chain 1)", binding.ErrRolledBack)
	service.LoadListings(t.Context())
	check("of a store that was rolled back since", kme.RolledBack)
}

// What is not in a list that is read as a whole, after it was damaged or rolled back, is not listed any more: the store
// may be one of a backup. Its changes are followed from there, though there were more before.
func TestEquipmentListRestored(t *testing.T) {
	for _, err := range []error{&binding.DamagedRow{Table: "equipment"}, binding.ErrRolledBack} {
		equipmentListRestored(t, err)
	}
}

func equipmentListRestored(t *testing.T, before error) {
	t.Helper()
	r := newHarness(t)
	var stored []binding.Listing
	failing := &failingListings{Listings: listings(func(after int64) (since []binding.Listing) {
		for _, l := range stored {
			if l.Change > after {
				since = append(since, l)
			}
		}
		return since
	})}
	service := r.newService(binding.Options{Listings: failing})
	check := func(what string, want binding.EquipmentReason) {
		t.Helper()
		service.LoadListings(t.Context())
		got, err := service.CheckEquipment(t.Context(), must[kme.IMEI](t)(kme.ParseIMEI("49015420323751")), kme.IMSI{})
		if err != nil || got.Reason != want {
			t.Errorf("%s: %+v, %v; want %s", what, got, err, want)
		}
	}
	entry := func(prefix string, change int64) binding.Listing {
		return binding.Listing{Prefix: prefix, Status: binding.Blacklisted, Change: change}
	}
	stored = []binding.Listing{entry("35", 1), entry("4901", 2), entry("36", 3)}
	check("listed", binding.Listed)
	failing.err = before
	service.LoadListings(t.Context())
	failing.err, stored = nil, stored[:1]
	check("restored", binding.NotInLot)
	stored = append(stored, entry("49015420", 2))
	check("listed again", binding.Listed)
}

type listings func(after int64) []binding.Listing

func (l listings) Listed(_ context.Context, after int64) ([]binding.Listing, error) {
	return l(after), nil
}
func (l listings) List(context.Context, []binding.Listing) (int, error) { panic("not here") }

// Every answer that there can be is counted from zero, so that the first is an increase.
func TestEquipmentCounted(t *testing.T) {
	registry := prometheus.NewRegistry()
	binding.NewMetrics(registry)
	counted := map[string]bool{}
	for _, family := range must[[]*dto.MetricFamily](t)(registry.Gather()) {
		for _, m := range family.GetMetric() {
			if family.GetName() == "kme_equipment_checks_total" {
				counted[m.GetLabel()[1].GetValue()+" "+m.GetLabel()[0].GetValue()] = true
			}
		}
	}
	want := 0
	for _, rule := range documentedRules(t) {
		statuses := []binding.EquipmentStatus{rule.status}
		if rule.status == "" || rule.policy != "" {
			statuses = []binding.EquipmentStatus{binding.Whitelisted, binding.Greylisted, binding.Blacklisted}
		}
		if rule.reason == binding.NotInLot {
			statuses = append(statuses, binding.Unknown)
		}
		for _, s := range statuses {
			if !counted[string(s)+" "+string(rule.reason)] {
				t.Errorf("%s %s is not counted from zero", s, rule.reason)
			}
		}
		want += len(statuses)
	}
	if want -= 3; len(counted) != want { // rows 1 and 8 are LISTED both
		t.Errorf("%d answers are counted, want %d", len(counted), want)
	}
}

// A failingListings fails with err, if there is one.
type failingListings struct {
	binding.Listings
	err error
}

func (f *failingListings) Listed(ctx context.Context, after int64) ([]binding.Listing, error) {
	if f.err != nil {
		return nil, f.err
	}
	return f.Listings.Listed(ctx, after)
}

func TestParseEquipment(t *testing.T) {
	for text, want := range map[string]string{
		"35209900000001": "35209900000001", "352099000000013": "", "352099000000014": "35209900000001",
		"3520990000000177": "35209900000001", "35209900": "35209900", "352099*": "352099", "3520990*": "3520990",
		"*": "", "352099": "", "35209900000001*": "",
		"35209900-35209900": "35209900", "35209900-35209909": "3520990", "35209901-35209900": "",
		"35209899-35209911": "35209899 3520990 35209910 35209911", "00000000-99999999": "",
		"3520990-3520991": "", "": "", "x": "", "-": "", "35209900-": "", "3520990\u0660": "", "+5209900": "",
	} {
		got, err := devicelist.Parse(text)
		if text == "00000000-99999999" { // every IMEI
			want = ""
			if len(got) != 1 || got[0] != "" {
				t.Errorf("%q: %q", text, got)
			}
			continue
		}
		if strings.Join(got, " ") != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v; want %q", text, got, err, want)
		}
	}
	const head = "equipment,status,reason\n"
	for text, want := range map[string]string{
		"":                     "line 1: the list begins with",
		"imei,status,reason\n": "line 1: the list begins with",
		head + "35209900,blacklisted,x\n1,blacklisted,x\n": `line 3: "1" is no IMEI`,
		head + "35209900,black,x\n":                        `line 2: "black" is no status`,
		head + "35209900,blacklisted\n":                    "record on line 2: wrong number of fields",
		head + "35209900,blacklisted,\"x\ny\"\n":           "line 2: the reason has 1 to 200 bytes of text",
		head + "\n\n35209900,removed,x\n":                  `line 4: "removed" is no status`,
	} {
		if all, err := devicelist.Read(strings.NewReader(text), time.Now()); err == nil || all != nil ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v; want %s", text, all, err, want)
		}
	}
	all, err := devicelist.Read(strings.NewReader(head+`35209900-35209901,Greylisted,"a, b"`), time.Now())
	if err != nil || len(all) != 2 || all[1].Prefix != "35209901" || all[1].Status != binding.Greylisted ||
		all[1].Reason != "a, b" {
		t.Errorf("%+v, %v", all, err)
	}
}
