package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protowire"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/kme"
)

const (
	maxInstances = 16
	watchEvery   = 500 * time.Millisecond // how often an instance that is away is asked for /readyz
)

// An instance is one keysvc.
type instance struct {
	service kmev1connect.KeyServiceClient
	streams *opener
	http    *http.Client
	base    string

	patience time.Duration // how long a stream may be silent
	answer   time.Duration // how long it may take to say whether it is ready

	mu      sync.Mutex
	stream  *stream            // guarded by mu: what calls are made by; nil before the first
	unwatch context.CancelFunc // guarded by mu: nil as long as the instance gets calls
}

func newInstance(address string, config *tls.Config, timeout time.Duration) (*instance, error) {
	protocols := new(http.Protocols)
	dialer := &net.Dialer{Timeout: timeout}
	patience := max(timeout/4, time.Second)
	transport := &http.Transport{
		// A copy, because net/http changes the transport's configuration at its first call.
		Protocols: protocols, TLSClientConfig: config.Clone(), MaxIdleConnsPerHost: 16, IdleConnTimeout: time.Minute,
		DialContext: dialer.DialContext, TLSHandshakeTimeout: timeout,
		// A silent connection is pinged: nothing else ends a stream whose server is gone without closing it.
		HTTP2: &http.HTTP2Config{SendPingTimeout: patience, PingTimeout: patience},
	}
	base := address
	if path, ok := strings.CutPrefix(address, "unix:"); ok && path != "" {
		path = strings.TrimPrefix(path, "//")
		protocols.SetUnencryptedHTTP2(true)
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", path)
		}
		base = "http://keysvc"
	} else {
		protocols.SetHTTP2(true)
		if u, err := url.Parse(address); err != nil || u.Scheme != "https" || u.Host == "" {
			return nil, fmt.Errorf("the service's address is https://HOST:PORT or unix:PATH, not %q", address)
		}
		if config == nil || len(config.Certificates) == 0 && config.GetClientCertificate == nil {
			return nil, errors.New("the service wants a client certificate: TLS has none")
		}
	}
	c := &http.Client{Transport: whole{Transport: transport}}
	return &instance{service: kmev1connect.NewKeyServiceClient(c, base), streams: newOpener(c, base), http: c,
		base: base, patience: timeout / 4, answer: max(timeout/2, 4*watchEvery)}, nil
}

func (i *instance) close() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.stream != nil {
		i.stream.close()
	}
	if i.unwatch != nil {
		i.unwatch()
		i.unwatch = nil
	}
	i.http.CloseIdleConnections()
}

// call makes a call, which is encoded except for its id and time: in the open stream, or in a new one.
func (i *instance) call(ctx context.Context, call []byte) (*kmev1.Answer, error) {
	if until, ok := ctx.Deadline(); ok {
		call = protowire.AppendTag(call, 2, protowire.VarintType)
		call = protowire.AppendVarint(call, uint64(max(time.Until(until).Milliseconds(), 1)))
	}
	s, id, answer := i.begin(call)
	return s.wait(ctx, id, answer)
}

func (i *instance) begin(call []byte) (*stream, uint64, waiting) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.stream != nil {
		if id, answer := i.stream.accept(call); answer != nil {
			return i.stream, id, answer
		}
	}
	s, id, answer := open(i.streams, i.patience, call)
	i.stream = s
	return s, id, answer
}

func (i *instance) away() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.unwatch != nil
}

// leave stops calls to the instance until it says that it is ready.
func (i *instance) leave() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.unwatch != nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	i.unwatch = cancel
	go func() {
		for !i.ready(ctx) {
			select {
			case <-ctx.Done():
				return
			case <-time.After(watchEvery):
			}
		}
		i.mu.Lock()
		defer i.mu.Unlock()
		if ctx.Err() == nil {
			cancel()
			i.unwatch = nil
		}
	}()
}

func (i *instance) ready(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, i.answer)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, i.base+"/readyz", nil)
	if err != nil {
		return false
	}
	answer, err := i.http.Do(r)
	if err != nil {
		return false
	}
	io.Copy(io.Discard, io.LimitReader(answer.Body, 4096))
	answer.Body.Close()
	return answer.StatusCode == http.StatusOK
}

// instances are a set, a bit each.
type instances uint16

// pick gives any instance that was not tried and is not away; if all are away, any that was not tried. -1 if there is
// none. It is random: by turns, which may be in step with attaches, one instance could get all calls of a kind.
func (c *Client) pick(tried instances) int {
	picked, allAway := -1, true
	for _, at := range rand.Perm(len(c.instances)) {
		away, free := c.instances[at].away(), tried&(1<<at) == 0
		if free && !away {
			return at
		}
		if allAway = allAway && away; free && picked < 0 {
			picked = at
		}
	}
	if !allAway {
		return -1
	}
	return picked
}

// once makes a call at one instance. If another one may be tried afterwards, it leaves half of the time for that.
func once[A any](
	ctx context.Context, c *Client, i *instance, again bool, call func(context.Context, *instance) (*A, error),
) (*A, error) {
	if len(c.instances) == 1 {
		return call(ctx, i)
	}
	short, cancel := ctx, context.CancelFunc(func() {})
	if until, ok := ctx.Deadline(); ok && again {
		short, cancel = context.WithTimeout(ctx, time.Until(until)/2)
	}
	defer cancel()
	answer, err := call(short, i)
	if err == nil {
		return answer, nil
	}
	// The service may notice the end of the time first.
	if again && ctx.Err() == nil && connect.CodeOf(err) == connect.CodeDeadlineExceeded {
		err = connect.NewError(connect.CodeUnavailable, errors.New("the service does not answer"))
	}
	if connect.CodeOf(err) == connect.CodeUnimplemented { // what is there is not keysvc
		err = connect.NewError(connect.CodeUnavailable, err)
	}
	_, temporary := explain(err)
	if temporary && !errors.Is(err, Reason(kme.Overloaded)) && !errors.Is(err, Reason(kme.DirectoryUnavailable)) {
		i.leave()
	}
	return nil, err
}
