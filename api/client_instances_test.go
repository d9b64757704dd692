package api

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// newInstances makes two services, and a client of both.
func newInstances(t *testing.T, timeout time.Duration) (a, b *streaming, c *client.Client) {
	t.Helper()
	a, b = newStreaming(t, new(http.Transport)), newStreaming(t, new(http.Transport))
	c, err := client.New(client.Options{URLs: []string{"unix:" + a.path, "unix:" + b.path}, Timeout: timeout, Tries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return a, b, c
}

// inTime makes what must come out right within a call's time: again with twice as long if it did not, since other work
// may have come between. A call that is kept for too long is so whatever its time is.
func inTime(t *testing.T, timeout time.Duration, try func(timeout time.Duration) error) {
	t.Helper()
	for ; ; timeout *= 2 {
		err := try(timeout)
		if err == nil {
			return
		}
		if timeout > testproc.Patience/2 {
			t.Fatalf("with %s: %v", timeout, err)
		}
		t.Logf("with %s: %v", timeout, err)
	}
}

func TestInstancesShare(t *testing.T) {
	a, b, c := newInstances(t, testproc.Patience)
	for range 100 {
		if _, err := c.GetBinding(t.Context(), parseIMSITest(t, bound)); err != nil {
			t.Fatal(err)
		}
	}
	if a, b := a.store.asked.Load(), b.store.asked.Load(); a < 20 || b < 20 || a+b != 100 {
		t.Errorf("%d and %d calls", a, b)
	}
}

// Calls go on while an instance is killed, and while it is back but not ready. It gets its share again when it is.
func TestInstanceKilled(t *testing.T) {
	a, b, c := newInstances(t, testproc.Patience)
	one := parseIMSITest(t, bound)
	get := func(n int) {
		t.Helper()
		var all sync.WaitGroup
		for range n {
			all.Go(func() {
				if _, err := c.GetBinding(t.Context(), one); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	}
	get(20)
	a.close()
	get(20)
	for range 10 { // may not be repeated, and need not be
		if _, err := c.ReportAuthentication(t.Context(), one, client.Origin{}, false); err != nil {
			t.Error(err)
		}
	}
	a.unready.Store(true)
	a.listen(t)
	before := a.opened.Load()
	testproc.Await(t, "it is asked whether it is ready", func() bool { return a.opened.Load() > before+2 })
	asked := a.store.asked.Load()
	get(20)
	if n := a.store.asked.Load() - asked; n != 0 {
		t.Errorf("an instance that is not ready got %d calls", n)
	}
	a.unready.Store(false)
	testproc.Await(t, "it gets calls again", func() bool { get(2); return a.store.asked.Load() > asked })
	b.close()
	get(20)
}

// An instance that is silent keeps a call for half of its time. What may not be repeated is made once.
func TestInstanceSilent(t *testing.T) {
	slow := parseIMSITest(t, kept)
	var a, b *streaming
	var c *client.Client
	inTime(t, 2*time.Second, func(timeout time.Duration) error {
		a, b, c = newInstances(t, timeout)
		close(b.store.goOn)
		for n := 0; n < 4 || n < 100 && a.store.asked.Load() == 0; n++ {
			if got, err := c.GetBinding(t.Context(), slow); err != nil || got.GetImsi() != kept {
				return fmt.Errorf("%v, %v", got, err)
			}
		}
		return nil
	})
	if a.store.asked.Load() == 0 {
		t.Error("the silent one was not asked")
	}
	testproc.Await(t, "the silent one has a report", func() bool {
		before := a.store.asked.Load() + b.store.asked.Load()
		_, err := c.ReportAuthentication(t.Context(), slow, client.Origin{}, false)
		if n := a.store.asked.Load() + b.store.asked.Load() - before; n != 1 {
			t.Fatalf("a report of a failure was made %d times: %v", n, err)
		}
		return connect.CodeOf(err) == connect.CodeDeadlineExceeded
	})
}

// All are away: a call goes to any of them, and says why it is refused.
func TestInstancesAway(t *testing.T) {
	a, b, c := newInstances(t, testproc.Patience)
	a.close()
	b.close()
	for range 3 {
		_, err := c.GetBinding(t.Context(), parseIMSITest(t, bound))
		if connect.CodeOf(err) != connect.CodeUnavailable {
			t.Error(err)
		}
	}
	b.listen(t)
	for range 3 {
		if _, err := c.GetBinding(t.Context(), parseIMSITest(t, bound)); err != nil {
			t.Error(err)
		}
	}
}

// A refusal of one that is overloaded is the answer where the other is known to be away: that is not waited for.
func TestInstanceOverloaded(t *testing.T) {
	inTime(t, 4*time.Second, func(timeout time.Duration) error { return saysOverloaded(t, timeout) })
}

func saysOverloaded(t *testing.T, timeout time.Duration) error {
	a, b, c := newInstances(t, timeout)
	one := parseIMSITest(t, bound)
	get := func() (err error) {
		for range 20 { // at both
			_, last := c.GetBinding(t.Context(), one)
			err = errors.Join(err, last)
		}
		return err
	}
	if err := get(); err != nil {
		return err
	}
	b.close()
	l, err := net.Listen("unix", b.path) // it takes connections, and is silent
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := get(); err != nil {
		return err
	}
	a.handler.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e := connect.NewError(connect.CodeResourceExhausted, errors.New("too much"))
		e.Meta().Set(kme.ReasonHeader, string(kme.Overloaded))
		if err := connect.NewErrorWriter().Write(w, r, e); err != nil {
			t.Error(err)
		}
	})
	a.end(t) // the stream to it
	a.listen(t)
	for range 2 {
		if _, err := c.GetBinding(t.Context(), one); !errors.Is(err, client.Reason(kme.Overloaded)) {
			return fmt.Errorf("of one that is overloaded: %v", err)
		}
	}
	return nil
}

// No call fails while an instance ends in order and another serves, also none that may be made only once.
func TestInstanceEnds(t *testing.T) {
	a, b, c := newInstances(t, testproc.Patience)
	one := parseIMSITest(t, bound)
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for ctx.Err() == nil {
				if _, err := c.ReportAuthentication(t.Context(), one, client.Origin{}, false); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for _, s := range []*streaming{a, b, a, b} {
		ofA, ofB := a.store.asked.Load(), b.store.asked.Load()
		testproc.Await(t, "both get calls", func() bool {
			return a.store.asked.Load() > ofA+20 && b.store.asked.Load() > ofB+20
		})
		s.end(t)
		s.listen(t)
	}
	stop()
	all.Wait()
}

// A call that may be made only once goes to the next instance if the first has ended before it looked at the call.
func TestInstanceLeavesAStreamOut(t *testing.T) {
	a, b, c := newInstances(t, testproc.Patience)
	a.close()
	l, err := net.Listen("unix", a.path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go goAway(conn)
		}
	}()
	for range 20 {
		if _, err := c.ReportAuthentication(t.Context(), parseIMSITest(t, bound), client.Origin{}, false); err != nil {
			t.Error(err)
		}
	}
	if asked := b.store.asked.Load(); asked != 20 {
		t.Errorf("%d of 20 calls were made", asked)
	}
}

// goAway is an HTTP/2 server that takes no stream: it answers HEADERS by GOAWAY with NO_ERROR and no last stream (RFC
// 9113, 6.8).
func goAway(conn net.Conn) {
	defer conn.Close()
	conn.Write([]byte{0, 0, 0, 4, 0, 0, 0, 0, 0}) // SETTINGS
	r, header := bufio.NewReader(conn), make([]byte, 9)
	r.Discard(len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
	for {
		if _, err := io.ReadFull(r, header); err != nil {
			return
		}
		if _, err := r.Discard(int(header[0])<<16 | int(header[1])<<8 | int(header[2])); err != nil {
			return
		}
		if header[3] == 1 { // HEADERS
			conn.Write([]byte{0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}) // GOAWAY
		}
	}
}

// A call that may be made only once goes to the next instance if there is no connection to the first.
func TestInstanceNotThere(t *testing.T) {
	a, _, c := newInstances(t, testproc.Patience)
	a.close()
	for range 10 {
		if _, err := c.OpenProvisioning(t.Context(), parseIMSITest(t, bound), time.Hour); connect.CodeOf(err) ==
			connect.CodeUnavailable {
			t.Error(err)
		}
		if _, err := c.ReportAuthentication(t.Context(), parseIMSITest(t, bound), client.Origin{}, false); err != nil {
			t.Error(err)
		}
	}
}

// What is no keysvc, or answers what was not asked, is left as one that is away.
func TestInstanceAnswersGarbage(t *testing.T) {
	answer := func(change func(*kmev1.Call, *kmev1.Answer)) http.Handler {
		_, h := kmev1connect.NewKeyServiceHandler(garbage{change: change})
		return h
	}
	refuses := func(code int) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", code) })
	}
	for what, h := range map[string]http.Handler{
		"not found": http.NotFoundHandler(),
		"forbidden": refuses(http.StatusForbidden),
		"who is it": refuses(http.StatusUnauthorized),
		"a page":    http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("<html>")) }),
		"noise":     http.HandlerFunc(noise),
		"an answer to another call": answer(func(_ *kmev1.Call, a *kmev1.Answer) {
			a.Answer = &kmev1.Answer_RestoreRand{RestoreRand: &kmev1.RestoreRANDResponse{}}
		}),
		"no answer at all": answer(func(*kmev1.Call, *kmev1.Answer) {}),
	} {
		a, _, c := newInstances(t, testproc.Patience)
		a.handler.Handler = h
		for range 20 {
			if got, err := c.GetBinding(t.Context(), parseIMSITest(t, bound)); err != nil || got.GetImsi() != bound {
				t.Errorf("%s: %v, %v", what, got, err)
			}
		}
		if a.opened.Load() == 0 {
			t.Errorf("%s: it was not asked", what)
		}
	}
}

