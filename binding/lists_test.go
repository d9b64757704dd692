package binding_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/revocations"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// readAgain puts another reader of a maker's directory in the place of the harness's, and has the service use it.
func (r *harness) readAgain(t *testing.T, m *maker, l *lot, o directory.ReaderOptions) error {
	t.Helper()
	o.RevocationTTL, o.ReadTimeout = time.Hour, testproc.Patience
	reader := directory.NewReader(m.store, directory.NewVerifier(m.Public()), o)
	r.readers[m.KeyID()] = reader
	r.serve(t)
	t.Cleanup(func() { reader.Follow(nil) })
	return reader.Refresh(t.Context(), l.Manifest)
}

// A list that was to be replaced longer ago than max_revocation_age: nobody of the lot is bound, and nobody who is
// bound gets a vector; without that setting, and when the list is signed anew, all goes on.
func TestMaxRevocationAge(t *testing.T) {
	r, m, l := newServed(t)
	ctx, imsi := t.Context(), newIMSI()
	establish := func(imsi kme.IMSI, d *device) error {
		t.Helper()
		payload, _ := d.payload(t)
		_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
			AttemptID: r.attempt(t, imsi), Payload: payload, Origin: here})
		return err
	}
	prepare := func() error {
		_, err := r.service.PrepareVector(ctx, imsi, newRANDs(1), here)
		return err
	}
	if err := establish(imsi, l.devices[0]); err != nil {
		t.Fatal(err)
	}
	r.activate(t, imsi)
	sign := func(now time.Time) {
		t.Helper()
		if err := directory.RefreshRevocations(ctx, m.store, m.Signer, l.Manifest, now, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	sign(time.Now().Add(-3 * time.Hour))
	if err := r.readAgain(t, m, l, directory.ReaderOptions{}); err == nil {
		t.Error("the list is not late")
	}
	if err := errors.Join(prepare(), establish(newIMSI(), l.devices[1])); err != nil {
		t.Errorf("without max_revocation_age: %v", err)
	}
	if lists := r.service.Overdue()[m.KeyID()]; len(lists) != 1 || lists[0].Why != directory.Late {
		t.Errorf("%+v", lists)
	}
	r.readAgain(t, m, l, directory.ReaderOptions{MaxAge: time.Hour})
	r.recorder.take()
	checkRefused(t, "a vector", prepare(), kme.DirectoryUnavailable, "")
	checkRefused(t, "a payload", establish(newIMSI(), l.devices[2]), kme.DirectoryUnavailable, "")
	if calls := r.recorder.takeToken(); len(calls) > 0 {
		t.Errorf("the HSM was asked: %q", calls)
	}
	if _, err := r.service.ReportAuthentication(ctx, imsi, true, here); err != nil {
		t.Errorf("a report needs no directory: %v", err)
	}
	sign(time.Now())
	r.refresh(t, m, l)
	if err := errors.Join(prepare(), establish(newIMSI(), l.devices[2])); err != nil {
		t.Errorf("when the list was signed anew: %v", err)
	}
}

// Which list was believed last is an entry of the ledger, the service's own, for each list one.
func TestRevocationMemory(t *testing.T) {
	r, m, l := newServed(t)
	o := directory.ReaderOptions{Memory: revocations.Memory(r.store, m.KeyID(), t.TempDir())}
	ctx := binding.WithActor(t.Context(), binding.Actor{Client: "hss"})
	first, _, err := m.store.Read(ctx, directory.RevocationsPath("L1"))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := r.readAgain(t, m, l, o); err != nil {
			t.Fatal(err)
		}
	}
	r.revoke(t, m, l, l.devices[0])
	entries := must[[]binding.Entry](t)(r.store.History(ctx, binding.RevocationsSubject(m.KeyID(), "L1")))
	if len(entries) != 2 {
		t.Fatalf("%+v", entries)
	}
	for i, e := range entries {
		var mark directory.ListMark
		if err := json.Unmarshal([]byte(e.Detail), &mark); err != nil || mark.Version != i+1 || len(mark.SHA256) != 32 {
			t.Errorf("%s, %v", e.Detail, err)
		}
		if e.Event != binding.EventRevocations || e.Actor != (binding.Actor{}) {
			t.Errorf("%+v", e)
		}
	}
	_, version, err := m.store.Read(ctx, directory.RevocationsPath("L1"))
	if err == nil {
		err = m.store.Update(ctx, directory.RevocationsPath("L1"), first, version)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := r.readAgain(t, m, l, o); err == nil || r.service.Overdue()[m.KeyID()][0].Why != directory.Rollback {
		t.Errorf("an earlier list after a restart: %v", err)
	}
	// The copy of the last one serves on, also where the directory has none; one that was changed does not.
	for _, directoryHas := range []bool{true, false} {
		if !directoryHas {
			if err := os.Remove(filepath.Join(m.dir, filepath.FromSlash(directory.RevocationsPath("L1")))); err != nil {
				t.Fatal(err)
			}
			r.readAgain(t, m, l, o)
		}
		if revoked, err := r.readers[m.KeyID()].Revoked(l.Manifest, l.devices[0].imei); err != nil || !revoked {
			t.Errorf("a revoked device, after a restart, with a list in the directory (%v): revoked %v, error %v",
				directoryHas, revoked, err)
		}
	}
	older := directory.ReaderOptions{Memory: o.Memory}
	if err := o.Memory.Keep("L1", first); err != nil {
		t.Fatal(err)
	}
	r.readAgain(t, m, l, older)
	if overdue := r.service.Overdue()[m.KeyID()]; len(overdue) != 1 || !overdue[0].Since.IsZero() {
		t.Errorf("an earlier list was kept in the place of the last one: %+v", overdue)
	}
	// Another manufacturer's lot of this name has a subject of its own.
	other := revocations.Memory(r.store, "another", t.TempDir())
	if _, found, err := other.Last(ctx, "L1"); found || err != nil {
		t.Errorf("found: %v, %v", found, err)
	}
}

// hung is a store that does not answer.
type hung struct{ directory.Store }

func (hung) Read(ctx context.Context, _ string) ([]byte, string, error) {
	<-ctx.Done()
	return nil, "", ctx.Err()
}

// deaf is a store that does not answer, and cannot be interrupted, as a network file system.
type deaf struct {
	directory.Store
	until chan struct{}
	asked atomic.Int64
}

func (d *deaf) Read(context.Context, string) ([]byte, string, error) {
	d.asked.Add(1)
	<-d.until
	return nil, "", errors.New("too late")
}

// A manufacturer whose directory does not answer is named, and no other is for the time that this takes.
func TestCheckDirectories(t *testing.T) {
	r, _, _ := newServed(t)
	nfs := &deaf{until: make(chan struct{})}
	defer close(nfs.until)
	stores := []directory.Store{nfs, hung{}, hung{}, hung{}}
	const silent = 4
	last := ""
	for i := range silent + 1 { // in the order of IMEIs, the last one answers
		m := newMaker(t)
		r.enroll(t, m)
		if last = m.KeyID(); i < silent {
			r.readers[last] = directory.NewReader(stores[i], directory.NewVerifier(m.Public()),
				directory.ReaderOptions{})
		}
		key := vectors(t).lot(t, "lot-2048")
		r.take(t, m, m.newLot(t, "L1", kme.SuiteECDSA, key, 100*(i+1), newDevices(t, 1)...))
	}
	t.Cleanup(func() { r.service.WithLots(new(registry.Lots)) })
	before := nfs.asked.Load()             // for its list
	for wait := time.Second; ; wait *= 2 { // the one that answers takes time, too
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		failed := r.service.CheckDirectories(ctx)
		cancel()
		if len(failed) == silent && failed[last] == nil {
			break
		}
		if wait > testproc.Patience {
			t.Fatalf("%v", failed)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if r.service.CheckDirectories(ctx); nfs.asked.Load() > before+2 { // two, if the list is read late
		t.Errorf("it was asked %d times", nfs.asked.Load())
	}
}

// panicking is a store that panics.
type panicking struct{ directory.Store }

func (panicking) Read(context.Context, string) ([]byte, string, error) { panic("in the store") }

// A directory that panics while it is checked, on a goroutine of its own, is not available, and a fault of the service.
func TestCheckDirectoryPanics(t *testing.T) {
	r, m, _ := newServed(t)
	r.readers[m.KeyID()] = directory.NewReader(panicking{}, directory.NewVerifier(m.Public()),
		directory.ReaderOptions{})
	r.serve(t)
	t.Cleanup(func() { r.service.WithLots(new(registry.Lots)) })
	before := panics.Count()
	failed := r.service.CheckDirectories(t.Context())
	if p := panics.Of(failed[m.KeyID()]); p == nil || p.Value != "in the store" {
		t.Errorf("%v", failed)
	}
	if panics.Count() == before {
		t.Error("it is not counted")
	}
}
