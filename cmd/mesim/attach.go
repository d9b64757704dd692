package main

import (
	"context"
	"crypto/aes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/urfave/cli/v2"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/internal/milenage"
	"github.com/kmehsm/kmehsm/kme"
)

// A tamper is what is wrong with a device; empty: nothing.
type tamper string

var tampers = []tamper{"kme", "signature", "payload", "other-device", "other-lot", "replay"}

func (t tamper) check() error {
	if t == "" || slices.Contains(tampers, t) {
		return nil
	}
	return fmt.Errorf("--tamper is one of %v, not %q", tampers, string(t))
}

// dial makes the client that the simulated MME and HSS use. It tries once: every refusal counts.
func dial(c *cli.Context) (*client.Client, error) {
	o := client.Options{URL: c.String("server"), Timeout: 30 * time.Second, Tries: 1}
	if !strings.HasPrefix(o.URL, "unix:") {
		if !strings.HasPrefix(o.URL, "https://") {
			return nil, cmdline.Usagef("--server is https://HOST:PORT or unix:/path, not %q", o.URL)
		}
		if err := cmdline.Require(c, "cert", "key", "ca"); err != nil {
			return nil, err
		}
		cert, err := tls.LoadX509KeyPair(c.String("cert"), c.String("key"))
		if err != nil {
			return nil, fmt.Errorf("the client's certificate: %w", err)
		}
		pem, err := os.ReadFile(c.String("ca"))
		if err != nil {
			return nil, err
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no certificate", c.String("ca"))
		}
		o.TLS = &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, RootCAs: pool}
	}
	return client.New(o)
}

type attachResult struct {
	Attached  int            `json:"attached"`
	Rejected  map[string]int `json:"rejected"`
	P50       float64        `json:"p50_ms"`
	P99       float64        `json:"p99_ms"`
	PerSecond float64        `json:"per_second"`
}

// An attachRun attaches devices.
type attachRun struct {
	client      *client.Client // or, over S6a:
	origin      client.Origin
	mme         *mme
	sims        map[kme.IMSI]*milenage.SIM
	kind        tamper
	firstIMSI   kme.IMSI
	firstDevice int
	devices     []*device
	other       *rsa.PublicKey // for other-lot

	mu      sync.Mutex
	failure error           // guarded by mu: the first that is no refusal
	times   []time.Duration // guarded by mu: of EstablishKME
}

func (r *attachRun) all(ctx context.Context, concurrency int) *attachResult {
	result := &attachResult{Rejected: map[string]int{}}
	if r.kind == "other-lot" {
		if r.other, r.failure = otherModulus(r.devices[0].lot); r.failure != nil {
			return result
		}
	}
	start := time.Now()
	var next atomic.Int64
	var group sync.WaitGroup
	for range concurrency {
		group.Go(func() {
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= len(r.devices) {
					return
				}
				err := r.one(ctx, i)
				r.mu.Lock()
				if reason := reasonOf(err); err == nil {
					result.Attached++
				} else if reason != "" {
					result.Rejected[reason]++
				} else {
					if r.failure == nil {
						r.failure = fmt.Errorf("IMEI %s: %w", r.devices[i].imei, err)
					}
					next.Store(int64(len(r.devices)))
				}
				r.mu.Unlock()
			}
		})
	}
	group.Wait()
	result.PerSecond = float64(len(r.times)) / time.Since(start).Seconds()
	result.P50, result.P99 = percentiles(r.times)
	return result
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// reasonOf is the service's reason for a refusal; empty for any other error.
func reasonOf(err error) string {
	var e *client.Error
	if errors.As(err, &e) {
		return string(e.Reason)
	}
	return reasonOfS6a(err)
}

func (r *attachRun) one(ctx context.Context, i int) error {
	d := r.devices[i]
	imsi, err := imsiPlus(r.firstIMSI, r.firstDevice+i)
	if err != nil {
		return err
	}
	m, err := r.messageOf(i, imsi)
	if err != nil {
		return err
	}
	err = r.play(ctx, imsi, d.imei, m)
	if r.kind != "replay" || err != nil {
		return err
	}
	// Far enough from the IMSIs of the devices.
	if imsi, err = imsiPlus(r.firstIMSI, 5_000_000+r.firstDevice+i); err != nil {
		return err
	}
	return r.play(ctx, imsi, d.imei, m)
}

