package n5geir

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"
)

// A Registration keeps us registered at an NRF (Nnrf_NFManagement, TS 29.510 clause 5.2.2).
type Registration struct {
	URL      string // the NRF's apiRoot
	Instance string // our NF instance id, a UUID
	Address  string // HOST:PORT, where AMFs reach us
	Tokens   bool   // they need an access token
	Client   *http.Client
	Log      *slog.Logger

	retry time.Duration // after a failure; 0: retry
}

const (
	heartbeat = 60 * time.Second // asked for; the NRF may want another
	retry     = 5 * time.Second
	nrfWait   = 10 * time.Second // for one request
)

// profile is our NFProfile (clause 6.1.6.2.2).
func (r *Registration) profile() (map[string]any, error) {
	host, digits, err := net.SplitHostPort(r.Address)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(digits, 10, 16)
	if err != nil {
		return nil, err
	}
	service := map[string]any{
		"serviceInstanceId": scope, "serviceName": scope, "scheme": "https", "nfServiceStatus": "REGISTERED",
		"versions":       []any{map[string]string{"apiVersionInUri": "v1", "apiFullVersion": "1.2.0"}},
		"oauth2Required": r.Tokens, "allowedNfTypes": []string{"AMF"},
	}
	endpoint := map[string]any{"port": port, "transport": "TCP"}
	service["ipEndPoints"] = []any{endpoint}
	p := map[string]any{
		"nfInstanceId": r.Instance, "nfType": nfType, "nfStatus": "REGISTERED",
		"heartBeatTimer": int(heartbeat.Seconds()), "allowedNfTypes": []string{"AMF"},
		"nfServiceList": map[string]any{scope: service},
	}
	switch ip := net.ParseIP(host); {
	case ip == nil:
		p["fqdn"], service["fqdn"] = host, host
	case ip.To4() != nil:
		p["ipv4Addresses"], endpoint["ipv4Address"] = []string{host}, host
	default:
		p["ipv6Addresses"], endpoint["ipv6Address"] = []string{host}, host
	}
	return p, nil
}

// errNotRegistered says that the NRF does not know us, or does not know us any more.
var errNotRegistered = errors.New("the NRF does not know this instance")

// Run registers, and sends heartbeats until ctx ends; then it deregisters. If the NRF is away or has forgotten us, it
// tries again. No call of an AMF waits for it.
func (r *Registration) Run(ctx context.Context) {
	registered, every := false, heartbeat
	var last string // what was logged of an NRF that is away
	for {
		wait := every
		var err error
		if registered {
			err = r.heartbeat(ctx)
		} else if every, err = r.register(ctx); err == nil {
			registered, wait = true, every
			r.Log.Info("registered at the NRF", "nrf", r.URL, "instance", r.Instance, "heartbeat", every.String())
		}
		switch {
		case err == nil:
			last = ""
		case ctx.Err() != nil:
		default:
			// After a heartbeat that got no answer we may still be there: to register again is safe.
			registered, wait, every = false, cmp.Or(r.retry, retry), heartbeat
			if text := err.Error(); text != last {
				r.Log.Warn("the NRF has not answered as it should; it is asked again", "nrf", r.URL, "cause", text)
				last = text
			}
			if errors.Is(err, errNotRegistered) {
				wait = 0
			}
		}
		select {
		case <-ctx.Done():
			if registered {
				r.deregister(context.WithoutCancel(ctx))
			}
			return
		case <-time.After(wait):
		}
	}
}

// register gives how often the NRF wants a heartbeat. We send one after two thirds of that time.
func (r *Registration) register(ctx context.Context) (time.Duration, error) {
	profile, err := r.profile()
	if err != nil {
		return heartbeat, err
	}
	body, err := r.do(ctx, http.MethodPut, "application/json", profile, http.StatusOK, http.StatusCreated)
	if err != nil {
		return heartbeat, err
	}
	var answer struct {
		HeartBeatTimer int `json:"heartBeatTimer"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return heartbeat, fmt.Errorf("the NRF's answer is no NFProfile: %w", err)
	}
	every := time.Duration(answer.HeartBeatTimer) * time.Second
	if every <= 0 || every > 24*time.Hour {
		every = heartbeat
	}
	return every * 2 / 3, nil
}

// heartbeat is clause 5.2.2.3.2.
func (r *Registration) heartbeat(ctx context.Context) error {
	patch := []any{map[string]string{"op": "replace", "path": "/nfStatus", "value": "REGISTERED"}}
	_, err := r.do(ctx, http.MethodPatch, "application/json-patch+json", patch, http.StatusOK, http.StatusNoContent)
	return err
}

func (r *Registration) deregister(ctx context.Context) {
	_, err := r.do(ctx, http.MethodDelete, "", nil, http.StatusNoContent)
	if err != nil && !errors.Is(err, errNotRegistered) {
		r.Log.Warn("not deregistered at the NRF: it notices when heartbeats are missing", "nrf", r.URL,
			"cause", err.Error())
	}
}

// do makes one request about our instance, whose answer has one of some codes.
func (r *Registration) do(ctx context.Context, method, kind string, body any, codes ...int) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, nrfWait)
	defer cancel()
	address, err := url.JoinPath(r.URL, "nnrf-nfm/v1/nf-instances", r.Instance)
	if err != nil {
		return nil, err
	}
	var text []byte
	if body != nil {
		if text, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	q, err := http.NewRequestWithContext(ctx, method, address, bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	if kind != "" {
		q.Header.Set("Content-Type", kind)
	}
	a, err := r.Client.Do(q)
	if err != nil {
		return nil, err
	}
	defer a.Body.Close()
	if slices.Contains(codes, a.StatusCode) {
		return io.ReadAll(io.LimitReader(a.Body, 1<<20))
	}
	if a.StatusCode == http.StatusNotFound && method != http.MethodPut {
		return nil, errNotRegistered
	}
	return nil, fmt.Errorf("%s %s: %s", method, address, a.Status)
}
