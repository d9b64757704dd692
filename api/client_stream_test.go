package api

import (
	"context"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

func parseIMSITest(t *testing.T, text string) kme.IMSI {
	t.Helper()
	imsi, err := kme.ParseIMSI(text)
	if err != nil {
		t.Fatal(err)
	}
	return imsi
}

func newClient(t *testing.T, path string, o client.Options) *client.Client {
	t.Helper()
	o.URLs = []string{"unix:" + path}
	c, err := client.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// Whoever gives a call up waits for nothing, and its answer goes to nobody else. Nor is a call that cannot be sent
// anybody else's end.
func TestGivenUp(t *testing.T) {
	s := newStreaming(t, new(http.Transport))
	c := newClient(t, s.path, client.Options{Timeout: testproc.Patience})
	one, slow := parseIMSITest(t, bound), parseIMSITest(t, kept)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := c.GetBinding(ctx, slow)
		ended <- err
	}()
	testproc.Await(t, "the call is under way", func() bool { return s.store.asked.Load() == 1 })
	cancel()
	if err := <-ended; connect.CodeOf(err) != connect.CodeCanceled {
		t.Errorf("a call that is cancelled: %v", err)
	}
	for wait := 50 * time.Millisecond; s.store.asked.Load() == 1; wait *= 2 { // until one ends while it is under way
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		if _, err := c.GetBinding(ctx, slow); connect.CodeOf(err) != connect.CodeDeadlineExceeded {
			t.Fatalf("a call whose deadline is over: %v", err)
		}
		cancel()
	}
	close(s.store.goOn)
	var malformed *client.Error
	_, err := c.EstablishKME(t.Context(), one, client.Origin{}, kme.IMEI{}, "a", make([]byte, 1<<20))
	if !errors.As(err, &malformed) || malformed.Reason != kme.Malformed {
		t.Errorf("a payload that is too long: %v", err)
	}
	_, err = c.EstablishKME(t.Context(), one, client.Origin{}, kme.IMEI{}, "\xff", nil)
	if !errors.As(err, &malformed) || malformed.Reason != kme.Malformed {
		t.Errorf("an attempt that is no text: %v", err)
	}
	for range 3 {
		if b, err := c.GetBinding(t.Context(), one); err != nil || b.GetImsi() != bound {
			t.Errorf("%v, %v", b, err)
		}
	}
	if n := s.opened.Load(); n != 1 {
		t.Errorf("%d streams were opened", n)
	}
}

// A service that is killed ends the calls under way: those that may be are made again, by another stream.
func TestServiceKilled(t *testing.T) {
	s := newStreaming(t, new(http.Transport))
	c := newClient(t, s.path, client.Options{Timeout: testproc.Patience, Tries: 10})
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if b, err := c.GetBinding(t.Context(), parseIMSITest(t, kept)); err != nil || b.GetImsi() != kept {
				t.Errorf("%v, %v", b, err)
			}
		})
	}
	all.Go(func() {
		_, err := c.ReportAuthentication(t.Context(), parseIMSITest(t, kept), client.Origin{}, false)
		if connect.CodeOf(err) != connect.CodeUnavailable || !errors.Is(err, client.ErrStreamEnded) {
			t.Errorf("a report that may not be repeated: %v", err)
		}
	})
	testproc.Await(t, "the calls are under way", func() bool { return s.store.asked.Load() == 21 })
	s.close()
	time.Sleep(10 * time.Millisecond) // nobody is there
	s.listen(t)
	testproc.Await(t, "the calls are made again", func() bool { return s.store.asked.Load() == 41 })
	close(s.store.goOn)
	all.Wait()
	if n := s.opened.Load(); n != 2 {
		t.Errorf("%d streams were opened", n)
	}
}

// A service that drains answers what is under way, and the client finds the one that comes after it.
func TestServiceRestarted(t *testing.T) {
	s := newStreaming(t, new(http.Transport))
	c := newClient(t, s.path, client.Options{Timeout: testproc.Patience, Tries: 10})
	slow := parseIMSITest(t, kept)
	answered := make(chan error, 1)
	go func() {
		_, err := c.ReportAuthentication(t.Context(), slow, client.Origin{}, false)
		answered <- err
	}()
	testproc.Await(t, "the report is under way", func() bool { return s.store.asked.Load() == 1 })
	drained := make(chan struct{})
	go func() { s.end(t); close(drained) }()
	testproc.Await(t, "it drains", s.leaving.Load)
	later := make(chan error, 1)
	go func() {
		_, err := c.GetBinding(t.Context(), slow)
		later <- err
	}()
	close(s.store.goOn)
	if err := <-answered; err != nil {
		t.Error(err)
	}
	<-drained
	s.listen(t)
	if err := <-later; err != nil {
		t.Errorf("a call while it drains, or after: %v", err)
	}
}

