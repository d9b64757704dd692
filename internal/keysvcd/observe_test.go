package keysvcd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/keysvcd/settings"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/kme"
)

// Everything that can be counted is there from the start, at zero: the first of a kind is an increase, also for an
// alert that looks for one.
func TestCountersFromZero(t *testing.T) {
	registry := prometheus.NewRegistry()
	binding.NewMetrics(registry).Methods("EstablishKME")
	readerOptions(&settings.Config{}, nil, nil, newOverdue(registry), nil)("m1")
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	series := map[string]int{}
	for _, f := range families {
		for _, m := range f.Metric {
			series[f.GetName()]++
			if m.Counter.GetValue() != 0 || m.Histogram.GetSampleCount() != 0 {
				t.Errorf("%s does not begin at zero: %s", f.GetName(), m)
			}
		}
	}
	for name, want := range map[string]int{
		"kme_refusals_total": len(kme.Reasons()), "kme_unauthenticated_total": 5, "kme_rejected_payloads_total": 1,
		"kme_panics_total": 1, "kme_attaches_total": 1, "kme_established_total": 1, "kme_call_seconds": 2,
		"kme_revocations_overdue_total": 5,
	} {
		if series[name] != want {
			t.Errorf("%s has %d time series, want %d", name, series[name], want)
		}
	}
}

// What a reload changes is in the metrics as it is then: each certificate, also one that is there twice or was
// renewed, and each list.
func TestChanging(t *testing.T) {
	s := newSite(t, nil)
	bound := new(census)
	c := &changing{s.live, bound}
	text := func() string {
		t.Helper()
		got, err := testutil.CollectAndFormat(c, expfmt.TypeTextPlain, "kme_certificate_days_left",
			"kme_revocations_age_seconds", "kme_bindings", "kme_bindings_counted_timestamp_seconds")
		if err != nil {
			t.Fatal(err)
		}
		return string(got)
	}
	got := text()
	for _, want := range []string{`kme_certificate_days_left{certificate="client_ca",serial="2",subject="CN=a"} 0.04`,
		`kme_certificate_days_left{certificate="server",serial="2",subject="CN=a"} 0.04`} { // an hour: see certtest
		if !strings.Contains(got, want) {
			t.Errorf("the metrics have no %s:\n%s", want, got)
		}
	}
	if strings.Contains(got, "kme_bindings") {
		t.Errorf("bindings that nobody has counted:\n%s", got)
	}
	bound.last.Store(&counted{map[binding.State]int64{binding.Active: 7}, time.Unix(1e9, 0)})
	if got := text(); !strings.Contains(got, `kme_bindings{state="ACTIVE"} 7`) ||
		!strings.Contains(got, "kme_bindings_counted_timestamp_seconds 1e+09") {
		t.Errorf("the bindings that were counted are not there:\n%s", got)
	}
	// A CA that was renewed with the same serial: both are trusted, and the one that ends first counts.
	now := must.Get[[]byte](t)(os.ReadFile(filepath.Join(s.dir, "ca.pem")))
	block, _ := pem.Decode(now)
	renewed := must.Get[*x509.Certificate](t)(x509.ParseCertificate(block.Bytes))
	renewed.NotAfter = renewed.NotAfter.AddDate(1, 0, 0)
	key := must.Get[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	der := must.Get[[]byte](t)(x509.CreateCertificate(rand.Reader, renewed, &x509.Certificate{
		RawSubject: renewed.RawSubject}, key.Public(), key))
	both := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), now...)
	must.Do(t, os.WriteFile(filepath.Join(s.dir, "ca.pem"), both, 0o600))
	s.write(t, strings.Replace(siteBase, "client_ca: a.pem", "client_ca: ca.pem", 1)+siteClients)
	if err := s.reload(t.Context(), settings.Source{Path: s.config()}); err != nil {
		t.Fatal(err)
	}
	if got := text(); !strings.Contains(got, `{certificate="client_ca",serial="1",subject="CN=ca"} 0.04`) {
		t.Errorf("after a reload:\n%s", got)
	}
}