func boundAlready(imsi kme.IMSI) error {
	return fmt.Errorf("IMSI %s is bound already: choose others with --first-imsi", imsi)
}

// timed notes how long f takes.
func (r *attachRun) timed(f func() error) error {
	start := time.Now()
	err := f()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.times = append(r.times, time.Since(start))
	return err
}

// messageOf makes what the device sends, tampered with as asked.
func (r *attachRun) messageOf(i int, imsi kme.IMSI) (*message, error) {
	d := r.devices[i]
	key, public := d.key, d.lot.public
	switch r.kind {
	case "other-device":
		if len(r.devices) < 2 {
			return nil, errors.New("--tamper other-device needs two devices")
		}
		key = r.devices[(i+1)%len(r.devices)].key
	case "other-lot":
		public = r.other
	}
	m, err := d.sign(key, imsi)
	if err != nil {
		return nil, err
	}
	switch r.kind {
	case "kme":
		m.plain.KME.Bytes()[7] ^= 1
	case "signature":
		m.plain.Sig[40] ^= 1
	}
	if err := m.encrypt(d.lot.manifest.Suite, public); err != nil {
		return nil, err
	}
	if r.kind == "payload" {
		m.payload[len(m.payload)-1] ^= 1
	}
	return m, nil
}

// play is the flow of TR 33.868 as HSS, MME and device see it.
func (r *attachRun) play(ctx context.Context, imsi kme.IMSI, imei kme.IMEI, m *message) error {
	if r.mme != nil {
		return r.playS6a(ctx, imsi, imei, m)
	}
	random := newRAND()
	prepared, err := r.client.PrepareVector(ctx, imsi, r.origin, random)
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
	err = r.timed(func() error {
		established, err = r.client.EstablishKME(ctx, imsi, r.origin, imei, prepared.AttemptID, m.payload)
		return err
	})
	if err != nil {
		return err
	}
	if err := m.check(established.NWSig); err != nil {
		return err
	}

	// The device activates the KME and gets a pre-processed vector: both sides hold one KME, or the RAND is lost.
	random = newRAND()
	if prepared, err = r.client.PrepareVector(ctx, imsi, r.origin, random); err != nil {
		return err
	}
	if err := m.decrypts(prepared, random); err != nil {
		return err
	}
	report, err := r.client.ReportAuthentication(ctx, imsi, r.origin, true)
	if err != nil {
		return err
	}
	if report.State != kmev1.State_ACTIVE || !report.Served {
		return fmt.Errorf("after a successful authentication the binding is %v, not ACTIVE, served: %v", report.State, report.Served)
	}
	return nil
}

// check is the device's check of the network.
func (m *message) check(nwSig [sha256.Size]byte) error {
	want := m.plain.NWSig()
	if subtle.ConstantTimeCompare(nwSig[:], want[:]) != 1 {
		return errors.New("NW_SIG is not SHA-256(KME || RME): the network does not have the KME")
	}
	return nil
}

// decrypts is the device's use of a vector: its RAND must be the one that the HSS gave, encrypted under KME.
func (m *message) decrypts(v client.Vectors, random client.RAND) error {
	if v.AttemptID != "" {
		return errors.New("the vector after NW_SIG is not pre-processed")
	}
	got, err := m.decrypt(v.RANDs[0])
	if err == nil && got != random {
		err = errors.New("the pre-processed RAND does not decrypt under the device's KME")
	}
	return err
}

func (m *message) decrypt(rand [aes.BlockSize]byte) (out [aes.BlockSize]byte, err error) {
	block, err := aes.NewCipher(m.plain.KME.Bytes())
	if err == nil {
		block.Decrypt(out[:], rand[:])
	}
	return out, err
}

func newRAND() (b [aes.BlockSize]byte) {
	rand.Read(b[:])
	return b
}

// imsiPlus counts on from an IMSI, in as many digits.
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
