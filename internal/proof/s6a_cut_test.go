package proof

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// twice does what an attach consists of, and if that fails, once more after a call's time: a device waits for 10 s
// (T3411, TS 24.301 table 10.2.1).
func (s *site) twice(what string, f func() error) error {
	err := f()
	if err == nil {
		return nil
	}
	s.mu.Lock()
	s.again[fmt.Sprintf("%s: %v", what, err)]++
	s.mu.Unlock()
	time.Sleep(s.timeout)
	if again := f(); again != nil {
		return fmt.Errorf("%s: %w, and once more: %w", what, err, again)
	}
	return nil
}

// byClient attaches a subscriber that nobody has had by the Go client.
func (s *site) byClient(d device) error {
	ctx, c := s.t.Context(), s.client
	imsi, err := kme.ParseIMSI(fmt.Sprintf("00103%010d", s.imsis.Add(1)))
	imei, ierr := kme.ParseIMEI(d.imei)
	if err := errors.Join(err, ierr); err != nil {
		return err
	}
	var v client.Vectors
	var sent client.RAND
	prepare := func() (err error) {
		rand.Read(sent[:])
		v, err = c.PrepareVector(ctx, imsi, client.Origin{}, sent)
		return err
	}
	if err := s.twice("PrepareVector", prepare); err != nil {
		return err
	}
	if v.AttemptID == "" {
		return fmt.Errorf("IMSI %s is bound, and has not attached", imsi)
	}
	plain := s.plaintext(d)
	payload, id := s.encrypt(d, plain), v.AttemptID
	if err := s.twice("EstablishKME", func() error {
		e, err := c.EstablishKME(ctx, imsi, client.Origin{}, imei, id, payload)
		if err == nil && e.NWSig != plain.NWSig() {
			err = fmt.Errorf("NW_SIG is %x", e.NWSig)
		}
		return err
	}); err != nil {
		return err
	}
	if err := s.twice("PrepareVector", prepare); err != nil {
		return err
	}
	if p := (&phone{d: s.network, imsi: imsi.String(), kme: &plain.KME}); v.AttemptID != "" ||
		p.decrypt(v.RANDs[0][:]) != sent {
		return fmt.Errorf("IMSI %s: the vector is not under its KME: %+v", imsi, v)
	}
	if err := s.twice("ReportAuthentication", func() error {
		r, err := c.ReportAuthentication(ctx, imsi, client.Origin{}, true)
		if err == nil && (r.State != kmev1.State_ACTIVE || !r.Served) {
			err = fmt.Errorf("%+v", r)
		}
		return err
	}); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bound[imsi.String()] = &plain.KME
	return nil
}

// byHSS attaches a phone by S6a: one that has a KME as one that comes back.
func (s *site) byHSS(p *phone) error {
	var a aia
	air := func() error {
		if a = s.mme.air(p.imsi, 1, options{}); a.lost != "" || a.result != 2001 {
			return fmt.Errorf("%d %s", a.result, a.lost)
		}
		return nil
	}
	ulr := func(payload []byte, attempt string, nwSig []byte) func() error {
		return func() error {
			u := s.mme.ulr(p.imsi, p.imei, payload, attempt, options{})
			if u.lost != "" || u.result != 2001 || !bytes.Equal(u.nwSig, nwSig) {
				return fmt.Errorf("%d, status %q, NW-Sig %x %s", u.result, u.status, u.nwSig, u.lost)
			}
			return nil
		}
	}
	if err := s.twice("AIR", air); err != nil {
		return err
	}
	if p.kme == nil {
		if a.control != clearOnly {
			return fmt.Errorf("IMSI %s is bound, and has not attached", p.imsi)
		}
		plain, payload := p.payload()
		want := plain.NWSig()
		if err := s.twice("ULR with a payload", ulr(payload, a.attempt, want[:])); err != nil {
			return err
		}
		p.kme = &plain.KME
		if err := s.twice("AIR", air); err != nil {
			return err
		}
	}
	if a.control != preprocessed || len(a.eutran) != 1 {
		return fmt.Errorf("IMSI %s: %d vectors, Binding-Control %d", p.imsi, len(a.eutran), a.control)
	}
	if err := p.accepts(a.eutran[0], false); err != nil {
		return fmt.Errorf("IMSI %s: %w", p.imsi, err)
	}
	if err := s.twice("ULR", ulr(nil, "", nil)); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bound[p.imsi] = p.kme
	return nil
}

