// Package webhook tells others of events over HTTP: as CloudEvents 1.0 (structured, JSON), signed as Standard Webhooks
// has it (HMAC-SHA256 over id, time and body).
package webhook

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kmehsm/kmehsm/internal/panics"
)

// Options are a Sender's.
type Options struct {
	URL      string                 // see CheckURL
	Secret   func() ([]byte, error) // is asked for each try: it may change; see ParseSecret
	Source   string                 // of the events: a URI reference
	Client   *http.Client
	Log      *slog.Logger
	Registry prometheus.Registerer // of what is counted

	// Pause is before the second try, 1 second if 0; it doubles up to maxPause.
	Pause time.Duration
	// GiveUp is for how long an event is tried, a day if 0.
	GiveUp time.Duration
}

const (
	maxWaiting = 1000 // events; more are dropped, and counted
	maxPause   = 5 * time.Minute
	perTry     = 10 * time.Second
	last       = 5 * time.Second // for what waits when Run ends
)

// A Sender sends events in order, in the background: no caller waits for it.
type Sender struct {
	o      Options
	queue  chan event
	events *prometheus.CounterVec
}

// An event is a CloudEvent, structured.
type event struct {
	SpecVersion     string    `json:"specversion"`
	ID              string    `json:"id"`
	Source          string    `json:"source"`
	Type            string    `json:"type"`
	Subject         string    `json:"subject,omitempty"`
	Time            time.Time `json:"time"`
	DataContentType string    `json:"datacontenttype"`
	Data            any       `json:"data"`
}

// CheckURL refuses a URL that a webhook must not have. It may have https, or http to this machine.
func CheckURL(text string) error {
	u, err := url.Parse(text)
	if err == nil {
		_, err = net.LookupPort("tcp", cmp.Or(u.Port(), u.Scheme))
	}
	if err == nil && u.Hostname() != "" && u.User == nil {
		ip := net.ParseIP(u.Hostname())
		if u.Scheme == "https" || u.Scheme == "http" && (u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()) {
			return nil
		}
	}
	return errors.New("a webhook's address is https://HOST/PATH without a password; http only to this machine")
}

// ParseSecret gives the bytes of a secret as Standard Webhooks writes it: whsec_ and 24 to 64 bytes as base64.
func ParseSecret(text string) ([]byte, error) {
	encoded, ok := strings.CutPrefix(strings.TrimSpace(text), "whsec_")
	secret, err := base64.StdEncoding.DecodeString(encoded)
	if !ok || err != nil || len(secret) < 24 || len(secret) > 64 {
		return nil, errors.New("a webhook's secret is whsec_ and 24 to 64 bytes as base64: make one with " +
			"echo whsec_$(openssl rand -base64 32)")
	}
	return secret, nil
}

// New makes a Sender, which sends while Run does.
func New(o Options) *Sender {
	o.Pause, o.GiveUp = cmp.Or(o.Pause, time.Second), cmp.Or(o.GiveUp, 24*time.Hour)
	client := *o.Client
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	o.Client = &client
	s := &Sender{o: o, queue: make(chan event, maxWaiting), events: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "kme_webhook_events_total",
		Help: "Events for the webhook: sent; retried, a try that failed; dropped, since too many waited, none was " +
			"accepted for a day, or the service ended.",
	}, []string{"result"})}
	o.Registry.MustRegister(s.events)
	for _, result := range []string{"sent", "retried", "dropped"} { // so that the first is an increase
		s.events.WithLabelValues(result)
	}
	return s
}

// Send queues an event. It does not wait.
func (s *Sender) Send(kind, subject string, data any) {
	e := event{SpecVersion: "1.0", ID: rand.Text(), Source: s.o.Source, Type: kind, Subject: subject,
		Time: time.Now().UTC(), DataContentType: "application/json", Data: data}
	select {
	case s.queue <- e:
	default:
		s.dropped(1, errors.New("too many events wait"))
	}
}

// dropped counts events that are not sent.
func (s *Sender) dropped(n int, why error) {
	s.events.WithLabelValues("dropped").Add(float64(n))
	s.o.Log.Error("events for the webhook were dropped", "events", n, "cause", why.Error())
}

// Run sends until ctx ends. Then it tries the waiting events once more.
func (s *Sender) Run(ctx context.Context) {
	for ctx.Err() == nil {
		select {
		case e := <-s.queue:
			s.deliver(ctx, e)
		case <-ctx.Done():
		}
	}
	short, cancel := context.WithTimeout(context.WithoutCancel(ctx), last)
	defer cancel()
	for len(s.queue) > 0 {
		if err := s.try(short, <-s.queue); err != nil {
			s.dropped(1+len(s.queue), err)
			return
		}
	}
}

// deliver tries until the event is accepted or given up, or ctx ends.
func (s *Sender) deliver(ctx context.Context, e event) {
	for pause := s.o.Pause; ; pause = min(2*pause, maxPause) {
		err := s.try(context.WithoutCancel(ctx), e)
		if err == nil {
			return
		}
		if ctx.Err() != nil || time.Since(e.Time) > s.o.GiveUp {
			s.dropped(1, err)
			return
		}
		s.events.WithLabelValues("retried").Inc()
		s.o.Log.Warn("the webhook has not accepted an event: it is sent again", "id", e.ID, "pause", pause.String(),
			"cause", err.Error())
		select {
		case <-time.After(pause/2 + mathrand.N(pause)):
		case <-ctx.Done():
		}
	}
}

func (s *Sender) try(ctx context.Context, e event) (err error) {
	defer panics.Recover(&err)
	body, err := json.Marshal(e)
	if err != nil {
		return err
	}
	secret, err := s.o.Secret()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, perTry)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, s.o.URL, bytes.NewReader(body))
	if err != nil {
		return err
	}
	at := strconv.FormatInt(time.Now().Unix(), 10)
	r.Header.Set("Content-Type", "application/cloudevents+json; charset=utf-8")
	r.Header.Set("Webhook-Id", e.ID)
	r.Header.Set("Webhook-Timestamp", at)
	r.Header.Set("Webhook-Signature", "v1,"+Signature(secret, e.ID, at, body))
	answer, err := s.o.Client.Do(r)
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err // without the URL, which may have a key in it
	}
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	io.Copy(io.Discard, io.LimitReader(answer.Body, 64<<10)) // so that the connection serves again
	if answer.StatusCode/100 != 2 {
		return fmt.Errorf("the webhook has answered %s", answer.Status)
	}
	s.events.WithLabelValues("sent").Inc()
	return nil
}

// Signature is what Standard Webhooks has after "v1,": the HMAC-SHA256 over id, time and body, base64.
func Signature(secret []byte, id, at string, body []byte) string {
	h := hmac.New(sha256.New, secret)
	fmt.Fprintf(h, "%s.%s.%s", id, at, body)
	return base64.StdEncoding.EncodeToString(h.Sum(nil))
}
