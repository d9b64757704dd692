package keysvcd

import (
	"log/slog"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/binding"
)

// Hashed, an IMSI is nowhere in the log, neither beside a damaged row nor in what is wrong with it; and the same is the
// same.
func TestHashedIdentities(t *testing.T) {
	var out strings.Builder
	log, err := newLog(&out, &Config{State: t.TempDir(), LogIdentities: "hashed", LogLevel: slog.LevelInfo})
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
