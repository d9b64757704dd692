package mesim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/kme"
)

func TestAttach(t *testing.T) {
	o := newOperator(newLine(t, 3), "")
	run := o.run(t, Network{Client: o.serve(t)})
	result, err := run.Attach(t.Context(), "")
	if err != nil || result.Attached != 3 || len(result.Rejected) != 0 || result.P50 <= 0 || result.P99 < result.P50 ||
		result.PerSecond <= 0 {
		t.Errorf("%+v, %v", result, err)
	}
	if result, err := run.Attach(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "bound already") ||
		result.Attached != 0 {
		t.Errorf("the same subscriptions again: %+v, %v", result, err)
	}
	run.SpareIMSI = must[kme.IMSI](t)(kme.ParseIMSI("001018000000000"))
	if result, err := run.Attach(t.Context(), ""); err != nil || result.Attached != 3 || len(o.bound) != 6 {
		t.Errorf("again, with other subscriptions: %+v, %v", result, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := run.Attach(ctx, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("of a context that has ended: %v", err)
	}
}

// Each tampered device is rejected, by what a right network finds. A replayed payload is after the device has attached.
func TestTamper(t *testing.T) {
	o := newOperator(newLine(t, 2), "")
	run := o.run(t, Network{Client: o.serve(t)})
	for i, tamper := range tampers {
		run.FirstIMSI = must[kme.IMSI](t)(kme.ParseIMSI(fmt.Sprintf("0010100000000%02d", 10*i)))
		result, err := run.Attach(t.Context(), tamper)
		if err != nil || result.Attached != 0 || result.Rejected[string(kme.KMERejected)] != 2 {
			t.Errorf("%s: %+v, %v", tamper, result, err)
		}
	}
	if err := Tamper("everything").Check(); err == nil || !strings.Contains(err.Error(), "other-lot") {
		t.Errorf("another kind: %v", err)
	}
	run.Devices = run.Devices[:1]
	if _, err := run.Attach(t.Context(), "other-device"); err == nil {
		t.Error("there is no other device")
	}
}

// A network that lets tampered devices in, or rejects untouched ones, is found out.
func TestAttachFails(t *testing.T) {
	l := newLine(t, 1)
	stranger := newLine(t, 1)
	o := newOperator(l, "")
	o.devices = stranger.devices // other keys, of the same IMEI
	run := o.run(t, Network{Client: o.serve(t)})
	if result, err := run.Attach(t.Context(), ""); err == nil || result.Rejected[string(kme.KMERejected)] != 1 {
		t.Errorf("an untouched device was rejected: %+v, %v", result, err)
	}
	run.Devices = stranger.run(t, Network{}).Devices
	// A kind of tampering that changes nothing stands for a network that does not see it.
	if result, err := run.Attach(t.Context(), "nothing"); err == nil || result.Attached != 1 {
		t.Errorf("a tampered device was let in: %+v, %v", result, err)
	}
}

// A device and its HSS believe no network that does not have the KME.
func TestLies(t *testing.T) {
	for lie, want := range map[string]string{
		"nw_sig": "NW_SIG is not", "clear": "came back changed", "rand": "does not decrypt",
		"control": "not pre-processed", "state": "not ACTIVE",
	} {
		o := newOperator(newLine(t, 1), lie)
		result, err := o.run(t, Network{Client: o.serve(t)}).Attach(t.Context(), "")
		if err == nil || !strings.Contains(err.Error(), want) || result.Attached != 0 {
			t.Errorf("%s: %+v, %v", lie, result, err)
		}
	}
}

func TestLoad(t *testing.T) {
	o := newOperator(newLine(t, 2), "")
	run := o.run(t, Network{Client: o.serve(t)})
	result, err := run.Load(t.Context(), time.Second, 10)
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range map[string]Measure{"open": result.Open, "establish": result.Establish,
		"process": result.Process} {
		if m.Calls != 10 || len(m.Rejected) != 0 || m.Seconds <= 0 || m.PerSecond <= 0 || m.P50 <= 0 {
			t.Errorf("%s: %+v", name, m)
		}
	}
	if result, err := run.Load(t.Context(), time.Second, 10); err == nil || result != nil {
		t.Errorf("the same subscriptions again: %+v, %v", result, err)
	}
	run.FirstIMSI = must[kme.IMSI](t)(kme.ParseIMSI("001018000000000"))
	const limit = 200 * time.Millisecond
	if result, err := run.Load(t.Context(), limit, 0); err != nil || result.Establish.Seconds < limit.Seconds() ||
		result.Establish.Calls != result.Process.Calls || result.Establish.Calls >= result.Open.Calls {
		t.Errorf("as many as there can be: %+v, %v", result, err)
	}
	run.FirstIMSI = must[kme.IMSI](t)(kme.ParseIMSI("001019000000000"))
	o.devices = newLine(t, 2).devices
	result, err = run.Load(t.Context(), time.Second, 1)
	if err == nil || result == nil || result.Establish.Rejected[string(kme.KMERejected)] != 1 ||
		result.Process.Calls != 0 {
		t.Errorf("every payload is rejected: %+v, %v", result, err)
	}
	if _, err := json.Marshal(result); err != nil {
		t.Error(err)
	}
}

func TestLoadAttaches(t *testing.T) {
	o := newOperator(newLine(t, 2), "")
	run := o.run(t, Network{Client: o.serve(t)})
	m, err := run.LoadAttaches(t.Context(), time.Second, 10)
	if err != nil || m.Calls != 10 || m.PerSecond <= 0 || m.P50 <= 0 || m.ClientCPU <= 0 {
		t.Errorf("%+v, %v", m, err)
	}
	if n := len(o.bound); n != 10 {
		t.Errorf("%d subscriptions are bound, not 10", n)
	}
	if m, err := run.LoadAttaches(t.Context(), time.Second, 10); err == nil || m != nil {
		t.Errorf("the same subscriptions again: %+v, %v", m, err)
	}
	run.FirstIMSI = must[kme.IMSI](t)(kme.ParseIMSI("001018000000000"))
	const limit = 200 * time.Millisecond
	if m, err := run.LoadAttaches(t.Context(), limit, 0); err != nil || m.Calls == 0 || m.Calls >= loadRound ||
		m.Seconds < limit.Seconds() {
		t.Errorf("as many as there can be: %+v, %v", m, err)
	}
	run.FirstIMSI = must[kme.IMSI](t)(kme.ParseIMSI("001019000000000"))
	o.devices = newLine(t, 2).devices
	if m, err := run.LoadAttaches(t.Context(), time.Second, 1); err == nil || m == nil ||
		m.Rejected[string(kme.KMERejected)] != 1 {
		t.Errorf("every payload is rejected: %+v, %v", m, err)
	}
}

// A measurement of wrong answers is none.
func TestLoadLies(t *testing.T) {
	for lie, want := range map[string]string{"nw_sig": "NW_SIG is not", "rand": "does not decrypt"} {
		o := newOperator(newLine(t, 1), lie)
		result, err := o.run(t, Network{Client: o.serve(t)}).Load(t.Context(), time.Second, 1)
		if err == nil || !strings.Contains(err.Error(), want) || result != nil {
			t.Errorf("%s: %+v, %v", lie, result, err)
		}
	}
}

func TestEach(t *testing.T) {
	var sum atomic.Int64
	if err := each(t.Context(), 4, 100, func(i int) error {
		sum.Add(int64(i))
		return nil
	}); err != nil || sum.Load() != 4950 {
		t.Errorf("%d, %v", sum.Load(), err)
	}
	failure := errors.New("five")
	err := each(t.Context(), 4, math.MaxInt, func(i int) error { // which ends, since a failure stops all
		if i == 5 {
			return failure
		}
		return nil
	})
	if !errors.Is(err, failure) {
		t.Error(err)
	}
}

func TestPercentiles(t *testing.T) {
	var times []time.Duration
	for i := range 200 {
		times = append(times, time.Duration(200-i)*time.Millisecond)
	}
	if p50, p99 := percentiles(times); p50 != 101 || p99 != 199 || !slices.IsSorted(times) {
		t.Errorf("%v, %v", p50, p99)
	}
	if p50, p99 := percentiles(nil); p50 != 0 || p99 != 0 {
		t.Errorf("of none: %v, %v", p50, p99)
	}
}

func TestIMSIPlus(t *testing.T) {
	first := must[kme.IMSI](t)(kme.ParseIMSI("001010000000009"))
	if got := must[kme.IMSI](t)(imsiPlus(first, 2)); got.String() != "001010000000011" {
		t.Error(got)
	}
	if got, err := imsiPlus(must[kme.IMSI](t)(kme.ParseIMSI("999999")), 1); err == nil {
		t.Errorf("one more digit: %s", got)
	}
}

func TestFirstIMSI(t *testing.T) {
	for _, c := range []struct {
		given  string
		lowest bool
		want   string
	}{{"262011234567890", true, "262011234567890"}, {"262011234567890", false, "262011234567890"},
		{"", true, "001010000000000"}, {"x", false, ""}} {
		imsi, err := FirstIMSI(c.given, c.lowest)
		if err != nil && c.want != "" || err == nil && imsi.String() != c.want {
			t.Errorf("%+v: %s, %v", c, imsi, err)
		}
	}
	one, err := FirstIMSI("", false)
	other, err2 := FirstIMSI("", false)
	if err != nil || err2 != nil || one == other || !strings.HasPrefix(one.String(), "00101") {
		t.Errorf("%s, %v, and then %s, %v", one, err, other, err2)
	}
}
