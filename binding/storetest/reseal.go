package storetest

import (
	"bytes"
	"testing"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/tokenkeys"
	"github.com/kmehsm/kmehsm/internal/must"
)

func reseal(t *testing.T, s Store) {
	sealed := func(generation, n byte) []byte { return append([]byte{generation}, bytes.Repeat([]byte{n}, 40)...) }
	below := []byte{2}
	const many = 5
	for i := range many {
		imsi := subscription(t, i)
		b := newBinding(imsi, device(t, i), openAttempt(t, s, imsi, t0))
		b.Sealed = sealed(1, byte(i))
		if i == 3 {
			b.Sealed = sealed(2, byte(i)) // already
		}
		must.Do(t, s.Establish(t.Context(), b, []byte{byte(i)}, true, t0))
	}
	// One IMSI has an active and a pending binding, of one only the past is left.
	one := subscription(t, 0)
	activate(t, s, one, t0)
	must.Do(t, s.OpenAttempt(t.Context(), binding.Attempt{ID: "b", IMSI: one, Expires: t0.Add(ttl), Opened: true}))
	second := newBinding(one, device(t, 9), "b")
	second.Sealed = sealed(1, 9)
	must.Do(t, s.Establish(t.Context(), second, []byte{9}, true, t0))
	must.Get[*binding.Binding](t)(s.Revoke(t.Context(), subscription(t, 2), t0))
	check := func(want ...byte) {
		t.Helper()
		if n, err := s.CountSealed(t.Context(), below); err != nil || n != len(want) {
			t.Errorf("%d KMEs, error %v; want %d", n, err, len(want))
		}
		var got []byte
		for after := (tokenkeys.Sealed{}); ; {
			page, err := s.Sealed(t.Context(), after, below, 2)
			if err != nil || len(page) > 2 {
				t.Fatalf("%d KMEs, error %v", len(page), err)
			}
			if len(page) == 0 {
				break
			}
			for _, b := range page {
				after = b
				if b.KME[0] != 1 || len(b.KME) != 41 {
					t.Errorf("a KME %x", b.KME)
				}
				got = append(got, b.KME[1])
			}
		}
		if !bytes.Equal(got, want) {
			t.Errorf("KMEs %v, want %v", got, want)
		}
	}
	check(0, 9, 1, 4) // ACTIVE is before PENDING
	all := must.Get[[]tokenkeys.Sealed](t)(s.Sealed(t.Context(), tokenkeys.Sealed{}, below, 10))
	var again []tokenkeys.Resealed
	for _, b := range all {
		again = append(again, tokenkeys.Resealed{Sealed: b, Again: sealed(2, b.KME[1])})
	}
	// Meanwhile the pending one becomes the active one, and another is ended.
	must.Get[*binding.Binding](t)(s.Revoke(t.Context(), subscription(t, 4), t0))
	activate(t, s, one, t0)
	if n, err := s.Reseal(t.Context(), again); err != nil || n != 2 {
		t.Errorf("%d were sealed again, error %v; want 2", n, err)
	}
	if b := subscriptionOf(t, s, one, t0).Active; !bytes.Equal(b.Sealed, sealed(2, 9)) || b.IMEI != device(t, 9) {
		t.Errorf("the active binding is %+v", b)
	}
	if b := subscriptionOf(t, s, subscription(t, 4), t0).Revoked; len(b.Sealed) != 0 {
		t.Errorf("a revoked binding has a KME again: %+v", b)
	}
	if n, err := s.Reseal(t.Context(), again); err != nil || n != 0 {
		t.Errorf("again, %d were sealed, error %v", n, err)
	}
	check()
}
