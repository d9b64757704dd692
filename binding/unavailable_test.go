package binding_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

func TestUnavailable(t *testing.T) {
	type call func(ctx context.Context, r *harness, imsi kme.IMSI) error
	prepare := func(ctx context.Context, r *harness, imsi kme.IMSI) error {
		_, err := r.service.PrepareVector(ctx, imsi, newRANDs(1), here)
		return err
	}
	restore := func(ctx context.Context, r *harness, imsi kme.IMSI) error {
		_, err := r.service.RestoreRAND(ctx, imsi, make([]byte, hsmkeys.RANDSize), here)
		return err
	}
	report := func(ctx context.Context, r *harness, imsi kme.IMSI) error {
		_, err := r.service.ReportAuthentication(ctx, imsi, true, here)
		return err
	}
	get := func(ctx context.Context, r *harness, imsi kme.IMSI) error {
		_, err := r.service.GetBinding(ctx, imsi)
		return err
	}
	r, m, l := newServed(t)
	ctx := t.Context()
	d := l.devices[0]
	establish := func(ctx context.Context, r *harness, imsi kme.IMSI) error {
		payload, _ := d.payload(t)
		_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
			AttemptID: r.attemptPastRecorder(t, imsi), Payload: payload, Origin: here})
		return err
	}
	bound := newIMSI()
	if err := establish(ctx, r, bound); err != nil {
		t.Fatal(err)
	}

	secret := errors.New("secret of the driver")
	for _, c := range []struct {
		name   string
		fails  string
		call   call
		imsi   kme.IMSI
		reason kme.Reason
	}{
		{"prepare", "Prepare", prepare, newIMSI(), kme.StoreUnavailable},
		{"prepare", "EncryptRANDs", prepare, bound, kme.HSMUnavailable},
		{"restore", "Spent", restore, bound, kme.StoreUnavailable},
		{"restore", "Subscription", restore, bound, kme.StoreUnavailable},
		{"restore", "DecryptRAND", restore, bound, kme.HSMUnavailable},
		{"report", "Report", report, bound, kme.StoreUnavailable},
		{"get", "Subscription", get, bound, kme.StoreUnavailable},
		{"establish", "Attempt", establish, newIMSI(), kme.StoreUnavailable},
		{"establish", "OpenPayload", establish, newIMSI(), kme.HSMUnavailable},
		{"establish", "Establish", establish, newIMSI(), kme.StoreUnavailable},
		{"prepare", "Prepare", prepare, bound, kme.RolledBack},
		{"establish", "Establish", establish, newIMSI(), kme.RolledBack},
		{"get", "Subscription", get, bound, kme.Damaged},
		{"report", "Report", report, bound, kme.Damaged},
	} {
		name := c.name + ", when " + c.fails + " fails"
		fault := secret
		switch c.reason {
		case kme.RolledBack:
			fault = fmt.Errorf("%w (%w)", binding.ErrRolledBack, secret)
		case kme.Damaged:
			fault = fmt.Errorf("%w: %w", &binding.DamagedRow{Table: "bindings"}, secret)
		}
		r.recorder.onFirst(c.fails, func() error { return fault })
		err := c.call(ctx, r, c.imsi)
		checkRefused(t, name, err, c.reason, "")
		var refusal *binding.Refusal
		if errors.As(err, &refusal) && (strings.Contains(refusal.Message, secret.Error()) || !errors.Is(err, secret)) {
			t.Errorf("%s: message %q, cause %v: the cause is for the log alone", name, refusal.Message, refusal.Cause)
		}
		r.checkBound(t, c.imsi, c.imsi == bound)
		// The fault was passing, and so was the refusal.
		if err := c.call(ctx, r, c.imsi); err != nil {
			t.Errorf("%s, then again: %v", name, err)
		}
	}

	shard := filepath.Join(m.dir, filepath.FromSlash(directory.ShardPath("L1", 0)))
	genuine := must[[]byte](t)(os.ReadFile(shard))
	for name, damage := range map[string]func(){
		"a shard that cannot be read": func() { os.Mkdir(shard, 0o700) },
		"a shard that was changed": func() {
			os.WriteFile(shard, bytes.Replace(genuine, []byte("."), []byte(".e"), 1), 0o600)
		},
		"a shard that another signed": func() {
			os.WriteFile(shard, newMaker(t).sign(t, directory.TypeShard,
				must[*directory.Shard](t)(m.reader(t).ReadShard(ctx, l.Manifest, 0))), 0o600)
		},
	} {
		if name == "a shard that cannot be read" {
			os.Remove(shard)
		}
		damage()
		r.readers[m.KeyID()] = m.reader(t) // one that has not cached it
		r.serve(t)
		r.recorder.take()
		imsi := newIMSI()
		checkRefused(t, name, establish(ctx, r, imsi), kme.DirectoryUnavailable, "")
		if calls := r.recorder.takeToken(); len(calls) > 0 {
			t.Errorf("%s: reached the HSM with %q", name, calls)
		}
		if err := os.RemoveAll(shard); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(shard, genuine, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := establish(ctx, r, imsi); err != nil {
			t.Errorf("%s, then mended: %v", name, err)
		}
	}

	if err := r.token.RemoveLotKey(ctx, m.lotKey("L1")); err != nil {
		t.Fatal(err)
	}
	checkRefused(t, "a lot key that is gone", establish(ctx, r, newIMSI()), kme.HSMUnavailable, "")

	last := newIMSI()
	r.attempt(t, last)
	if err := r.store.Close(); err != nil {
		t.Fatal(err)
	}
	payload, _ := d.payload(t)
	for name, c := range map[string]call{"prepare": prepare, "restore": restore, "report": report, "get": get,
		"establish": func(ctx context.Context, r *harness, imsi kme.IMSI) error {
			_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
				AttemptID: "attempt", Payload: payload, Origin: here})
			return err
		}} {
		checkRefused(t, name+" on a closed database", c(ctx, r, last), kme.StoreUnavailable, "")
	}
}

