package station

import (
	"context"
	"crypto/tls"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"mime"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/kme"
)

//go:embed wall.html wall.js
var wall embed.FS

// Handler serves stations, and a wall screen. A station's name is the common name of its client certificate's subject,
// and one of Options.Stations. Others see the counts, and the IMEI that each station holds. A browser sends its client
// certificate with requests of any page; so requests of other pages are refused (see http.CrossOriginProtection), and
// so are bodies that a form can make.
//
//	POST /v1/lots/{lot}/next                     the next device: a Ticket
//	POST /v1/lots/{lot}/devices/{imei}           that device: a Ticket
//	PUT  /v1/lots/{lot}/devices/{imei}/result    {"result": "injected" | "failed" | "scrapped", "note": "..."}
//	GET  /v1/status                              a Status
//	GET  /                                       the wall screen
//	GET  /healthz                                200 if the desk's database answers, and the Warnings; else 503
//	GET  /metrics                                for Prometheus: counts, and no device
//
// An error is {"error": "..."}: 400 for what makes no sense, 403 for whoever is no station or comes from another page,
// 404 when no device is left, 409 for what this station may not do now, 415 for a body that does not say that it is
// JSON, 503 for what may work later. The log says who was refused, and why.
func (d *Desk) Handler() http.Handler {
	mux := http.NewServeMux()
	station := func(pattern string, f func(r *http.Request, station string) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			name, err := d.stationOf(r)
			if err != nil {
				d.refuse(w, r, "", http.StatusForbidden, err.Error())
				return
			}
			if t, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type")); r.ContentLength != 0 &&
				t != "application/json" {
				d.refuse(w, r, name, http.StatusUnsupportedMediaType,
					"the body is JSON: say Content-Type: application/json")
				return
			}
			v, err := f(r, name)
			d.reply(w, r, name, v, err)
		})
	}
	station("POST /v1/lots/{lot}/next", func(r *http.Request, station string) (any, error) {
		return d.Next(r.Context(), station, r.PathValue("lot"))
	})
	device := func(pattern string, f func(r *http.Request, station string, imei kme.IMEI) (any, error)) {
		station(pattern, func(r *http.Request, station string) (any, error) {
			imei, err := kme.ParseIMEI(r.PathValue("imei"))
			if err != nil {
				return nil, badRequest{error: err}
			}
			return f(r, station, imei)
		})
	}
	device("POST /v1/lots/{lot}/devices/{imei}", func(r *http.Request, station string, imei kme.IMEI) (any, error) {
		return d.Named(r.Context(), station, r.PathValue("lot"), imei)
	})
	device("PUT /v1/lots/{lot}/devices/{imei}/result",
		func(r *http.Request, station string, imei kme.IMEI) (any, error) {
			var report struct {
				Result State  `json:"result"`
				Note   string `json:"note"`
			}
			body, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, 4096))
			if err == nil {
				err = strict.Parse(body, &report)
			}
			if err != nil {
				return nil, badRequest{error: err}
			}
			return map[string]any{"imei": imei, "state": report.Result}, d.Report(r.Context(), station,
				r.PathValue("lot"), imei, report.Result, report.Note)
		})
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		s, err := d.Status(r.Context())
		d.reply(w, r, "", s, err)
	})
	mux.Handle("GET /metrics", d.metrics.handler)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		if err := d.read.PingContext(r.Context()); err != nil {
			d.refuse(w, r, "", http.StatusServiceUnavailable, "the desk's database does not answer")
			return
		}
		fmt.Fprintln(w, "ok")
		for _, warning := range d.warnings() {
			fmt.Fprintln(w, "but", warning)
		}
	})
	page := http.FileServerFS(wall)
	mux.HandleFunc("GET /wall.js", page.ServeHTTP)
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Security-Policy",
			"default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'")
		http.ServeFileFS(w, r, wall, "wall.html")
	})
	protection := http.NewCrossOriginProtection()
	protection.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d.refuse(w, r, "", http.StatusForbidden, "this was asked for by a page of another origin")
	}))
	return protection.Handler(mux)
}