// work attaches again and again, with a pause that leaves the machine to others, until the test ends it.
func (s *site) work(worker int, stop <-chan struct{}, attach func() error) {
	for {
		began := time.Now()
		s.mu.Lock()
		s.underWay[worker] = began
		s.mu.Unlock()
		err := attach()
		s.mu.Lock()
		delete(s.underWay, worker)
		if err == nil {
			s.attached = append(s.attached, attached{began, time.Since(began)})
		}
		s.mu.Unlock()
		if err != nil {
			s.t.Errorf("an attach failed that was tried once more: %v", err)
		}
		select {
		case <-stop:
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// A fault is what happens to a part, or to the network between two.
type fault struct {
	what  string
	felt  bool          // an attach has to wait for it
	alone bool          // there is no second part, to which an attach goes after half of a call's time
	inTx  bool          // it may come within an instance's change, for which the other one waits a second at most
	lasts time.Duration // where it is not the usual time
}

// during has a fault last for some time, and says what the attaches that began meanwhile took. It returns when both
// instances get calls again, by either client.
func (s *site) during(f fault, begin func() (mend func())) {
	s.t.Helper()
	s.mu.Lock()
	s.attached, s.again = nil, map[string]int{}
	s.mu.Unlock()
	f.lasts = cmp.Or(f.lasts, s.timeout*3/4)
	mend := begin()
	time.Sleep(f.lasts)
	mend()
	mended := time.Now()
	var before [2]int
	established := func(i int) int { return strings.Count(s.instances[i].Log.String(), `"imsi":"00103`) }
	for i := range s.instances {
		testproc.Await(s.t, f.what+": "+instanceName(i)+" is ready", func() bool { return s.isReady(i) })
		before[i] = established(i)
	}
	for i := range s.instances {
		testproc.Await(s.t, f.what+": "+instanceName(i)+" gets calls again", func() bool {
			return established(i) > before[i]
		})
	}
	s.hssHasBoth(f.what)
	testproc.Await(s.t, f.what+": attaches end", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return !slices.ContainsFunc(slices.Collect(maps.Values(s.underWay)), mended.After)
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	var times []time.Duration
	for _, a := range s.attached {
		if a.began.Before(mended) {
			times = append(times, a.took)
		}
	}
	if len(times) == 0 {
		s.t.Fatalf("%s: nobody has attached", f.what)
	}
	slices.Sort(times)
	at := func(percent int) time.Duration { return times[(len(times)-1)*percent/100].Round(time.Millisecond) }
	s.t.Logf("%-40s %3d attaches, p50 %5v, p99 %5v; both instances are back after %v; once more: %v", f.what,
		len(times), at(50), at(99), time.Since(mended).Round(time.Millisecond), s.again)
	if slowest := times[len(times)-1]; f.felt && slowest < min(f.lasts/3, time.Second) {
		s.t.Errorf("%s: nobody has felt it: the slowest attach took %v", f.what, slowest)
	}
	if s.quiet == 0 { // the first one is none
		s.quiet = at(99)
	}
	most := s.timeout*3/4 + 5*s.quiet // less than for one who waits for the whole call
	if f.inTx {
		most += time.Second
	}
	if f.alone { // TCP tries again after as long as the network was cut, at the latest
		most += 2 * f.lasts
	}
	if at(99) > most {
		s.t.Errorf("%s: p99 is %v, more than %v; without a fault it is %v", f.what, at(99), most, s.quiet)
	}
}

// hssHasBoth waits until kme.fdx gives calls to both instances.
func (s *site) hssHasBoth(what string) {
	s.t.Helper()
	testproc.Await(s.t, what+": kme.fdx has both instances again", func() bool {
		log := s.hss.Log.String()
		return strings.Count(log, "it gets no calls") == strings.Count(log, "is ready again")
	})
}

// Two instances, two tokens, PostgreSQL with its standby, and Vault: instances and tokens are killed, hang and are cut
// off in turn under load, and the network between each two parts loses everything without a word. No attach fails that
// is tried once more, by the Go client or by kme.fdx, and no binding is lost.
func TestS6aPostgresVaultCutOff(t *testing.T) {
	t.Parallel()
	if !inOwnNetwork(t) {
		return
	}
	s := newSite(t)
	t.Logf("a call has %v", s.timeout)
	stop := make(chan struct{})
	var all sync.WaitGroup
	devices := s.devices()
	for worker := range 3 {
		p := make(chan *phone, 10)
		for range cap(p) {
			p <- s.phone()
		}
		all.Go(func() {
			s.work(2*worker, stop, func() error {
				d := devices[worker]
				select {
				case d = <-s.unread:
				default:
				}
				return s.byClient(d)
			})
		})
		all.Go(func() {
			s.work(2*worker+1, stop, func() error {
				next := <-p
				defer func() { p <- next }()
				return s.byHSS(next)
			})
		})
	}
	end := sync.OnceFunc(func() { close(stop); all.Wait() })
	t.Cleanup(end)

	s.during(fault{what: "nothing"}, func() func() { return func() {} })
	cut := func(f fault, one, other string) {
		f.what = "network, " + f.what
		s.during(f, func() func() { return s.lan.cut(one, other) })
	}
	cut(fault{what: "MME - HSS", felt: true, alone: true}, address(0), address(hssHost))
	// Nothing is confirmed until TCP tries again, at the latest after as long as the cut has lasted: at most a second
	// try's time, and less than a transaction has.
	cut(fault{what: "primary - standby", felt: true, alone: true, lasts: min(s.timeout*3/4, 1500*time.Millisecond)},
		database, address(hssHost))
	long := 2 * s.timeout  // long enough to be asked in vain twice
	unread := devices[40:] // of shards that nobody has read
	for i := range s.instances {
		_, name, _ := strings.Cut(instanceName(i), " ")
		s.during(fault{what: instanceName(i) + " killed"}, func() func() {
			s.instances[i].Kill()
			return func() { s.startInstance(i) }
		})
		s.during(fault{what: instanceName(i) + " ended in order"}, func() func() {
			s.stop(s.instances[i])
			return func() { s.startInstance(i) }
		})
		s.mu.Lock()
		if len(s.again) > 0 {
			t.Errorf("%s ended in order, and calls failed: %v", instanceName(i), s.again)
		}
		s.mu.Unlock()
		s.during(fault{what: instanceName(i) + " hangs", felt: true, inTx: true}, func() func() {
			suspend(t, s.instances[i])
			return func() { s.instances[i].Cmd.Process.Signal(syscall.SIGCONT) }
		})
		// "hang" is what a module does whose network to its HSM is cut.
		for how, line := range map[string]string{"removed": "* removed", "hangs": "* hang",
			"answers errors": "* 0x30"} {
			logins := s.modules[i].Counts()["C_Login"] // also of one that is tried while calls hang: see p11's recovery
			s.during(fault{what: "token of " + name + " " + how}, func() func() {
				s.modules[i].Tell(t, line)
				return func() { s.modules[i].Tell(t) }
			})
			decrypts := s.modules[i].Counts()["C_Decrypt"]
			testproc.Await(t, "the token of "+name+" decrypts again after it "+how, func() bool {
				now := s.modules[i].Counts()
				return now["C_Login"] > logins && now["C_Decrypt"] > decrypts
			})
		}
		cut(fault{what: "Go client - " + name, felt: true, lasts: long}, address(0), address(i+1))
		cut(fault{what: "HSS - " + name, felt: true, lasts: long}, address(hssHost), address(i+1))
		cut(fault{what: name + " - primary", felt: true, inTx: true}, database, address(i+1))
		cut(fault{what: name + " - standby"}, standby, address(i+1))
		s.during(fault{what: "network, " + name + " - Vault", felt: true}, func() func() {
			mend := s.lan.cut(vault, address(i+1))
			for range cap(s.unread) { // from now on: all could be read before the cut
				s.unread <- unread[0]
				unread = unread[shardSize:]
			}
			return mend
		})
	}
	end()
	s.allTokensAway()
	s.nothingIsLost()
}

// allTokensAway has both tokens of both instances hang, as the modules of an HSM do whose network is cut, and work
// again. Meanwhile what needs them is refused at once, and for what it is. Nobody restarts anything.
func (s *site) allTokensAway() {
	s.t.Helper()
	for i := range s.instances { // both by the module that can hang
		s.tokens[i][1] = strings.Replace(s.tokens[i][1], s.path("library.so"), s.modules[i].Path, 1)
	}
	s.serve(s.timeout)
	s.hssHasBoth("anew")
	p := s.phone()
	must.Do(s.t, s.byHSS(p))
	imsi := must.Get[kme.IMSI](s.t)(kme.ParseIMSI(p.imsi))
	for _, m := range s.modules {
		m.Tell(s.t, "* hang")
	}
	for i := range s.instances {
		alone := must.Get[*client.Client](s.t)(client.New(client.Options{URLs: []string{instanceURL(i)}, TLS: s.tls,
			Timeout: testproc.Patience, Tries: 1}))
		defer alone.Close()
		prepare := func(imsi kme.IMSI) (time.Duration, error) {
			began := time.Now()
			_, err := alone.PrepareVector(s.t.Context(), imsi, client.Origin{Name: must.Get[kme.Origin](s.t)(
				kme.ParseOrigin(identity("mme")))}, client.RAND{})
			return time.Since(began), err
		}
		testproc.Await(s.t, instanceName(i)+" is not ready", func() bool { return !s.isReady(i) })
		var refused, without []time.Duration
		for range 21 {
			took, err := prepare(imsi)
			if !errors.Is(err, client.Reason(kme.HSMUnavailable)) {
				s.t.Errorf("%s without a token: %v", instanceName(i), err)
			}
			refused = append(refused, took)
			took, err = prepare(must.Get[kme.IMSI](s.t)(kme.ParseIMSI(fmt.Sprintf("00104%010d", s.imsis.Add(1)))))
			if err != nil {
				s.t.Errorf("%s without a token, of a subscriber who is not bound: %v", instanceName(i), err)
			}
			without = append(without, took)
		}
		slices.Sort(refused)
		slices.Sort(without)
		s.t.Logf("%s without a token: a refusal takes %v, a call that needs none %v", instanceName(i), refused[10],
			without[10])
		if refused[10] > 5*without[10] {
			s.t.Errorf("%s without a token does not refuse at once", instanceName(i))
		}
		// When it was first asked, it may not have known that yet: a call to the token has hsm_timeout.
		testproc.Await(s.t, "the log of "+instanceName(i)+" says why it is not ready", func() bool {
			return !s.isReady(i) && strings.Contains(s.instances[i].Log.String(),
				`"not ready","cause":"the token is not available`)
		})
	}
	if a := s.mme.air(p.imsi, 1, options{}); a.lost != "" || a.result != 4181 {
		s.t.Errorf("by kme.fdx, without a token: %d %s", a.result, a.lost)
	}
	mended := time.Now()
	for _, m := range s.modules {
		m.Tell(s.t)
	}
	for i := range s.instances {
		testproc.Await(s.t, instanceName(i)+" is ready by itself", func() bool { return s.isReady(i) })
	}
	s.hssHasBoth("all tokens away")
	s.t.Logf("all is back after %v", time.Since(mended).Round(time.Millisecond))
	for _, d := range s.devices()[:20] {
		if err := errors.Join(s.byClient(d), s.byHSS(p)); err != nil {
			s.t.Errorf("after the tokens are back: %v", err)
		}
	}
}

// nothingIsLost checks that whoever has attached is bound, and gets vectors under the KME that the device has.
func (s *site) nothingIsLost() {
	active := map[string]bool{}
	for line := range strings.Lines(s.run(s.operator, "keysvc", "binding", "list")) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "ACTIVE" {
			active[f[0]] = true
		}
	}
	for imsi, secret := range s.bound {
		if !active[imsi] {
			s.t.Errorf("IMSI %s has attached, and is not ACTIVE", imsi)
			continue
		}
		var sent client.RAND
		rand.Read(sent[:])
		var v client.Vectors
		err := s.twice("PrepareVector", func() (err error) {
			v, err = s.client.PrepareVector(s.t.Context(), must.Get[kme.IMSI](s.t)(kme.ParseIMSI(imsi)),
				client.Origin{}, sent)
			return err
		})
		if err != nil || v.AttemptID != "" ||
			(&phone{d: s.network, imsi: imsi, kme: secret}).decrypt(v.RANDs[0][:]) != sent {
			s.t.Errorf("IMSI %s: its vector is not under its KME: %v", imsi, err)
		}
	}
	s.run(s.operator, "keysvc", "store", "verify")
	s.t.Logf("%d subscribers have attached, and are ACTIVE with their KMEs", len(s.bound))
}