// Whoever was sent no vector because the HSM was away, or the device revoked, does not activate a binding.
func TestNotSent(t *testing.T) {
	r, m, l := newServed(t)
	d, imsi := l.devices[0], newIMSI()
	payload, _ := d.payload(t)
	must[*binding.Established](t)(r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
		AttemptID: r.attempt(t, imsi), Payload: payload, Origin: here}))
	check := func(reason kme.Reason) {
		t.Helper()
		for range 2 * binding.DefaultTimes().PendingVectors {
			checkRefused(t, "a vector", r.vector(t, imsi), reason, "")
			got := must[*binding.Reported](t)(r.service.ReportAuthentication(t.Context(), imsi, true, here))
			if got.Binding == nil || got.Binding.State != binding.Pending {
				t.Fatalf("after no vector it is %+v", got.Binding)
			}
		}
	}
	r.recorder.mu.Lock()
	r.recorder.before = func(call string) error {
		if call == "EncryptRANDs" {
			return errors.New("away")
		}
		return nil
	}
	r.recorder.mu.Unlock()
	check(kme.HSMUnavailable)
	r.recorder.mu.Lock()
	r.recorder.before = nil
	r.recorder.mu.Unlock()
	r.revoke(t, m, l, d)
	check(kme.RevokedDevice)
}

