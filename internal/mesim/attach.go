package mesim

import (
	"cmp"
	"context"
	"crypto/aes"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/internal/milenage"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/kme"
)

// A Tamper is what is wrong with a device; empty: nothing.
type Tamper string

var tampers = []Tamper{"kme", "signature", "payload", "other-device", "other-lot", "replay"}

// Check refuses an unknown Tamper.
func (t Tamper) Check() error {
	if t == "" || slices.Contains(tampers, t) {
		return nil
	}
	return usage.In("tamper", fmt.Errorf("it is one of %v, not %q", tampers, string(t)))
}

// A Network is what devices attach to: the service itself, or an MME with the SIMs of its subscribers.
type Network struct {
	Client *client.Client
	Origin client.Origin // whom the HSS names as its peer, over Client

	MME  *MME // nil: Client
	SIMs map[kme.IMSI]*milenage.SIM
}

// A Run is devices that attach to a network.
type Run struct {
	Network
	Devices     []*Device
	First       int      // the number of the first device
	FirstIMSI   kme.IMSI // of device 0; the others count on from it
	SpareIMSI   kme.IMSI // likewise, for Attach's devices whose IMSI is bound already; zero: that is an error
	Concurrency int
	Report      func(devices int) // called by Attach at each device, by one goroutine at a time; may be nil
}

// AttachResult is how many devices attached; its times are those of EstablishKME.
type AttachResult struct {
	Attached  int            `json:"attached"`
	Rejected  map[string]int `json:"rejected"`
	P50       float64        `json:"p50_ms"`
	P99       float64        `json:"p99_ms"`
	PerSecond float64        `json:"per_second"`
}

// attaching is a Run that is under way.
type attaching struct {
	Run
	tamper Tamper
	other  *rsa.PublicKey // for other-lot

	mu    sync.Mutex
	times []time.Duration // guarded by mu: of EstablishKME
}

// Attach plays the whole flow with each device. It fails if a device was not treated as it should be; also then there
// is a result.
func (r Run) Attach(ctx context.Context, tamper Tamper) (*AttachResult, error) {
	result := &AttachResult{Rejected: map[string]int{}}
	a := &attaching{Run: r, tamper: tamper}
	if tamper == "other-lot" {
		other, err := rsa.GenerateKey(rand.Reader, r.Devices[0].lot.public.N.BitLen())
		if err != nil {
			return result, err
		}
		a.other = &other.PublicKey
	}
	start := time.Now()
	var mu sync.Mutex
	rejected := 0
	err := each(ctx, r.Concurrency, len(r.Devices), func(i int) error {
		err := a.one(ctx, i)
		mu.Lock()
		defer mu.Unlock()
		if reason := reasonOf(err); reason != "" {
			result.Rejected[reason]++
			rejected++
		} else if err != nil {
			return fmt.Errorf("IMEI %s: %w", r.Devices[i].IMEI, err)
		} else {
			result.Attached++
		}
		if r.Report != nil {
			r.Report(result.Attached + rejected)
		}
		return nil
	})
	result.PerSecond = float64(len(a.times)) / time.Since(start).Seconds()
	result.P50, result.P99 = percentiles(a.times)
	switch {
	case err != nil:
	case tamper == "" && rejected > 0:
		err = fmt.Errorf("%d of %d devices were rejected: %v", rejected, len(r.Devices), result.Rejected)
	case tamper != "" && result.Attached > 0:
		err = fmt.Errorf("%d of %d tampered devices (%s) were let in", result.Attached, len(r.Devices), tamper)
	}
	return result, err
}

// each calls f with the numbers below n, on so many goroutines, until one call fails or ctx ends.
func each(ctx context.Context, goroutines, n int, f func(i int) error) error {
	var next atomic.Int64
	group, going := errgroup.WithContext(ctx)
	for range goroutines {
		group.Go(func() error {
			for going.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= n {
					return nil
				}
				if err := f(i); err != nil {
					return cmp.Or(ctx.Err(), err) // once ctx has ended, f fails for that
				}
			}
			return ctx.Err()
		})
	}
	return group.Wait()
}

// reasonOf is the network's reason for a refusal; empty for any other error.
func reasonOf(err error) string {
	if e, ok := errors.AsType[*client.Error](err); ok {
		return string(e.Reason)
	}
	return reasonOfS6a(err)
}

func (a *attaching) one(ctx context.Context, i int) error {
	err := a.oneFrom(ctx, a.FirstIMSI, i)
	if a.SpareIMSI != (kme.IMSI{}) && errors.Is(err, errBound) {
		err = a.oneFrom(ctx, a.SpareIMSI, i)
	}
	return err
}

