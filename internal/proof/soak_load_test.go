package proof

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/internal/mesim"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// told is an IMSI whose device was told a NW_SIG.
type told struct {
	imsi kme.IMSI
	imei kme.IMEI
}

// imsi is one that is free, at a place of the database that is far from the one before.
func (s *soak) imsi() (imsi kme.IMSI) {
	const far = 1_000_000_007 // a prime
	places := int64(s.bindings) * (soakRoom - 1)
	place := s.next.Add(1) * far % places
	must.Do(s.t, imsi.UnmarshalText(fmt.Appendf(nil, "00101%010d",
		place/(soakRoom-1)*soakRoom+1+place%(soakRoom-1))))
	return imsi
}

var errBoundBefore = errors.New("the IMSI was bound by an earlier run")

// patient makes a call until it is answered, through an outage of anything.
func patient[A any](ctx context.Context, call func() (A, error)) (a A, err error) {
	ctx, cancel := context.WithTimeout(ctx, testproc.Patience)
	defer cancel()
	for {
		a, err = call()
		var refused *client.Error
		if err == nil || errors.As(err, &refused) && !refused.Temporary() || ctx.Err() != nil {
			return a, err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// attach plays one device's whole attach as HSS and device see it. note gets what it was told.
func (s *soak) attach(ctx context.Context, c *client.Client, d *mesim.Device, replay bool, note func(told)) error {
	imsi := s.imsi()
	m, err := d.Message(imsi)
	if err != nil {
		return err
	}
	established, err := s.establish(ctx, c, imsi, d, m)
	if err != nil {
		return err
	}
	if established.NWSig != m.NWSig() {
		return fmt.Errorf("IMSI %s: NW_SIG is not that of the device", imsi)
	}
	note(told{imsi, d.IMEI})
	random := randomRAND()
	vectors, err := patient(ctx, func() (client.Vectors, error) {
		return c.PrepareVector(ctx, imsi, client.Origin{}, random)
	})
	if err == nil {
		err = m.Decrypts(vectors, random)
	}
	if err != nil {
		return fmt.Errorf("IMSI %s, after its NW_SIG: %w", imsi, err)
	}
	report, err := patient(ctx, func() (client.Report, error) {
		return c.ReportAuthentication(ctx, imsi, client.Origin{}, true)
	})
	s.mu.Lock()
	revoked := s.revoked[imsi] // since an earlier try of the report, whose answer was lost
	s.mu.Unlock()
	if err != nil || report.State != kmev1.State_ACTIVE && !revoked {
		return fmt.Errorf("IMSI %s, after its NW_SIG: state %v, %w", imsi, report.State, err)
	}
	if !replay {
		return nil
	}
	other := s.imsi()
	if _, err := s.establish(ctx, c, other, d, m); errors.Is(err, errBoundBefore) {
		return nil
	} else if !errors.Is(err, client.Reason(kme.KMERejected)) {
		return fmt.Errorf("the KME of %s was to be accepted for %s too: %w", imsi, other, err)
	}
	atomic.AddInt64(&s.result.Replays, 1)
	return nil
}

func (s *soak) establish(
	ctx context.Context, c *client.Client, imsi kme.IMSI, d *mesim.Device, m *mesim.Message,
) (e client.Establishment, err error) {
	random := randomRAND()
	vectors, err := patient(ctx, func() (client.Vectors, error) {
		return c.PrepareVector(ctx, imsi, client.Origin{}, random)
	})
	if err != nil {
		return e, fmt.Errorf("IMSI %s: %w", imsi, err)
	}
	if vectors.AttemptID == "" {
		return e, errBoundBefore
	}
	e, err = patient(ctx, func() (client.Establishment, error) {
		return c.EstablishKME(ctx, imsi, client.Origin{}, d.IMEI, vectors.AttemptID, m.Payload)
	})
	if err != nil {
		return e, fmt.Errorf("IMSI %s, IMEI %s: %w", imsi, d.IMEI, err)
	}
	return e, nil
}

func randomRAND() (r client.RAND) {
	rand.Read(r[:])
	return r
}

// load has devices attach for as long as the run is, and everything happen to the service.
func (s *soak) load() {
	ctx, cancel := context.WithCancel(s.t.Context())
	s.era.Store(1)
	var workers, watch sync.WaitGroup
	end := func() {
		cancel()
		workers.Wait()
		watch.Wait()
	}
	defer end() // also of what fails
	for w := range 8 {
		workers.Go(func() {
			for i := w; ctx.Err() == nil; i += 8 {
				s.begun.Add(1)
				start, era := time.Now(), s.era.Load()
				err := s.attach(context.WithoutCancel(ctx), s.grown.hss, s.devices[i%len(s.devices)], i%50 == 0,
					func(b told) { s.mu.Lock(); s.told = append(s.told, b); s.mu.Unlock() })
				if errors.Is(err, errBoundBefore) {
					continue
				} else if err != nil {
					s.t.Error(err)
					return
				}
				took := time.Since(start)
				s.mu.Lock()
				s.times.all = append(s.times.all, took)
				if era%2 == 1 && s.era.Load() == era {
					s.times.well = append(s.times.well, took)
				}
				s.mu.Unlock()
			}
		})
	}
	start := time.Now()
	series := new(series)
	watch.Go(func() { s.comeBack(ctx) })
	watch.Go(func() {
		for ctx.Err() == nil {
			series.sample(s.grown)
			time.Sleep(max(100*time.Millisecond, s.duration/1000))
		}
	})
	s.happen(start, series)
	end()
	s.result.Seconds, s.result.Attached = time.Since(start).Seconds(), len(s.times.all)
	s.result.Well, s.result.All = latencyOf(s.times.well), latencyOf(s.times.all)
	series.flat(s)
}

// comeBack has subscribers that are bound already come back, as most do in a year: each is seen with its device. What
// keysvc remembers of them is full within the first minutes of an hour.
func (s *soak) comeBack(ctx context.Context) {
	random := mathrand.New(mathrand.NewPCG(s.seed, 1))
	for ctx.Err() == nil {
		i := random.IntN(s.bindings) // as fill in binding/sqlstore has it
		var imsi kme.IMSI
		var imei kme.IMEI
		must.Do(s.t, imsi.UnmarshalText(fmt.Appendf(nil, "00101%010d", i*soakRoom)))
		must.Do(s.t, imei.UnmarshalText(fmt.Append(nil, 35209900000000+i)))
		e, err := s.grown.hss.CheckEquipment(ctx, imei, imsi)
		var refused *client.Error
		if err == nil && e.Status != kmev1.EquipmentStatus_WHITELISTED ||
			errors.As(err, &refused) && !refused.Temporary() {
			s.t.Errorf("IMEI %s, IMSI %s: equipment %v, %v", imei, imsi, e.Status, err)
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// everythingTold has all that was told looked up: each has its binding.
func (s *soak) everythingTold() {
	start := time.Now()
	var next, there, gone atomic.Int64
	var all sync.WaitGroup
	for range 32 {
		all.Go(func() {
			for n := next.Add(1) - 1; n < int64(len(s.told)) && gone.Load() < 10; n = next.Add(1) - 1 {
				b, want := s.told[n], kmev1.State_ACTIVE
				if s.revoked[b.imsi] {
					want = kmev1.State_REVOKED
				}
				is, err := patient(s.t.Context(), func() (*kmev1.GetBindingResponse, error) {
					return s.grown.admin.GetBinding(s.t.Context(), b.imsi)
				})
				if err != nil || is.State != want || is.Imei != b.imei.String() {
					s.t.Errorf("IMSI %s was told a NW_SIG for IMEI %s, and is %v of %s, not %v: %v", b.imsi, b.imei,
						is.GetState(), is.GetImei(), want, err)
					gone.Add(1)
					continue
				}
				there.Add(1)
			}
		})
	}
	all.Wait()
	s.result.BindingsInTheEnd = int(there.Load())
	s.t.Logf("%d told NW_SIGs have their bindings (%s); %d KMEs were refused a second time", there.Load(),
		time.Since(start).Round(time.Second), s.result.Replays)
	if s.result.Replays == 0 {
		s.t.Error("no KME was tried twice")
	}
}
