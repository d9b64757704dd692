package mesim

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/handover"
	"github.com/kmehsm/kmehsm/kme"
)

func TestDevices(t *testing.T) {
	l := newLine(t, 4)
	f := must[*Fleet](t)(l.open())
	some := must[[]*Device](t)(f.Devices(t.Context(), 1, 2))
	if len(some) != 2 || some[0].IMEI.String() != "35209900000001" || some[0].Lot() != "L1" {
		t.Errorf("%+v", some)
	}
	for _, c := range []struct{ first, count int }{{4, 0}, {3, 2}, {0, 5}} {
		if all, err := f.Devices(t.Context(), c.first, c.count); err == nil ||
			!strings.Contains(err.Error(), "there are only") || !strings.Contains(err.Error(), "the folder has 4,") {
			t.Errorf("from %d on, %d: %v, %v", c.first, c.count, all, err)
		}
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if all, err := f.Devices(ended, 0, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, %v", all, err)
	}
	imei := some[1].IMEI
	if d := must[*Device](t)(f.Find(imei)); !d.key.Public().(*ecdsa.PublicKey).Equal(l.devices[imei]) {
		t.Error("another device's key was found")
	}
	if d, err := f.Find(must[kme.IMEI](t)(kme.ParseIMEI("35209900000009"))); err == nil {
		t.Errorf("a device of no package: %+v", d)
	}

	// A device that came back has the key that it was issued last.
	file := filepath.Join(l.dir, "L1", "injection-000000.jsonl")
	lines := bytes.SplitAfter(must[[]byte](t)(os.ReadFile(file)), []byte("\n"))
	other := newLine(t, 4)
	otherLines := bytes.SplitAfter(
		must[[]byte](t)(os.ReadFile(filepath.Join(other.dir, "L1", "injection-000000.jsonl"))), []byte("\n"))
	l.write(t, "L1/"+handover.ReissueFile(imei, 1), otherLines[2])
	if _, err := f.Find(imei); err == nil || !strings.Contains(err.Error(), "does not unwrap") {
		t.Errorf("the package of its own was not read: %v", err)
	}
	l.write(t, "L1/"+handover.ReissueFile(imei, 1), lines[1])
	if _, err := f.Find(imei); err == nil || !strings.Contains(err.Error(), "bring back the file") {
		t.Errorf("a package of another device: %v", err)
	}
}

// What does not belong together, or is damaged, is no device.
func TestFleetRefused(t *testing.T) {
	file := "L1/injection-000000.jsonl"
	other := newLine(t, 1)
	for name, c := range map[string]struct {
		spoil func(l *line, read func(string) []byte, write func(string, []byte))
		want  string
	}{
		"no fixture key": {func(l *line, _ func(string) []byte, _ func(string, []byte)) {
			l.fixtureKey += "x"
		}, "no such file"},
		"a fixture key of no PEM": {func(_ *line, _ func(string) []byte, write func(string, []byte)) {
			write("fixture.key", []byte("x"))
		}, "no PEM"},
		"another's fixture key": {func(l *line, _ func(string) []byte, _ func(string, []byte)) {
			l.fixtureKey = other.fixtureKey
		}, "do not belong together"},
		"a public key": {func(_ *line, _ func(string) []byte, write func(string, []byte)) {
			write("fixture.key", []byte("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"))
		}, "no private key"},
		"another's manifest": {func(_ *line, _ func(string) []byte, write func(string, []byte)) {
			write("L1/manifest.jws", must[[]byte](t)(os.ReadFile(filepath.Join(other.dir, "L1", "manifest.jws"))))
		}, "manifest.jws"},
		"no manifest": {func(l *line, _ func(string) []byte, _ func(string, []byte)) {
			os.Remove(filepath.Join(l.dir, "L1", "manifest.jws"))
		}, "has no manifest.jws"},
		"no package": {func(l *line, _ func(string) []byte, _ func(string, []byte)) {
			os.Remove(filepath.Join(l.dir, file))
		}, "no injection package"},
		"another injection key": {func(_ *line, read func(string) []byte, write func(string, []byte)) {
			write(file, bytes.Replace(read(file), []byte(injectionKeyID), []byte("4567"), 1))
		}, "was not enrolled with"},
		"another's private key": {func(_ *line, read func(string) []byte, write func(string, []byte)) {
			lines := bytes.SplitAfter(read(file), []byte("\n"))
			first, second := firstLine(t, lines[0]), firstLine(t, lines[1])
			first.DeviceKey = second.DeviceKey
			out, _, err := handover.MarshalPackage(first)
			if err != nil {
				t.Fatal(err)
			}
			write(file, out)
		}, "not that of its public key"},
		"a damaged line": {func(_ *line, read func(string) []byte, write func(string, []byte)) {
			write(file, read(file)[:100])
		}, file},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLine(t, 2)
			c.spoil(l, func(name string) []byte { return must[[]byte](t)(os.ReadFile(filepath.Join(l.dir, name))) },
				func(name string, data []byte) { l.write(t, name, data) })
			f, err := l.open()
			if err == nil {
				_, err = f.Devices(t.Context(), 0, 0)
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

func firstLine(t *testing.T, data []byte) handover.InjectionLine {
	t.Helper()
	for line, err := range handover.ReadInjection(bytes.NewReader(data)) {
		return must[handover.InjectionLine](t)(line, err)
	}
	t.Fatal("no line")
	return handover.InjectionLine{}
}
