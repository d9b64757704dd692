package factory

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/handover"
)

// plant writes a shard's injection package with keys that the line has not made, as whoever can write to the folder
// may.
func plant(t *testing.T, m *directory.Manifest, n int, out string) (path string) {
	t.Helper()
	first, count := m.ShardRange(n)
	lines := make([]handover.InjectionLine, count)
	for i := range lines {
		key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		lines[i] = handover.NewInjectionLine(m.IMEI(first+i), m.Lot, n, key.Public(), "a1", []byte{1})
	}
	file, _, err := handover.MarshalPackage(lines...)
	path = filepath.Join(out, m.Lot, handover.InjectionFile(n))
	if err := errors.Join(err, os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, file, 0o600)); err != nil {
		t.Fatal(err)
	}
	return path
}

// A package that the line has not made is named, and neither published nor replaced: before the first run, and in the
// place of what a run that ended early has not made yet. When it has been moved away, the shard is made.
func TestPlantedPackage(t *testing.T) {
	for name, ended := range map[string]bool{"before the first run": false, "after a run that ended early": true} {
		t.Run(name, func(t *testing.T) {
			line, _, token := newLine(t)
			m, out := must(line.CreateLot(t.Context(), spec(t, "L1", 0, 12))), t.TempDir()
			if ended {
				line.token = &failing{token, 2}
				if _, err := keeping(line, out).Provision(t.Context(), "L1", options(out, 1)); err == nil {
					t.Fatal("it did not end early")
				}
				line.token = token
			}
			path := plant(t, m, 1, out)
			planted := must(os.ReadFile(path))
			for range 2 {
				_, err := keeping(line, out).Provision(t.Context(), "L1", options(out, 1))
				if err == nil || !strings.Contains(err.Error(), path) ||
					!strings.Contains(err.Error(), "move it away") {
					t.Errorf("provision: %v", err)
				}
				r := must(keeping(line, out).Reconcile(t.Context(), "L1", out, true))
				if r.Open() != 1 || r.Differences[0].Shard != 1 || r.Differences[0].Safe ||
					!strings.Contains(r.Differences[0].What, path) {
					t.Errorf("reconcile: %+v", r)
				}
			}
			if _, err := line.reader.ReadShard(t.Context(), m, 1); !errors.Is(err, directory.ErrNotFound) {
				t.Errorf("the shard was published: %v", err)
			}
			if !bytes.Equal(must(os.ReadFile(path)), planted) {
				t.Error("the file was replaced")
			}
			if err := os.Rename(path, filepath.Join(t.TempDir(), "moved")); err != nil {
				t.Fatal(err)
			}
			provision(t, line, out)
			checkLot(t, line, out)
		})
	}
}

// A package of a reissue that the line has not made is named, and neither published nor replaced.
func TestPlantedReissue(t *testing.T) {
	line, _, _ := newLine(t)
	m, out := must(line.CreateLot(t.Context(), spec(t, "L1", 0, 8))), t.TempDir()
	provision(t, line, out)
	imei := m.IMEI(5)
	path := filepath.Join(out, "L1", handover.ReissueFile(imei, 1))
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	planted, _, err := handover.MarshalPackage(handover.NewInjectionLine(imei, "L1", 1, key.Public(), "a1", []byte{1}))
	if err := errors.Join(err, os.WriteFile(path, planted, 0o600)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := line.Reissue(t.Context(), "L1", imei, "return 1", "", out); err == nil ||
			!strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "move it away") {
			t.Errorf("reissue: %v", err)
		}
		if r := must(keeping(line, out).Reconcile(t.Context(), "L1", out, true)); r.Open() != 1 ||
			!strings.Contains(r.Differences[0].What, path) {
			t.Errorf("reconcile: %+v", r)
		}
	}
	if h := must(line.reader.History(t.Context(), m, imei)); len(h) != 0 {
		t.Errorf("it was published: %+v", h)
	}
	if !bytes.Equal(must(os.ReadFile(path)), planted) {
		t.Error("the file was replaced")
	}
	if err := os.Rename(path, filepath.Join(t.TempDir(), "moved")); err != nil {
		t.Fatal(err)
	}
	if _, err := line.Reissue(t.Context(), "L1", imei, "return 1", "", out); err != nil {
		t.Error(err)
	}
}
