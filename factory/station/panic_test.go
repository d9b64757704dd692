package station

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// A panic in the work beside the requests is logged and counted, takes nothing from other work, and the work begins
// again.
func TestPanicsBeside(t *testing.T) {
	logged, injection := testproc.Logged(t), t.TempDir()
	for _, lot := range []string{"L1", "L2"} {
		if err := os.MkdirAll(filepath.Join(injection, lot), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	signer := must(directory.NewSigner(must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))))
	jws := must(signer.Sign(directory.TypeManifest, &directory.Manifest{Lot: "L1"}))
	if err := os.WriteFile(filepath.Join(injection, "L1", handover.ManifestFile), jws, 0o600); err != nil {
		t.Fatal(err)
	}
	// No manifest is verified without a verifier, no list read without a reader, nothing written without a database.
	d := &Desk{o: Options{Injection: injection, Log: slog.Default()},
		lots: map[string]*lot{"L2": {Manifest: &directory.Manifest{Lot: "L2"}}},
		out:  map[device]*handedOut{{lot: "L1"}: {}}, supply: map[string]int{}}
	d.metrics = newMetrics(d)
	for name, c := range map[string]struct {
		work func(context.Context)
		in   []string // each has panicked
	}{
		"watch": {d.watch, []string{"station.(*Desk).watch"}},
		"look":  {d.look, []string{"station.(*Desk).lot(", "station.(*Desk).published("}},
	} {
		var rounds atomic.Int32
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			d.beside(ctx, time.Millisecond, func(ctx context.Context) { rounds.Add(1); c.work(ctx) })
		}()
		testproc.Await(t, name+" begins again", func() bool { return rounds.Load() > 2 })
		cancel()
		<-done
		log := logged.String()
		for _, in := range c.in {
			if n := strings.Count(log, in); n < 2 || !strings.Contains(log, `"msg":"panic"`) {
				t.Errorf("%s: %s is in the log %d times: %.3000s", name, in, n, log)
			}
		}
	}
	if n := testutil.ToFloat64(d.metrics.panics); n < 6 {
		t.Errorf("%v panics are counted", n)
	}
}