// Serve opens the desk of a line, and serves it until ctx ends. Then it finishes the requests under way. It closes
// listener.
func Serve(ctx context.Context, listener net.Listener, config *tls.Config, o Options) (err error) {
	desk, err := Open(ctx, o)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	defer func() { err = errors.Join(err, desk.Close()) }()
	server := newServer(desk.Handler(), config, log.New(handshakes{Desk: desk}, "", 0))
	drained := make(chan error, 1)
	context.AfterFunc(ctx, func() {
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		drained <- server.Shutdown(drain)
	})
	o.Log.Info("serving stations", "address", "https://"+listener.Addr().String())
	if err := server.ServeTLS(listener, "", ""); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-drained
}

// newServer makes a server that ends a request, and a connection, whose client does not read. Answers are short; the
// time is for a directory that is slow.
func newServer(handler http.Handler, config *tls.Config, log *log.Logger) *http.Server {
	return &http.Server{
		Handler: handler, TLSConfig: config, ErrorLog: log, ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout: 30 * time.Second, WriteTimeout: 2 * time.Minute, IdleTimeout: 5 * time.Minute,
		MaxHeaderBytes: 32 << 10,
		HTTP2:          &http.HTTP2Config{WriteByteTimeout: 30 * time.Second}, // WriteTimeout ends a stream alone
	}
}

// handshakes takes the log lines of http.Server: connections that failed before a request, for example with a
// certificate of another CA.
type handshakes struct{ *Desk }

func (h handshakes) Write(line []byte) (int, error) {
	h.refused(0, "reason", strict.Short(strings.TrimSpace(string(line))))
	return len(line), nil
}

func (d *Desk) stationOf(r *http.Request) (string, error) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return "", errors.New("a station shows its client certificate")
	}
	name := r.TLS.VerifiedChains[0][0].Subject.CommonName
	if err := directory.CheckName(name); err != nil {
		return "", errors.New("the common name of the station's certificate is no name: letters, digits, dots, dashes")
	}
	if !slices.Contains(d.o.Stations, name) {
		return "", fmt.Errorf("%s is no station of this line: begin factory station serve with --station %s, if it "+
			"is to be one", name, name)
	}
	return name, nil
}

type badRequest struct{ error }

// refuse answers a request with an error, and logs it.
func (d *Desk) refuse(w http.ResponseWriter, r *http.Request, station string, code int, reason string, more ...any) {
	d.refused(code, append([]any{"method", r.Method, "path", strict.Short(r.URL.Path), "station", station,
		"address", r.RemoteAddr, "reason", reason}, more...)...)
	answer(w, code, map[string]string{"error": reason})
}

func (d *Desk) reply(w http.ResponseWriter, r *http.Request, station string, v any, err error) {
	if err == nil {
		answer(w, http.StatusOK, v)
		return
	}
	code, text := http.StatusInternalServerError, "the line's own trouble: see its log"
	switch {
	case errors.As(err, new(badRequest)):
		code, text = http.StatusBadRequest, err.Error()
	case errors.As(err, new(*RefusedError)):
		code, text = http.StatusConflict, err.Error()
	case errors.Is(err, ErrNoneLeft):
		code, text = http.StatusNotFound, err.Error()
	case errors.Is(err, ErrNotReady), errors.Is(err, directory.ErrNotCurrent),
		errors.Is(err, directory.ErrUnavailable):
		w.Header().Set("Retry-After", "5")
		code, text = http.StatusServiceUnavailable, err.Error()
	case r.Context().Err() != nil:
		return // nobody listens
	}
	var cause []any
	if code == http.StatusInternalServerError {
		cause = []any{"error", err} // not for the station
	}
	d.refuse(w, r, station, code, text, cause...)
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(v)
}
