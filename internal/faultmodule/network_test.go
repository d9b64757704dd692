package faultmodule_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"github.com/tink-crypto/tink-go/v2/kwp/subtle"

	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// granted is an operator's token with a lot of 2048 bits, closed, and some payloads to it.
func granted(t testing.TB, payloads int) (tok softhsmtest.Tok, all []hsmkeys.Payload) {
	t.Helper()
	tok = softhsmtest.Operator(t)
	ctx := t.Context()
	token := must[*hsmkeys.OperatorToken](t)(hsmkeys.OpenOperator(ctx, faulty.URI(tok.URI), hsmkeys.Options{}))
	defer token.Close()
	must[bool](t)(token.Dedicate(ctx, hsmkeys.Dedication{Side: hsmkeys.Operator}))
	must[bool](t)(token.EnsureStorageKey(ctx))
	must[bool](t)(token.EnsureLedgerKey(ctx))
	kek := hsmkeys.Key{Role: hsmkeys.RoleKEK, Manufacturer: "m", Name: "op"}
	lot := hsmkeys.Key{Role: hsmkeys.RoleLot, Manufacturer: "m", Name: "L1"}
	transport := must[*rsa.PublicKey](t)(token.NewTransportKey(ctx))
	value := kme.RandomSecret().Bytes()
	if err := token.UnwrapKEK(ctx, kek, transport,
		must[[]byte](t)(rsa.EncryptOAEP(sha1.New(), rand.Reader, transport, value, nil))); err != nil {
		t.Fatal(err)
	}
	key := must[*rsa.PrivateKey](t)(testkeys.RSA(2048))
	must[bool](t)(token.UnwrapLotKey(ctx, lot, kek, must[[]byte](t)(must[*subtle.KWP](t)(subtle.NewKWP(value)).
		Wrap(must[[]byte](t)(x509.MarshalPKCS8PrivateKey(key)))), &key.PublicKey))
	device := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	for range payloads {
		p := kme.Plaintext{KME: kme.RandomSecret(), RME: kme.RandomSecret()}
		p.Sig = must[[]byte](t)(kme.SuiteECDSA.Sign(device, p.KME.Bytes()))
		all = append(all, hsmkeys.Payload{Suite: kme.SuiteECDSA, Lot: lot, N: &key.PublicKey, Device: &device.PublicKey,
			Bytes: must[[]byte](t)(kme.SuiteECDSA.Encrypt(&key.PublicKey, &p))})
	}
	return tok, all
}

// dropping are the calls that destroy what operations have left in sessions, once for many.
var dropping = []string{"C_DestroyObject", "C_CloseSession", "C_OpenSession", "C_GenerateRandom"}

