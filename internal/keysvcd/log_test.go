package keysvcd

import (
	"encoding/json"
	"log/slog"
	"reflect"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/api"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/keysvcd/settings"
	"github.com/kmehsm/kmehsm/internal/version"
)

// Hashed, an IMSI is nowhere in the log, neither beside a damaged row nor in what is wrong with it; and the same is the
// same.
func TestHashedIdentities(t *testing.T) {
	var out strings.Builder
	log, err := newLog(&out, &settings.Config{State: t.TempDir(), LogIdentities: "hashed", LogLevel: slog.LevelInfo})
	if err != nil {
		t.Fatal(err)
	}
	row := &binding.DamagedRow{Table: "bindings", Key: "001010000000001 active", What: "was changed"}
	log.Error("refused", "imsi", "001010000000001", "cause", row.Error())
	log.Warn("a list is overdue", "cause", "IMEI 35209900000001 is revoked twice", "imei", "35209900000001")
	text := out.String()
	if strings.Contains(text, "001010000000001") || strings.Contains(text, "35209900000001") {
		t.Error(text)
	}
	for line := range strings.Lines(text) {
		if n := strings.Count(line, strings.Split(line, `"im`)[1][5:29]); n != 2 {
			t.Errorf("the same hash is in it %d times: %s", n, line)
		}
	}
	if !strings.Contains(text, "keysvc store verify lists all that is") {
		t.Error(text)
	}
}

// The first line says what serves whom, from where, and no password.
func TestFirstLine(t *testing.T) {
	var out strings.Builder
	cfg := &settings.Config{State: t.TempDir(), Store: "postgres://keysvc:hunter2@db/keysvc?password=hunter3",
		Tokens: []string{"pkcs11:token=operator?module-path=/m&pin-source=file:/p"}, Listen: "127.0.0.1:8443",
		Clients: []api.Client{{Name: "hss-1"}}}
	log, err := newLog(&out, cfg)
	if err != nil {
		t.Fatal(err)
	}
	starting(log, cfg)
	var line map[string]any
	if err := json.Unmarshal([]byte(out.String()), &line); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"msg": "starting", "version": version.Text(), "store": "postgres://keysvc@db/keysvc",
		"tokens": []any{"pkcs11:token=operator"}, "clients": []any{"hss-1"}, "addresses": []any{"127.0.0.1:8443"}}
	for name, v := range want {
		if !reflect.DeepEqual(line[name], v) {
			t.Errorf("%s: %v, not %v", name, line[name], v)
		}
	}
	if shown := shownStore("postgres://keysvc:hunter2@a:1,b:2/keysvc"); strings.Contains(shown, "hunter2") {
		t.Error(shown)
	}
}