// oneFrom plays device i, with an IMSI that counts from that of device 0.
func (a *attaching) oneFrom(ctx context.Context, first kme.IMSI, i int) error {
	d := a.Devices[i]
	imsi, err := imsiPlus(first, a.First+i)
	if err != nil {
		return err
	}
	m, err := a.message(i, imsi)
	if err != nil {
		return err
	}
	err = a.play(ctx, imsi, d.IMEI, m)
	if a.tamper != "replay" || err != nil {
		return err
	}
	// Far enough from the IMSIs of the devices.
	if imsi, err = imsiPlus(first, 5_000_000+a.First+i); err != nil {
		return err
	}
	return a.play(ctx, imsi, d.IMEI, m)
}

var errBound = errors.New("is bound already: choose others")

func boundAlready(imsi kme.IMSI) error {
	return usage.In("first-imsi", fmt.Errorf("IMSI %s %w", imsi, errBound))
}

// timed measures how long f takes.
func (a *attaching) timed(f func() error) error {
	start := time.Now()
	err := f()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.times = append(a.times, time.Since(start))
	return err
}

// message makes what the device sends, tampered with as asked.
func (a *attaching) message(i int, imsi kme.IMSI) (*Message, error) {
	d := a.Devices[i]
	key, public := d.key, d.lot.public
	switch a.tamper {
	case "other-device":
		if len(a.Devices) < 2 {
			return nil, usage.In("tamper", errors.New("other-device needs two devices"))
		}
		key = a.Devices[(i+1)%len(a.Devices)].key
	case "other-lot":
		public = a.other
	}
	m, err := d.sign(key, imsi)
	if err != nil {
		return nil, err
	}
	switch a.tamper {
	case "kme":
		m.plain.KME.Bytes()[7] ^= 1
	case "signature":
		m.plain.Sig[40] ^= 1
	}
	if err := m.encrypt(d.lot.manifest.Suite, public); err != nil {
		return nil, err
	}
	if a.tamper == "payload" {
		m.Payload[len(m.Payload)-1] ^= 1
	}
	return m, nil
}

// play is the flow of TR 33.868 as HSS, MME and device see it.
func (a *attaching) play(ctx context.Context, imsi kme.IMSI, imei kme.IMEI, m *Message) error {
	if a.MME != nil {
		return a.playS6a(ctx, imsi, imei, m)
	}
	random := newRAND()
	prepared, err := a.Client.PrepareVector(ctx, imsi, a.Origin, random)
	if err != nil {
		return err
	}
	if prepared.AttemptID == "" {
		return boundAlready(imsi)
	}
	if prepared.RANDs[0] != random {
		return errors.New("the RAND of an IMSI without a binding came back changed")
	}
	var established client.Establishment
	err = a.timed(func() error {
		established, err = a.Client.EstablishKME(ctx, imsi, a.Origin, imei, prepared.AttemptID, m.Payload)
		return err
	})
	if err != nil {
		return err
	}
	if err := m.check(established.NWSig); err != nil {
		return err
	}

	// The device activates the KME and gets a pre-processed vector: it finds the RAND only if both sides have the same
	// KME.
	random = newRAND()
	if prepared, err = a.Client.PrepareVector(ctx, imsi, a.Origin, random); err != nil {
		return err
	}
	if err := m.Decrypts(prepared, random); err != nil {
		return err
	}
	report, err := a.Client.ReportAuthentication(ctx, imsi, a.Origin, true)
	if err != nil {
		return err
	}
	if report.State != kmev1.State_ACTIVE || !report.Served {
		return fmt.Errorf("after a successful authentication the binding is %v, not ACTIVE, served: %v", report.State,
			report.Served)
	}
	return nil
}

func newRAND() (b [aes.BlockSize]byte) {
	rand.Read(b[:])
	return b
}

// imsiPlus adds a number to an IMSI, and keeps its length.
func imsiPlus(first kme.IMSI, n int) (kme.IMSI, error) {
	digits := first.String()
	v, err := strconv.ParseUint(digits, 10, 64)
	if err != nil {
		return first, err
	}
	s := fmt.Sprintf("%0*d", len(digits), v+uint64(n))
	if len(s) > len(digits) {
		return first, fmt.Errorf("there is no IMSI %d after %s", n, digits)
	}
	return kme.ParseIMSI(s)
}

// percentiles sorts times, and gives the median and the 99th percentile in milliseconds; zeros of none.
func percentiles(times []time.Duration) (p50, p99 float64) {
	slices.Sort(times)
	if n := len(times); n > 0 {
		p50, p99 = milliseconds(times[n/2]), milliseconds(times[n*99/100])
	}
	return p50, p99
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