// A service that does not know streams says so at once.
func TestServiceWithoutStreams(t *testing.T) {
	s := newStreaming(t, new(http.Transport))
	s.handler.Handler = http.NotFoundHandler()
	c := newClient(t, s.path, client.Options{Timeout: testproc.Patience})
	_, err := c.GetBinding(t.Context(), parseIMSITest(t, bound))
	if connect.CodeOf(err) != connect.CodeUnimplemented || s.opened.Load() != 1 {
		t.Errorf("%v, after %d streams", err, s.opened.Load())
	}
}

// A connection on which nothing comes any more is given up.
func TestServiceGone(t *testing.T) {
	s := newStreaming(t, new(http.Transport))
	path := filepath.Join(t.TempDir(), "proxy")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var silent atomic.Pointer[atomic.Bool] // of the last connection
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("unix", s.path)
			if err != nil {
				t.Error(err)
				return
			}
			mute := new(atomic.Bool)
			silent.Store(mute)
			forward := func(to, from net.Conn) {
				buffer := make([]byte, 1<<16)
				for {
					n, err := from.Read(buffer)
					if err != nil {
						to.Close()
						return
					}
					if !mute.Load() {
						to.Write(buffer[:n])
					}
				}
			}
			go forward(near, far)
			go forward(far, near)
		}
	}()
	c := newClient(t, path, client.Options{Timeout: 500 * time.Millisecond})
	one := parseIMSITest(t, bound)
	testproc.Await(t, "it answers", func() bool { _, err := c.GetBinding(t.Context(), one); return err == nil })
	silent.Load().Store(true)
	if _, err := c.GetBinding(t.Context(), one); connect.CodeOf(err) != connect.CodeDeadlineExceeded {
		t.Errorf("nothing comes: %v", err)
	}
	testproc.Await(t, "it answers again", func() bool { _, err := c.GetBinding(t.Context(), one); return err == nil })
}

// A stream whose handler hangs takes no later calls, although its connection lives, and ends.
func TestStreamHangs(t *testing.T) {
	s := newStreaming(t, new(http.Transport))
	serve := s.handler.Handler
	var hung atomic.Int64
	ended := make(chan struct{})
	s.handler.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if hung.Add(1) > 1 {
			serve.ServeHTTP(w, r)
			return
		}
		http.NewResponseController(w).SetWriteDeadline(time.Time{}) // as a stream does
		<-r.Context().Done()
		close(ended)
	})
	c := newClient(t, s.path, client.Options{Timeout: time.Second})
	one := parseIMSITest(t, bound)
	if _, err := c.GetBinding(t.Context(), one); connect.CodeOf(err) != connect.CodeDeadlineExceeded {
		t.Errorf("nothing comes: %v", err)
	}
	testproc.Await(t, "it answers", func() bool { _, err := c.GetBinding(t.Context(), one); return err == nil })
	<-ended
}

// Close ends calls, and leaves no goroutine. A call after it connects again.
func TestClose(t *testing.T) {
	// A connection that is not idle yet ends by the server's timeout.
	s := newStreamingOf(t, new(http.Transport), time.Second)
	before := runtime.NumGoroutine()
	c := newClient(t, s.path, client.Options{Timeout: testproc.Patience, Tries: 1})
	ended := make(chan error, 1)
	go func() {
		_, err := c.GetBinding(t.Context(), parseIMSITest(t, kept))
		ended <- err
	}()
	testproc.Await(t, "the call is under way", func() bool { return s.store.asked.Load() == 1 })
	c.Close()
	if err := <-ended; connect.CodeOf(err) != connect.CodeCanceled {
		t.Errorf("the call under way: %v", err)
	}
	testproc.Await(t, "all goroutines end", func() bool { return runtime.NumGoroutine() <= before })
	if _, err := c.GetBinding(t.Context(), parseIMSITest(t, bound)); err != nil {
		t.Error(err)
	}
}