func noise(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/connect+proto")
	w.Write([]byte("\x00\x00\x00\x00\x04\xff\xff\xff\xff"))
}

// garbage answers each call of a stream with what change makes.
type garbage struct {
	kmev1connect.UnimplementedKeyServiceHandler
	change func(*kmev1.Call, *kmev1.Answer)
}

func (g garbage) Stream(_ context.Context, b *connect.BidiStream[kmev1.StreamRequest, kmev1.StreamResponse]) error {
	for {
		m, err := b.Receive()
		if err != nil {
			return err
		}
		var r kmev1.StreamResponse
		for _, call := range m.Calls {
			a := &kmev1.Answer{Id: call.Id}
			g.change(call, a)
			r.Answers = append(r.Answers, a)
		}
		if err := b.Send(&r); err != nil {
			return err
		}
	}
}

// An answer that is none of the values that a caller knows is an error: it would be taken for the harmless one.
func TestAnswerOfNoMeaning(t *testing.T) {
	s := newStreaming(t, new(http.Transport))
	prepared := &kmev1.PrepareVectorResponse{Rands: [][]byte{make([]byte, 16)}}
	equipment := new(kmev1.CheckEquipmentResponse)
	_, s.handler.Handler = kmev1connect.NewKeyServiceHandler(garbage{change: func(c *kmev1.Call, a *kmev1.Answer) {
		if c.GetPrepareVector() != nil {
			a.Answer = &kmev1.Answer_PrepareVector{PrepareVector: prepared}
		} else {
			a.Answer = &kmev1.Answer_CheckEquipment{CheckEquipment: equipment}
		}
	}})
	c := newClient(t, s.path, client.Options{Timeout: testproc.Patience, Tries: 1})
	for _, p := range []struct {
		control kmev1.Control
		attempt string
		ok      bool
	}{
		{0, "", false}, {0, "a", false}, {3, "", false}, {kmev1.Control_PREPROCESSED, "a", false},
		{kmev1.Control_PROVISIONING_ONLY, "", false}, {kmev1.Control_PREPROCESSED, "", true},
		{kmev1.Control_PROVISIONING_ONLY, "a", true},
	} {
		prepared.Control, prepared.AttemptId = p.control, p.attempt
		v, err := c.PrepareVector(t.Context(), parseIMSITest(t, bound), client.Origin{}, client.RAND{})
		if (err == nil) != p.ok || err != nil && len(v.RANDs) > 0 {
			t.Errorf("control %v, attempt %q: %v, %v", p.control, p.attempt, v, err)
		}
	}
	for status := range kmev1.EquipmentStatus(5) {
		equipment.Status = status
		e, err := c.CheckEquipment(t.Context(), kme.IMEI{}, kme.IMSI{})
		if (err == nil) != (status >= 1 && status <= 3) || err == nil && e.Status != status {
			t.Errorf("status %v: %v, %v", status, e, err)
		}
	}
}

// Close ends what is under way: nothing of it goes elsewhere, or asks whether somebody is ready.
func TestCloseOfSeveral(t *testing.T) {
	a, b, c := newInstances(t, testproc.Patience)
	slow := parseIMSITest(t, kept)
	ended := make(chan error, 8)
	for range cap(ended) {
		go func() {
			_, err := c.GetBinding(t.Context(), slow)
			ended <- err
		}()
	}
	testproc.Await(t, "all are under way", func() bool { return a.store.asked.Load()+b.store.asked.Load() == 8 })
	opened := a.opened.Load() + b.opened.Load()
	c.Close()
	for range cap(ended) {
		if err := <-ended; connect.CodeOf(err) != connect.CodeCanceled {
			t.Error(err)
		}
	}
	if n := a.opened.Load() + b.opened.Load() - opened; n != 0 {
		t.Errorf("%d requests after the client was closed", n)
	}
}