// A caller who has gone is no fault of the HSM, the directory or the database, and changes nothing.
func TestCanceled(t *testing.T) {
	r, _, l := newServed(t)
	d := l.devices[0]
	bound := newIMSI()
	payload, _ := d.payload(t)
	must[*binding.Established](t)(r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: bound,
		IMEI: d.imei, AttemptID: r.attempt(t, bound), Payload: payload, Origin: here}))
	vector := newRANDs(1)[0]

	open := newIMSI()
	attempt := r.attempt(t, open)
	fresh, p := d.payload(t)
	establish := func(ctx context.Context) error {
		_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: open, IMEI: d.imei, AttemptID: attempt,
			Payload: fresh, Origin: here})
		return err
	}
	for _, c := range []struct {
		name   string
		during []string // canceled just before
		call   func(ctx context.Context) error
	}{
		{"prepare", []string{"Prepare", "EncryptRANDs"}, func(ctx context.Context) error {
			_, err := r.service.PrepareVector(ctx, bound, [][]byte{vector}, here)
			return err
		}},
		{"restore", []string{"Spent", "Subscription", "DecryptRAND"}, func(ctx context.Context) error {
			_, err := r.service.RestoreRAND(ctx, bound, vector, here)
			return err
		}},
		{"report", []string{"Report"}, func(ctx context.Context) error {
			_, err := r.service.ReportAuthentication(ctx, bound, false, here)
			return err
		}},
		{"get", []string{"Subscription"}, func(ctx context.Context) error {
			_, err := r.service.GetBinding(ctx, bound)
			return err
		}},
		{"establish", []string{"OpenPayload", "Establish"}, establish},
	} {
		for _, at := range c.during {
			t.Run(c.name+" during "+at, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				r.recorder.onFirst(at, func() error {
					cancel()
					return nil
				})
				if err := c.call(ctx); !errors.Is(err, context.Canceled) || errors.As(err, new(*binding.Refusal)) {
					t.Errorf("canceled: %v, want context.Canceled", err)
				}
			})
		}
		t.Run(c.name+" too late", func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 0)
			defer cancel()
			if err := c.call(ctx); !errors.Is(err, context.DeadlineExceeded) || errors.As(err, new(*binding.Refusal)) {
				t.Errorf("past its deadline: %v, want context.DeadlineExceeded", err)
			}
		})
	}
	r.checkBound(t, bound, true)
	r.checkBound(t, open, false)
	want := p.NWSig()
	e, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: open, IMEI: d.imei, AttemptID: attempt,
		Payload: fresh, Origin: here})
	if err != nil || !bytes.Equal(e.NWSig, want[:]) {
		t.Errorf("after all that: %v, error %v", e, err)
	}
}

// Two manufacturers may call their lots the same.
func TestTwoManufacturers(t *testing.T) {
	r, _, first := newServed(t)
	m := newMaker(t)
	r.enroll(t, m)
	second := m.newLot(t, "L1", kme.SuiteRSA, vectors(t).lot(t, "lot-3072"), 6, vectors(t).lot(t, "lot-2048"))
	r.take(t, m, second)
	for _, l := range []*lot{first, second} {
		d := l.devices[0]
		payload, p := d.payload(t)
		imsi := newIMSI()
		e, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
			AttemptID: r.attempt(t, imsi), Payload: payload, Origin: here})
		if want := p.NWSig(); err != nil || !bytes.Equal(e.NWSig, want[:]) {
			t.Fatalf("manufacturer %s: %v, error %v", l.Manufacturer, e, err)
		}
		b := must[*binding.Binding](t)(r.service.GetBinding(t.Context(), imsi))
		if b.Manufacturer != l.Manufacturer || b.Lot != "L1" {
			t.Errorf("bound to lot %s of %s, want that of %s", b.Lot, b.Manufacturer, l.Manufacturer)
		}
	}
	lots := must[[]*registry.Lot](t)(r.store.Lots(t.Context()))
	if len(lots) != 2 {
		t.Errorf("%d lots, want 2", len(lots))
	}

	// The devices of one are not those of the other, whatever they have signed.
	payload, _ := first.devices[0].payload(t)
	imsi := newIMSI()
	_, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: first.devices[1].imei,
		AttemptID: r.attempt(t, imsi), Payload: payload, Origin: here})
	checkRefused(t, "another device's payload", err, kme.KMERejected, notAccepted)

	manifest, dev, err := must[*registry.Lots](t)(registry.NewLots(lots, r.readers)).Device(t.Context(),
		second.devices[0].imei)
	if err != nil || manifest.Manufacturer != m.KeyID() ||
		!reflect.DeepEqual(dev.Key, second.devices[0].signer.Public()) {
		t.Errorf("the directory says %+v, %+v, error %v", manifest, dev, err)
	}
	if _, err := registry.NewLots(lots, nil); err == nil || !strings.Contains(err.Error(), "not enrolled") {
		t.Errorf("lots without a directory: %v", err)
	}
}