// A payload is 9 calls, of which 5 come one after the other where the token is far, and all where it is near or
// sessions are scarce. RANDs are 3, however many.
func TestCallsAndDepth(t *testing.T) {
	tok, payloads := granted(t, 1)
	bad := payloads[0]
	bad.Bytes = slices.Clone(bad.Bytes)
	bad.Bytes[100] ^= 1
	for _, c := range []struct {
		name, tell string
		sessions   int
		depth      uint64
	}{
		{"near", "", 0, 9},
		{"far", "* delay 30000", 8, 5},
		{"far, with one session", "* delay 30000", 1, 9},
	} {
		t.Run(c.name, func(t *testing.T) {
			faulty.Tell(t, c.tell)
			defer faulty.Tell(t)
			token := openOperator(t, tok.URI, hsmkeys.Options{Sessions: c.sessions})
			open := func(p hsmkeys.Payload, fault hsmkeys.Fault) func() error {
				return func() error {
					o, err := token.OpenPayload(t.Context(), p)
					if err == nil && o.Fault != fault {
						t.Errorf("fault %q", o.Fault)
					}
					return err
				}
			}
			sealed := must[*hsmkeys.Opened](t)(token.OpenPayload(t.Context(), payloads[0])).Sealed
			rands := func(n int) func() error {
				return func() error {
					_, err := token.EncryptRANDs(t.Context(), sealed, make([]hsmkeys.RAND, n))
					return err
				}
			}
			for _, op := range []struct {
				name  string
				do    func() error
				calls int
				depth uint64
			}{
				{"a good payload", open(payloads[0], hsmkeys.FaultNone), 9, c.depth},
				{"a bad payload", open(bad, hsmkeys.FaultLayout), 9, c.depth},
				{"1 RAND", rands(1), 3, 3},
				{"32 RANDs", rands(32), 3, 3},
			} {
				least := ^uint64(0) // a busy machine may begin late what could be beside another
				for range 30 {
					calls, depth, err := faulty.Of(op.do)
					if err != nil {
						t.Fatal(err)
					}
					if calls["C_FindObjectsInit"] > 0 { // hsmkeys.LookAgain: once in five seconds
						continue
					}
					n := 0
					for f, times := range calls {
						if !slices.Contains(dropping, f) {
							n += int(times)
						}
					}
					if n != op.calls {
						t.Errorf("%s: calls %v", op.name, calls)
					}
					if least = min(least, depth); least <= op.depth {
						break
					}
				}
				if least != op.depth { // fewer would be calls that this test does not see
					t.Errorf("%s: %d calls deep, want %d", op.name, least, op.depth)
				}
			}
		})
	}
	// All calls of many payloads, with those that destroy what they leave: fewer than one more.
	token := openOperator(t, tok.URI, hsmkeys.Options{})
	const many = 320
	var all sync.WaitGroup
	before, start := total(faulty.Counts()), time.Now()
	for range 4 {
		all.Go(func() {
			for range many / 4 {
				if _, err := token.OpenPayload(t.Context(), payloads[0]); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	calls := float64(total(faulty.Counts())-before) / many
	t.Logf("%.3f calls a payload in all", calls)
	// A slow machine makes calls, too, since LeftFor is over: no more than five for each session.
	if calls >= 10+float64(time.Since(start)/p11.LeftFor)*5*float64(token.Sessions())/many {
		t.Errorf("%.3f calls a payload in all", calls)
	}
}

func total(counts map[string]uint64) (n uint64) {
	for _, c := range counts {
		n += c
	}
	return n
}

// A loaded token is how many establishments a second a network HSM did, and how much of what it could.
type loaded struct {
	perSecond float64
	share     float64 // of the calls that it could take
	median    time.Duration
	calls     float64 // of an establishment
}

// load opens payloads, so many at a time; with a pause, each at its time, however many are under way.
func load(t testing.TB, token *hsmkeys.OperatorToken, payloads []hsmkeys.Payload, callsPerSecond, workers, n int,
	pause time.Duration) loaded {
	t.Helper()
	took := make([]time.Duration, n)
	var next atomic.Int64
	before, start := total(faulty.Counts()), time.Now()
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				begin := time.Now()
				if pause > 0 {
					begin = start.Add(time.Duration(i) * pause)
					time.Sleep(time.Until(begin))
				}
				if o, err := token.OpenPayload(t.Context(), payloads[i%len(payloads)]); err != nil || o.Fault != "" {
					t.Error(o, err)
					return
				}
				took[i] = time.Since(begin)
			}
		})
	}
	all.Wait()
	elapsed, calls := time.Since(start), total(faulty.Counts())-before
	slices.Sort(took)
	return loaded{float64(n) / elapsed.Seconds(), float64(calls) / elapsed.Seconds() / float64(callsPerSecond),
		took[n/2], float64(calls) / float64(n)}
}

// network has every later call be one of a network HSM.
func network(t testing.TB, latency time.Duration, calls, decryptions int) {
	t.Helper()
	faulty.Tell(t, fmt.Sprintf("network %d %d %d", latency.Microseconds(), calls, decryptions), "replay")
	t.Cleanup(func() { faulty.Tell(t) })
}

// A network HSM with limits of its own, all of which a machine that is eight times slower than ours keeps busy too: the
// service reaches them, and its median at half load is near the latency of what must come one after the other.
func TestNetworkHSM(t *testing.T) {
	const latency, callsPerSecond = 40 * time.Millisecond, 180
	tok, payloads := granted(t, 8)
	network(t, latency, callsPerSecond, 100)
	for _, sessions := range []int{64, 256} {
		t.Run(fmt.Sprint(sessions, " sessions"), func(t *testing.T) {
			token := openOperator(t, tok.URI, hsmkeys.Options{Sessions: sessions})
			// It opens sessions, finds keys, and computes what is replayed.
			load(t, token, payloads, callsPerSecond, 8, 24, 0)
			before := faulty.Figures()
			full := load(t, token, payloads, callsPerSecond, 32, 100, 0)
			if n := faulty.Figures().Replayed - before.Replayed; n != 100 {
				t.Errorf("%d of 100 decryptions were replayed", n)
			}
			for try := 1; full.share < 0.9 && try < 5; try++ { // other work may have come between
				full = load(t, token, payloads, callsPerSecond, 32, 100, 0)
			}
			if full.share < 0.9 {
				t.Errorf("it reaches %.2f of what the HSM can do", full.share)
			}
			const deep = 5 * latency
			atHalf := func() loaded {
				return load(t, token, payloads, callsPerSecond, 32, 40, time.Second*2*9/callsPerSecond)
			}
			half, alone := atHalf(), time.Duration(deep)
			for try := 1; half.median > alone*3/2 && try < 5; try++ {
				half = atHalf()
				// What one takes by itself on a machine that has other work, too.
				alone = max(alone, load(t, token, payloads, callsPerSecond, 1, 10, 0).median)
			}
			t.Logf("full: %+v; half: %+v; one by itself takes %s", full, half, alone)
			if half.median > alone*3/2 {
				t.Errorf("a median of %s at half load, and one by itself takes %s", half.median, alone)
			}
		})
	}
}

