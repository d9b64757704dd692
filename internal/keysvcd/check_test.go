package keysvcd

import (
	"bytes"
	"database/sql"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/certtest"
	"github.com/kmehsm/kmehsm/internal/keysvcd/settings"
)

// Check says all at once what serve would stumble over, one after the other.
func TestCheck(t *testing.T) {
	dir := certtest.Make(t, "a", "m")
	write := func(name, text string, mode os.FileMode) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	pin := write("pin", "swordfish", 0o644)
	path := write("keysvc.yaml", fmt.Sprintf(`token: pkcs11:token=operator?module-path=/dev/null&pin-source=file:%s
store: postgres://keysvc:hunter2@db/keysvc
listen: %s
tls: {certificate: a.pem, key: m.key, client_ca: nope.pem}
socket: s
clients: [{name: x, san: y, roles: [hss], plmns: [all]}]
pending_ttl: 60
vault: {role_id: i, secret_id_file: none}
directory: file:away
drain_delay: 15s
`, pin, l.Addr()), 0o644)
	problems := func(running bool) (all []string) {
		for _, p := range settings.Check(t.Context(), settings.Source{Path: path}, running).Problems() {
			all = append(all, p.String())
		}
		return all
	}
	all := problems(false)
	want := []string{
		"line 1: token: the PIN file " + pin + " is open to every user",
		"line 2: store: the configuration, with the store's password in it, " + path + " is open to every user",
		"line 3: listen: " + l.Addr().String() + " is in use (ss -ltnp shows by whom)",
		"line 4: tls.key: the key " + dir + "/m.key is not that of the server's certificate " + dir + "/a.pem",
		"line 4: tls.client_ca: the clients' CA " + dir + "/nope.pem cannot be read: no such file or directory",
		"line 5: socket: another process serves " + dir + "/s",
		`line 7: pending_ttl: must be a time above zero, such as 1h, not "60": it has no unit: write 60s, 60m or 60h`,
		"line 8: vault.secret_id_file: the AppRole's secret id " + dir + "/none cannot be read",
		"line 9: directory: the public-key directory " + dir + "/away cannot be opened",
		"line 10: drain_delay: 15s and up to 30s for the calls under way: keysvc.service kills after 45s",
	}
	if len(all) != len(want) {
		t.Errorf("%d problems, want %d", len(all), len(want))
	}
	for i, w := range want {
		if i >= len(all) || !strings.HasPrefix(all[i], w) {
			t.Errorf("problem %d is not %q in\n%s", i, w, strings.Join(all, "\n"))
		}
	}
	for _, i := range []int{2, 5} {
		if !strings.HasSuffix(all[i], "if that is this configuration's own service, check with --running") {
			t.Errorf("%s does not say what to do if that is the service", all[i])
		}
	}
	if text := strings.Join(all, "\n"); strings.Contains(text, "hunter2") || strings.Contains(text, "swordfish") {
		t.Errorf("a secret is shown: %s", text)
	}
	if n := len(problems(true)); n != len(want)-2 {
		t.Errorf("while the service runs: %d problems", n)
	}
	// serve refuses the same, and before it touches the token.
	err = Serve(t.Context(), settings.Source{Path: path}, new(strings.Builder))
	// Ports come later, and two are warnings.
	if err == nil || strings.Count(err.Error(), path+": line ") != len(want)-4 {
		t.Errorf("serve: %v", err)
	}
	unit, err := os.ReadFile("../../deploy/keysvc.service")
	line := fmt.Sprintf("\nTimeoutStopSec=%gs\n", settings.StopTimeout.Seconds())
	if err != nil || !strings.Contains(string(unit), line) {
		t.Errorf("keysvc.service does not have TimeoutStopSec of %s (%v)", settings.StopTimeout, err)
	}
}

// Check looks at the store's schema, and leaves the store as it is.
func TestCheckStore(t *testing.T) {
	dir := t.TempDir()
	path, file := filepath.Join(dir, "keysvc.yaml"), filepath.Join(dir, "keysvc.db")
	text := "token: pkcs11:token=operator?module-path=/dev/null&pin-value=1\nstate: .\nsocket: s\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	check := func(want string, warning bool) {
		t.Helper()
		for _, p := range settings.Check(t.Context(), settings.Source{Path: path}, false).Problems() {
			if p.Setting == "state" && strings.Contains(p.What, want) && p.Warning == warning {
				return
			}
		}
		t.Errorf("%q is not among %v", want, settings.Check(t.Context(), settings.Source{Path: path}, false).Problems())
	}
	check("there is no store at "+file, true)
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	check("there is no store at "+file, true)
	if info, err := os.Stat(file); err != nil || info.Size() != 0 {
		t.Errorf("%v, %v", info, err)
	}
	db, err := sql.Open("sqlite3", file)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec("CREATE TABLE t (n INTEGER); PRAGMA user_version = 99099"); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	check("its schema has version 99", false)
	if after, err := os.ReadFile(file); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the store was changed (%v)", err)
	}
}
