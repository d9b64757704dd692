package binding_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/api"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/kme"
)

// mutate changes something in b; the result is never b.
func mutate(r *rand.Rand, b []byte) []byte {
	out := slices.Clone(b)
	for bytes.Equal(out, b) {
		switch r.IntN(8) {
		case 0, 1, 2:
			out[r.IntN(len(out))] ^= 1 << r.IntN(8)
		case 3:
			i := r.IntN(len(out))
			for j := i; j < min(i+1+r.IntN(32), len(out)); j++ {
				out[j] = byte(r.Uint32())
			}
		case 4:
			i, j := r.IntN(len(out)), r.IntN(len(out))
			out[i], out[j] = out[j], out[i]
		case 5:
			out = out[:r.IntN(len(out))+1]
		case 6:
			out = append(out, byte(r.Uint32()))
		case 7:
			i := r.IntN(len(out))
			out = slices.Concat(out[i:], out[:i])
		}
	}
	return out
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// flat makes n calls, four at once, and demands that memory does not grow with them.
func flat(t *testing.T, n int, each func(*rand.Rand) (ok bool)) {
	t.Helper()
	run := func(n int) {
		var all sync.WaitGroup
		for w := range 4 {
			all.Go(func() {
				random := rand.New(rand.NewPCG(rand.Uint64(), uint64(w)))
				for range n / 4 {
					if !each(random) {
						return
					}
				}
			})
		}
		all.Wait()
	}
	run(n / 10)
	before := heap()
	run(n)
	if after := heap(); after > before+8<<20 {
		t.Errorf("the heap grew from %d to %d bytes", before, after)
	}
}

// No mutated payload is accepted, each is refused for what callers may know, and memory stays flat. A
// million of them in make soak.
func TestMutatedPayloads(t *testing.T) {
	n := 3000
	if os.Getenv("KMEHSM_SOAK") != "" {
		n = 1_000_000
	}
	r, _, l := newServed(t)
	service := r.unrecorded(t, binding.Options{})
	imsi := newIMSI()
	// a million take a while
	attempt := must[*binding.Attempt](t)(service.OpenProvisioning(t.Context(), imsi, 24*time.Hour)).ID
	d := l.devices[0]
	good, _ := d.payload(t)
	flat(t, n, func(random *rand.Rand) bool {
		payload := mutate(random, good)
		_, err := service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
			AttemptID: attempt, Payload: payload, Origin: here, Export: true})
		var refusal *binding.Refusal
		if !errors.As(err, &refusal) || refusal.Reason != kme.KMERejected &&
			!(refusal.Reason == kme.Malformed && len(payload) != len(good)) {
			t.Errorf("%x: %v", payload, err)
			return false
		}
		return true
	})
	if h := r.token.Health(); h.Cause != nil || h.Hung != 0 {
		t.Errorf("%+v", h)
	}
	if _, err := service.EstablishKME(t.Context(), binding.EstablishRequest{IMSI: imsi, IMEI: d.imei,
		AttemptID: attempt, Payload: good, Origin: here}); err != nil {
		t.Errorf("the payload itself, at last: %v", err)
	}
}

// Mutated messages of all methods, as JSON and as protobuf: none makes a binding, none an internal
// error, and memory stays flat.
func TestMutatedMessages(t *testing.T) {
	n := 40_000
	if os.Getenv("KMEHSM_SOAK") != "" {
		n = 1_000_000
	}
	r, _, l := newServed(t)
	service := r.unrecorded(t, binding.Options{})
	handler := api.NewHandler(api.Options{Service: service, Clients: anybody(t),
		Metrics: binding.NewMetrics(prometheus.NewRegistry()), Gather: http.NotFoundHandler()})
	socket := filepath.Join(t.TempDir(), "s") // for its user at the other end, who is us
	listener := must[net.Listener](t)(net.Listen("unix", socket))
	defer listener.Close()
	defer must[net.Conn](t)(net.Dial("unix", socket)).Close()
	conn := must[net.Conn](t)(listener.Accept())
	defer conn.Close()
	imsi, d := newIMSI(), l.devices[0]
	bodies := map[string]string{
		"PrepareVector": `{"imsi":"` + imsi.String() + `","rands":["AAECAwQFBgcICQoLDA0ODw=="]}`,
		"EstablishKME": `{"imsi":"` + imsi.String() + `","imei":"` + d.imei.String() + `","attempt_id":"` +
			r.attempt(t, imsi) + `","payload":"AAECAwQFBgcICQoLDA0ODw=="}`,
		"ReportAuthentication": `{"imsi":"` + imsi.String() + `","ok":true}`,
		"RestoreRAND":          `{"imsi":"` + imsi.String() + `","rand":"AAECAwQFBgcICQoLDA0ODw=="}`,
		"GetBinding":           `{"imsi":"` + imsi.String() + `"}`,
		"ListBindings":         `{"page_size":3,"page_token":"001","imei":"` + d.imei.String() + `"}`,
		"RevokeBinding":        `{"imsi":"` + imsi.String() + `"}`,
	}
	methods := []string{}
	for m := range bodies {
		methods = append(methods, m)
	}
	var codes [600]atomic.Int64
	flat(t, n, func(random *rand.Rand) bool {
		method := methods[random.IntN(len(methods))]
		body := mutate(random, []byte(bodies[method]))
		types := []string{"application/json", "application/proto", "application/grpc+proto"}
		q := httptest.NewRequest("POST", "/kme.v1.KeyService/"+method, bytes.NewReader(body))
		q.Header.Set("Content-Type", types[random.IntN(3)])
		q.ProtoMajor = 2
		q = q.WithContext(api.ConnContext(q.Context(), conn))
		answer := httptest.NewRecorder()
		handler.ServeHTTP(answer, q)
		codes[answer.Code].Add(1)
		if text, _ := io.ReadAll(answer.Result().Body); answer.Code == http.StatusInternalServerError ||
			bytes.Contains(text, []byte("internal error")) {
			t.Errorf("%s %q: %d %s", method, body, answer.Code, text)
			return false
		}
		return true
	})
	var seen strings.Builder
	for code := range codes {
		if c := codes[code].Load(); c > 0 {
			seen.WriteString(" " + strconv.Itoa(code) + ": " + strconv.FormatInt(c, 10))
		}
	}
	t.Logf("answers:%s", seen.String())
	if codes[http.StatusForbidden].Load() > 0 {
		t.Error("not allowed to call")
	}
	if all := must[[]*binding.Binding](t)(service.ListBindings(t.Context(),
		binding.BindingQuery{Limit: 10})); len(all) > 0 {
		t.Errorf("bindings came to be: %+v", all)
	}
}