// The network HSM of docs/performance.md: calls of 1 ms, 5,000 of them a second and 1,000 RSA decryptions.
func BenchmarkNetworkHSM(b *testing.B) {
	const latency, callsPerSecond = time.Millisecond, 5000
	tok, payloads := granted(b, 64)
	network(b, latency, callsPerSecond, 1000)
	for _, sessions := range []int{64, 256} {
		token := must[*hsmkeys.OperatorToken](b)(hsmkeys.OpenOperator(b.Context(), faulty.URI(tok.URI),
			hsmkeys.Options{Sessions: sessions}))
		softhsmtest.AsServed(b, sessions)
		load(b, token, payloads, callsPerSecond, sessions, 4*len(payloads), 0)
		for name, pause := range map[string]time.Duration{"full": 0, "half": time.Second * 2 * 9 / callsPerSecond} {
			b.Run(fmt.Sprintf("%d sessions, %s load", sessions, name), func(b *testing.B) {
				got := load(b, token, payloads, callsPerSecond, 64, b.N, pause)
				b.ReportMetric(got.perSecond, "payloads/s")
				b.ReportMetric(got.share, "of-the-HSM")
				b.ReportMetric(got.calls, "calls/payload")
				b.ReportMetric(float64(got.median)/float64(5*latency), "p50/depth")
			})
		}
		if err := token.Close(); err != nil {
			b.Error(err)
		}
	}
}

