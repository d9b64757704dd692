package binding_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	vaultapi "github.com/hashicorp/vault/api"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/limits"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/vaulttest"
	"github.com/kmehsm/kmehsm/kme"
	"github.com/kmehsm/kmehsm/vaultstore"
)

// spread publishes a lot of so many devices in another store too, of which each has a shard of its own; all have the
// key of l's first.
func (m *maker) spread(t *testing.T, store directory.Store, l *lot, devices int) *lot {
	t.Helper()
	key := must[*directory.Shard](t)(m.reader(t).ReadShard(t.Context(), l.Manifest, 0)).Keys[0].Key
	manifest := *l.Manifest
	manifest.Ranges = []directory.Range{{TAC: l.Ranges[0].TAC, First: l.Ranges[0].First, Count: devices}}
	manifest.ShardSize = 1
	s := &lot{Manifest: &manifest, key: l.key}
	publish := func(path string, typ directory.Type, payload any) {
		t.Helper()
		if err := directory.Publish(t.Context(), store, path, m.Signer, typ, payload); err != nil {
			t.Fatal(err)
		}
	}
	publish(directory.ManifestPath(l.Lot), directory.TypeManifest, &manifest)
	for i := range devices {
		imei := manifest.IMEI(i)
		keys := []directory.DeviceKey{{IMEI: imei, Key: key}}
		shard := must[*directory.Shard](t)(directory.NewShard(&manifest, i, keys, make([]byte, sha256.Size)))
		publish(directory.ShardPath(l.Lot, i), directory.TypeShard, shard)
		s.devices = append(s.devices, &device{imei, l.devices[0].signer, s})
	}
	if err := directory.BeginRevocations(t.Context(), store, m.Signer, &manifest, time.Now(), time.Hour); err != nil {
		t.Fatal(err)
	}
	return s
}

// A Vault that takes connections and answers none, and five hundred payloads of devices whose keys are in it, harm
// nobody who is bound: no vector is refused, and 99 of 100 take as long as without.
func TestVaultFrozen(t *testing.T) {
	server := vaulttest.Start(t)
	server.Mount(t, "kme", "2")
	t.Setenv("VAULT_ADDR", server.Addr)
	t.Setenv("VAULT_TOKEN", server.Root)
	client := must[*vaultapi.Client](t)(vaultstore.Connect(t.Context(), vaultstore.Login{Wait: true},
		slog.New(slog.DiscardHandler)))
	store := vaultstore.New(client, "kme")

	const bound, cold = 16, 500
	r, m := newHarness(t), newMaker(t)
	r.enroll(t, m)
	small := m.newLot(t, "L1", kme.SuiteECDSA, vectors(t).lot(t, "lot-2048"), 1, newDevices(t, 1)...)
	l := m.spread(t, store, small, bound+cold)
	const ttl = 50 * time.Millisecond
	r.readers[m.KeyID()] = directory.NewReader(store, directory.NewVerifier(m.Public()),
		directory.ReaderOptions{RevocationTTL: ttl})
	r.take(t, m, l)
	t.Cleanup(func() { r.service.WithLots(new(registry.Lots)) })
	const calls = 64 // fewer than the cold payloads, as it is in production
	r.service = r.newService(binding.Options{Lots: r.lots(t), Limits: limits.Limits{Calls: calls}})
	var imsis []kme.IMSI
	for _, d := range l.devices[:bound] {
		imsi := newIMSI()
		payload, _ := d.payload(t)
		must[*binding.Established](t)(r.service.EstablishKME(t.Context(),
			binding.EstablishRequest{IMSI: imsi, IMEI: d.imei, AttemptID: r.attempt(t, imsi), Payload: payload,
				Origin: here}))
		r.activate(t, imsi)
		imsis = append(imsis, imsi)
	}
	type payload struct {
		imsi    kme.IMSI
		imei    kme.IMEI
		attempt string
		bytes   []byte
	}
	var waiting []payload
	for _, d := range l.devices[bound:] {
		imsi := newIMSI()
		bytes, _ := d.payload(t)
		waiting = append(waiting, payload{imsi, d.imei, r.attempt(t, imsi), bytes})
	}

	// vectors has all who are bound attach, some at a time, and gives the time that 99 of 100 calls take.
	vectors := func(what string) time.Duration {
		t.Helper()
		const each = 50
		var mu sync.Mutex
		var took []time.Duration
		var all sync.WaitGroup
		for at := range 4 {
			all.Go(func() {
				for i := range each * len(imsis) / 4 {
					start := time.Now()
					p, err := r.service.PrepareVector(t.Context(), imsis[(4*i+at)%len(imsis)], newRANDs(1), here)
					if err != nil || p.AttemptID != "" {
						t.Errorf("%s: %+v, %v", what, p, err)
						return
					}
					mu.Lock()
					took = append(took, time.Since(start))
					mu.Unlock()
				}
			})
		}
		all.Wait()
		slices.Sort(took)
		if len(took) == 0 {
			t.Fatal("no vector was answered")
		}
		return took[len(took)*99/100]
	}
	before := vectors("a Vault that answers")

	// As many payloads a second as this machine has time for beside the vectors: the places are for calls that work.
	// A machine that stands still has not all of them come at once.
	due := time.NewTicker(max(2*time.Millisecond, before/4))
	defer due.Stop()
	server.Freeze(t)
	ctx, stop := context.WithCancel(t.Context())
	var asking atomic.Int64
	var mu sync.Mutex
	refused := map[kme.Reason]int64{}
	var all sync.WaitGroup
	for _, p := range waiting {
		all.Go(func() {
			for { // an HSS tries again
				select {
				case <-ctx.Done():
					return
				case <-due.C:
				}
				asking.Add(1)
				_, err := r.service.EstablishKME(ctx, binding.EstablishRequest{IMSI: p.imsi, IMEI: p.imei,
					AttemptID: p.attempt, Payload: p.bytes, Origin: here})
				if refusal := new(binding.Refusal); errors.As(err, &refusal) {
					mu.Lock()
					refused[refusal.Reason]++
					mu.Unlock()
				}
			}
		})
	}
	for asking.Load() < cold || len(r.service.Overdue()) == 0 {
		time.Sleep(time.Millisecond)
	}
	const much = 20 // whoever waits for Vault waits a hundred times as long
	after := vectors("a Vault that is silent")
	for try := 1; after > much*before && try < 5; try++ { // other work may have come between
		after = min(after, vectors("a Vault that is silent"))
	}
	stop()
	all.Wait()
	t.Logf("99 of 100 vectors take %s, and %s with a frozen Vault and %d payloads that wait for it",
		before, after, cold)
	if after > much*before {
		t.Errorf("99 of 100 vectors take %s with a frozen Vault, and %s without", after, before)
	}
	for reason, n := range refused {
		switch {
		case reason == kme.DirectoryUnavailable:
		case reason == kme.Overloaded && 10*n < asking.Load(): // a machine that stands still has all come at once
		default:
			t.Errorf("%d of %d payloads were refused with %s", n, asking.Load(), reason)
		}
	}

	// It goes on where it was.
	server.Thaw(t)
	p := waiting[0]
	for start := time.Now(); ; time.Sleep(ttl) {
		_, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: p.imsi, IMEI: p.imei,
			AttemptID: p.attempt, Payload: p.bytes, Origin: here})
		if err == nil && len(r.service.Overdue()) == 0 {
			break
		}
		if time.Since(start) > time.Minute {
			t.Fatal(fmt.Sprint("a minute after: ", err, r.service.Overdue()))
		}
	}
}
