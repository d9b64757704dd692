package binding_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/kme"
)

// Calls of all kinds at once, from several origins: no KME is accepted twice, a vector is in clear or under the KME of
// a payload, and in the end each IMSI has at most one binding of each state, of a payload that was accepted for it.
func TestModelAtOnce(t *testing.T) {
	r, _, l := newServed(t)
	r.service = r.unrecorded(t, binding.Options{})
	var imsis []kme.IMSI
	for range 3 {
		imsis = append(imsis, newIMSI())
	}
	var payloads []sent
	for i := range 24 {
		s := sent{device: l.devices[i%3]}
		s.payload, s.plain = s.device.payload(t)
		payloads = append(payloads, s)
	}
	var mu sync.Mutex
	accepted := map[int]map[string]bool{} // the attempts that a payload was accepted in
	activated := 0
	origins := modelOrigins(t)
	var all sync.WaitGroup
	for w := range 8 {
		all.Go(func() {
			random := rand.New(rand.NewPCG(uint64(w), uint64(time.Now().UnixNano())))
			report := func(imsi kme.IMSI, ok bool, o binding.Origin) {
				got, err := r.service.ReportAuthentication(t.Context(), imsi, ok, o)
				if err != nil {
					checkRefused(t, "a report", err, kme.NotBound, "")
					return
				}
				if b := got.Binding; b != nil && b.State == binding.Active {
					mu.Lock()
					activated++
					mu.Unlock()
				} else if b != nil && b.State != binding.Pending || got.Served && b == nil {
					t.Errorf("the report gives %+v", got)
				}
			}
			for range 200 {
				imsi, o := imsis[random.IntN(len(imsis))], origins[random.IntN(len(origins))]
				switch random.IntN(8) {
				case 0:
					report(imsi, random.IntN(4) > 0, o)
				case 1:
					if random.IntN(4) == 0 {
						r.service.RevokeBinding(t.Context(), imsi)
					}
				case 2:
					r.service.OpenProvisioning(t.Context(), imsi, time.Minute)
				default:
					rands := newRANDs(1)
					p, err := r.service.PrepareVector(t.Context(), imsi, rands, o)
					if err != nil {
						if o.Provisioning == binding.Allowed {
							t.Error(err)
							return
						}
						checkRefused(t, "an origin that may not provision", err, kme.CallerNotAllowed, "")
						continue
					}
					if p.AttemptID == "" {
						if !slices.ContainsFunc(payloads, func(s sent) bool {
							block := must[cipher.Block](t)(aes.NewCipher(s.plain.KME.Bytes()))
							want := make([]byte, hsmkeys.RANDSize)
							block.Encrypt(want, rands[0])
							return bytes.Equal(p.RANDs[0][:], want)
						}) {
							t.Error("a vector is under no KME")
						}
						if random.IntN(2) == 0 { // AKA has succeeded
							report(imsi, true, o)
						}
						continue
					}
					if o.Provisioning != binding.Allowed {
						t.Errorf("%s may not provision, and has an attempt", o.Name)
					}
					n := random.IntN(len(payloads))
					s := payloads[n]
					e, err := r.service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi,
						IMEI: s.device.imei, AttemptID: p.AttemptID, Payload: s.payload, Origin: o})
					var refusal *binding.Refusal
					if err != nil &&
						(!errors.As(err, &refusal) ||
							!slices.Contains([]kme.Reason{kme.KMERejected, kme.NoAttempt, kme.OtherDevice},
								refusal.Reason)) {
						t.Error(err)
						return
					}
					if err != nil {
						continue
					}
					if want := s.plain.NWSig(); !bytes.Equal(e.NWSig, want[:]) {
						t.Error("another payload's NW_SIG was answered")
					}
					mu.Lock()
					if accepted[n] == nil {
						accepted[n] = map[string]bool{}
					}
					accepted[n][p.AttemptID] = true
					mu.Unlock()
				}
			}
		})
	}
	all.Wait()
	if len(accepted) == 0 || activated == 0 {
		t.Errorf("%d payloads were accepted, %d reports found an active binding", len(accepted), activated)
	}
	for n, attempts := range accepted {
		if len(attempts) != 1 {
			t.Errorf("payload %d was accepted in %d attempts", n, len(attempts))
		}
	}
	listed := must[[]*binding.Binding](t)(r.service.ListBindings(t.Context(), binding.BindingQuery{Limit: 1000}))
	for i, b := range listed {
		if i > 0 && listed[i-1].IMSI.String() >= b.IMSI.String() {
			t.Error("the list is not in order")
		}
		if !slices.ContainsFunc(payloads, func(s sent) bool {
			nwSig := s.plain.NWSig()
			return bytes.Equal(nwSig[:], b.NWSig) && s.device.imei == b.IMEI
		}) {
			t.Errorf("a binding of no payload: %+v", b)
		}
	}
}