// A token that allows few sessions, and has room for few objects, is never asked for more: whoever finds none free
// waits, until his deadline.
func TestLimits(t *testing.T) {
	tok, payloads := granted(t, 4)
	for _, limits := range []struct{ sessions, objects int }{{4, 64}, {6, 2}, {16, 7}, {200, 200}} {
		t.Run(fmt.Sprintf("%+v", limits), func(t *testing.T) {
			defer faulty.Tell(t)
			faulty.Tell(t, fmt.Sprintf("limits %d %d", limits.sessions, limits.objects*1024), "* delay 1000")
			before := faulty.Figures()
			token := openOperator(t, tok.URI, hsmkeys.Options{})
			var all sync.WaitGroup
			for range 32 {
				all.Go(func() {
					for i := range 8 {
						o, err := token.OpenPayload(t.Context(), payloads[i%4])
						if err != nil {
							t.Error(err)
							return
						}
						if _, err := token.EncryptRANDs(t.Context(), o.Sealed, make([]hsmkeys.RAND, 2)); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			all.Wait()
			after := faulty.Figures()
			t.Logf("%d sessions of the pool", token.Sessions())
			if n := after.Refused - before.Refused; n > 0 {
				t.Errorf("the token refused %d times", n)
			}
			// All sessions taken: the next waits, as long as it may.
			faulty.Tell(t, fmt.Sprintf("limits %d %d", limits.sessions, limits.objects*1024), "C_Sign hang")
			signed := faulty.Counts()["C_Sign"]
			var held sync.WaitGroup
			for range token.Sessions() {
				held.Go(func() { token.Ping(context.Background()) })
			}
			testproc.Await(t, "all sessions are taken", func() bool {
				return faulty.Counts()["C_Sign"] >= signed+uint64(token.Sessions())
			})
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			if _, err := token.Has(ctx, payloads[0].Lot); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("without a free session: %v", err)
			}
			faulty.Tell(t)
			held.Wait()
			if n := faulty.Figures().Refused - before.Refused; n > 0 {
				t.Errorf("the token refused %d times", n)
			}
		})
	}
	for _, c := range []struct{ limits, says string }{
		{"limits 3 65536", "allows an application 3 sessions, and ours needs 4"},
		{"limits 64 1500", "has room for 1500 bytes of public objects, and an operation needs 2048"},
	} {
		faulty.Tell(t, c.limits)
		before := faulty.Figures()
		_, err := hsmkeys.OpenOperator(t.Context(), faulty.URI(tok.URI), hsmkeys.Options{})
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.limits, err)
		}
		if n := faulty.Figures().Refused - before.Refused; n > 0 {
			t.Errorf("%s: the token refused %d times", c.limits, n)
		}
		faulty.Tell(t)
	}
}

// A session that is never idle for long does not keep what operations left in it, even if that is little.
func TestLeftInABusySession(t *testing.T) {
	tok, payloads := granted(t, 1)
	faulty.Tell(t, "* delay 500") // far: more is left than below
	defer faulty.Tell(t)
	token := openOperator(t, tok.URI, hsmkeys.Options{Sessions: 1})
	sealed := must[*hsmkeys.Opened](t)(token.OpenPayload(t.Context(), payloads[0])).Sealed
	encrypt := func() { must[[]hsmkeys.RAND](t)(token.EncryptRANDs(t.Context(), sealed, make([]hsmkeys.RAND, 1))) }
	before := total(faulty.Counts())
	const n = 45 // in three times LeftFor; fewer than are dropped for their number
	for range n {
		encrypt()
		time.Sleep(p11.LeftFor / 15)
	}
	if got := total(faulty.Counts()) - before; got <= 3*n {
		t.Errorf("%d calls of %d operations: nothing was dropped", got, n)
	}
}

// Whatever ends a session or the login while objects are left in it: nothing of them stays, and no session.
func TestNothingIsLeftByAnOutage(t *testing.T) {
	tok, payloads := granted(t, 1)
	for name, tell := range map[string][]string{
		"a lost session": {"C_WrapKey 0xb3"}, "a logout": {"C_SignInit 0x101"}, "a token pulled out": {"* removed"},
		"C_Finalize": {"* 0x190"}, "a hang in one step": {"C_Verify hang"}, "a hang in all": {"* hang"},
		"a hang where objects are dropped": {"C_CloseSession hang", "C_DestroyObject hang"},
		"a refusal to drop":                {"C_CloseSession 0x30", "C_DestroyObject 0x30"},
	} {
		t.Run(name, func(t *testing.T) {
			faulty.Tell(t, "* delay 500") // far: each payload has three sessions
			defer faulty.Tell(t)
			token := openOperator(t, tok.URI, hsmkeys.Options{Sessions: 12, HangTimeout: time.Second})
			work := func() {
				var all sync.WaitGroup
				for range 16 {
					all.Go(func() {
						for range 20 {
							token.OpenPayload(t.Context(), payloads[0])
						}
					})
				}
				all.Wait()
			}
			work()
			faulty.Tell(t, tell...)
			work()
			time.Sleep(2 * p11.LeftFor)
			faulty.Tell(t)
			testproc.Await(t, "the token's return", func() bool {
				return token.Ping(t.Context()) == nil && token.Health().Hung == 0
			})
			work()
			testproc.Await(t, "what was left goes", func() bool {
				now := faulty.Figures()
				return now.Objects == 0 && now.Sessions <= 12+8 // the login's and crypto11's
			})
		})
	}
}

// A token that has less room than it said: what is left in idle sessions goes, and less is left from then on.
func TestFullToken(t *testing.T) {
	tok, payloads := granted(t, 4)
	token := openOperator(t, tok.URI, hsmkeys.Options{})
	defer faulty.Tell(t)
	for i := range 4 * token.Sessions() {
		must[*hsmkeys.Opened](t)(token.OpenPayload(t.Context(), payloads[i%4]))
	}
	faulty.Tell(t, "limits 100 4096")
	for i := range 40 {
		o, err := token.OpenPayload(t.Context(), payloads[i%4])
		if err != nil || o.Fault != hsmkeys.FaultNone {
			t.Fatal(i, o, err)
		}
	}
	if h := token.Health(); h.Cause != nil || h.Reinitialised != 0 {
		t.Errorf("%+v", h)
	}
	faulty.Tell(t, "limits 100 0")
	testproc.Await(t, "what was left goes", func() bool {
		_, err := token.OpenPayload(t.Context(), payloads[0])
		return ck.IsCKR(err, pkcs11.CKR_DEVICE_MEMORY)
	})
}
