package settings

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/certtest"
	"github.com/kmehsm/kmehsm/internal/config"
)

const (
	aToken  = "token: pkcs11:token=operator?module-path=/dev/null&pin-source=file:/dev/null\n"
	aSocket = "socket: s\n"
	good    = aSocket + aToken
)

func read(t *testing.T, text string) (*Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keysvc.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, report := Read(Source{Path: path})
	return c, report.Err()
}

var line = regexp.MustCompile("^line [0-9]+: |^")

// A setting that is refused is named, with what it is and what it may be.
func TestConfigRefused(t *testing.T) {
	const tlsOf = "tls: {certificate: a, key: b, client_ca: c}\n"
	const some = "clients: [{name: x, san: y, roles: [eir], plmns: [all]}]\n"
	const eir = good + tlsOf + some + "eir: {listen: 'h:1', "
	const client = "clients: [{name: x, san: y, roles: [hss], plmns: [all], "
	var refused strings.Builder
	for _, c := range []struct{ setting, text, want string }{
		{"token", aSocket + "token: hunter2\n", `token: the token's URI is not one of RFC 7512`},
		{"token missing", aSocket, `token: no token`},
		{"token as a list", aSocket + "token: [a]\n", `token: must be a text, not what is there`},
		{"tokens", aSocket + "tokens: [x]\n", `tokens: the token's URI is not one of RFC 7512`},
		{"tokens beside a token", good + "tokens: [x]\n",
			`line 3: tokens: the token's URI is not one of RFC 7512`},
		{"tokens as a text", aSocket + "tokens: pkcs11:token=x?pin-value=hunter2\n",
			`line 2: tokens: must be a list of texts, not what is there`},
		{"state", good + "state: {}\n", `state: must be a text, not "a mapping"`},
		{"directory", good + "directory: /srv\n", `directory: must be file:DIR or vault:MOUNT, not "/srv"`},
		{"listen", aToken + tlsOf + some + "listen: localhost\n",
			`listen: must be HOST:PORT, with a port from 0 to 65535, not "localhost"`},
		{"listen at no port", aToken + tlsOf + some + "listen: 127.0.0.1:99999\n",
			`line 4: listen: must be HOST:PORT`},
		{"listen nowhere", good + "listen: ''\n", `line 3: listen: it is empty: give it a value, or take it out`},
		{"listen at nothing", good + "listen:\n", `line 3: listen: it is empty`},
		{"listen twice", aToken + tlsOf + some + "listen: ':1'\noperator_page: {listen: 'localhost:1'}\n",
			`line 5: operator_page.listen: localhost:1 and listen :1 are one address: choose another port`},
		{"listen and eir", aToken + tlsOf + some + "listen: '[::1]:1'\neir: {listen: '[::1]:1'}\n",
			`line 5: eir.listen: [::1]:1 and listen [::1]:1 are one address`},
		{"operator_page of nothing", good + tlsOf + some + "operator_page: {}\n",
			`operator_page: must be {listen: HOST:PORT}`},
		{"state empty", good + "state: ''\n", `line 3: state: it is empty`},
		{"tls.key empty", good + "tls: {key: ''}\n", `line 3: tls.key: it is empty`},
		{"a client's name empty", good + "clients: [{name: '', san: y, roles: [hss], plmns: [all]}]\n",
			`line 3: clients[0].name: it is empty`},
		{"otlp at no port", good + "otlp: http://h:65536\n", `otlp: must be http://HOST:PORT`},
		{"otlp without host", good + "otlp: http://:4318\n", `otlp: must be http://HOST:PORT`},
		{"tls missing", aToken + "listen: localhost:1\n",
			`tls: listen needs tls with certificate, key and client_ca`},
		{"tls without key", aToken + some + "listen: localhost:1\ntls: {certificate: a, client_ca: c}\n",
			`tls: listen needs tls with certificate, key and client_ca`},
		{"listen without clients", aToken + tlsOf + "listen: localhost:1\n",
			`clients: listen needs clients, who may call: clients: ` +
				`[{name: hss-1, san: hss-1.example, roles: [hss], plmns: ["00101"]}]`},
		{"listen and socket without clients", good + tlsOf + "listen: localhost:1\n",
			`clients: listen needs clients`},
		{"listen with an empty list of clients", aToken + tlsOf + "listen: localhost:1\nclients: []\n",
			`clients: listen needs clients`},
		{"tls of nothing known", aToken + some + "listen: localhost:1\ntls: {cert: a}\n",
			`tls.cert: there is no such setting`},
		{"tls as a text", aToken + some + "listen: localhost:1\ntls: a\n",
			`tls: there must be settings, each as key: value`},
		{"tls.key", aToken + some + "listen: localhost:1\ntls: {key: [a]}\n",
			`tls.key: must be a text, not "a list"`},
		{"eir without tls", good + "eir: {listen: localhost:1}\n", `eir: it needs tls with certificate`},
		{"eir without clients", good + tlsOf + "eir: {listen: localhost:1}\n",
			`eir: it needs tls with certificate`},
		{"eir.listen", good + "eir: {listen: localhost}\n",
			`eir.listen: must be HOST:PORT, with a port from 0 to 65535, not "localhost"`},
		{"eir.listen missing", good + tlsOf + some + "eir: {token_key: k}\n",
			`eir.listen: it is missing: it says where to serve`},
		{"eir.instance", eir + "instance: X}\n",
			`eir.instance: must be a UUID in lower case, as uuidgen makes one, not "X"`},
		{"eir.nrf", eir + "nrf: http://nrf}\n", `eir.nrf: must be https://HOST:PORT, not "http://nrf"`},
		{"eir.nrf at no port", eir + "nrf: 'https://nrf:70000'}\n", `eir.nrf: must be https://HOST:PORT`},
		{"eir.advertise", eir + "advertise: ':1'}\n",
			`eir.advertise: must be HOST:PORT, with a port from 1 to 65535, not ":1"`},
		{"eir.nrf without more", eir + "nrf: https://nrf}\n", `eir: registration at an NRF needs eir.instance and`},
		{"eir.advertise alone", eir + "advertise: 'h:1'}\n", `eir: nrf_ca and advertise are for registration`},
		{"socket", aToken + "socket: /" + strings.Repeat("s", 107) + "\n",
			`socket: must be a path of 107 bytes at most, not "/sss`},
		{"neither", aToken, `listen: neither listen nor socket says where to serve`},
		{"store", good + "store: mysql://u:hunter2@h/d\n",
			`store: must be sqlite:PATH or postgres://USER@HOST/DATABASE, not what is there`},
		{"attempt_ttl", good + "attempt_ttl: 0s\n", `attempt_ttl: must be a time above zero, such as 5m, not "0s"`},
		{"attempt_ttl without unit", good + "attempt_ttl: 5\n",
			`attempt_ttl: must be a time above zero, such as 5m, not "5"`},
		{"pending_ttl", good + "pending_ttl: 0s\n", `pending_ttl: must be a time above zero, such as 1h, not "0s"`},
		{"pending_vectors", good + "pending_vectors: 0\n",
			`pending_vectors: must be a whole number above zero, not "0"`},
		{"drain_delay", good + "drain_delay: -1s\n", `drain_delay: must be 0s or more, such as 10s, not "-1s"`},
		{"revocation_ttl", good + "revocation_ttl: -1m\n",
			`revocation_ttl: must be a time above zero, such as 1m, not "-1m0s"`},
		{"max_revocation_age", good + "max_revocation_age: -1h\n",
			`max_revocation_age: must be 0s, or a time of more than twice revocation_ttl, such as 72h, not "-1h0m0s"`},
		{"max_revocation_age between two reads", good + "max_revocation_age: 90s\n",
			`max_revocation_age: must be 0s, or a time of more than twice`},
		{"hsm_timeout", good + "hsm_timeout: soon\n",
			`hsm_timeout: must be a time above zero and up to 1m, such as 5s, not "soon"`},
		{"hsm_timeout of none", good + "hsm_timeout: 0s\n",
			`hsm_timeout: must be a time above zero and up to 1m, such as 5s, not "0s"`},
		{"hsm_timeout too long", good + "hsm_timeout: 61s\n",
			`hsm_timeout: must be a time above zero and up to 1m, such as 5s, not "1m1s"`},
		{"connections", good + "connections: 0\n", `connections: must be a whole number above zero, not "0"`},
		{"calls", good + "calls: -1\n", `calls: must be a whole number, or 0 for 32 of each session, not "-1"`},
		{"calls as a text", good + "calls: many\n",
			`calls: must be a whole number, or 0 for 32 of each session, not "many"`},
		{"imei_rate", good + "imei_rate: 0\n", `imei_rate: must be a number above zero, not "0"`},
		{"imei_rate of no number", good + "imei_rate: .nan\n", `imei_rate: must be a number above zero, not "NaN"`},
		{"imei_rate without end", good + "imei_rate: .inf\n", `imei_rate: must be a number above zero, not "+Inf"`},
		{"imei_burst", good + "imei_burst: 0\n", `imei_burst: must be a whole number above zero, not "0"`},
		{"imei_burst of a half", good + "imei_burst: 1.5\n",
			`imei_burst: must be a whole number above zero, not "1.5"`},
		{"verify", good + "verify: never\n", `verify: must be token or software, not "never"`},
		{"cache_mb", good + "cache_mb: 0\n", `cache_mb: must be a whole number from 1 to 1048576, not "0"`},
		{"cache_mb above all memory", good + "cache_mb: 8796093022208\n",
			`cache_mb: must be a whole number from 1 to 1048576, not "8796093022208"`},
		{"log_level", good + "log_level: loud\n", `log_level: must be debug, info, warn or error, not "loud"`},
		{"log_identities", good + "log_identities: none\n", `log_identities: must be plain or hashed, not "none"`},
		{"otlp", good + "otlp: localhost:4318\n",
			`otlp: must be http://HOST:PORT or https://HOST:PORT, not what is there`},
		{"otlp with a password", good + "otlp: ftp://u:hunter2@h\n", `otlp: must be http://HOST:PORT`},
		{"vault", good + "vault: {role_id: x}\n", `vault: AppRole needs a role id and a file with the secret id`},
		{"vault twice", good + "vault: {role_id: x, secret_id_file: f, cert_role: y}\n",
			`vault: log in to Vault by AppRole or by certificate, not both`},
		{"vault.secret_id_wrapped alone", good + "vault: {secret_id_wrapped: true}\n",
			`vault: only an AppRole's secret id can be wrapped`},
		{"vault.secret_id_wrapped", good + "vault: {secret_id_wrapped: maybe}\n",
			`vault.secret_id_wrapped: must be true or false, not "maybe"`},
		{"clients as a text", good + "clients: all\n", `clients: must be a list of mappings, not "all"`},
		{"clients as a mapping", good + "clients: {a: {roles: [hss]}}\n",
			`clients: must be a list of mappings, not "a mapping"`},
		{"clients of texts", good + "clients: [x]\n", `clients[0]: there must be settings`},
		{"a client's rate", good + client + "rate: -1}]\n",
			`clients[0]: client "x": rate is a number of calls a second, or 0 for no limit, not -1`},
		{"a client's rate as a text", good + client + "rate: fast}]\n",
			`clients[0].rate: must be a number, not "fast"`},
		{"a client's provision_from as a text", good + client + "provision_from: home}]\n",
			`line 3: clients[0].provision_from: must be a list of texts, not "home"`},
		{"a client's provision_from", good + client + "provision_from: ['*']}]\n",
			`clients[0]: client "x": provision_from has "*", which is none of home, any, `},
		{"a client's uid", good + "clients: [{name: x, uid: -1, roles: [hss], plmns: [all]}]\n",
			`clients[0]: client "x": uid is a number from 0 to 4294967294, not -1`},
		{"a client's uid that nobody has", good + "clients: [{name: x, uid: 4294967295, roles: [hss], plmns: [all]}]\n",
			`clients[0]: client "x": uid is a number from 0 to 4294967294, not 4294967295`},
		{"a client's uid as a text", good + "clients: [{name: x, uid: root}]\n",
			`clients[0].uid: must be a whole number, not "root"`},
		{"a client's roles", good + "clients: [{name: x, san: y, roles: [root], plmns: [all]}]\n",
			`clients[0]: client "x": roles has "root", which is none of hss, eir, admin, `},
		{"a client's plmns", good + "clients: [{name: x, san: y, roles: [hss], plmns: [001]}]\n",
			`clients[0]: client "x": plmns has "001", which is neither all nor a PLMN: MCC and MNC, 5 or 6 digits`},
		{"equipment.lists", good + "equipment: {lists: never}\n",
			`equipment.lists: must be first or last, not "never"`},
		{"equipment.other_device", good + "equipment: {other_device: unknown}\n",
			`equipment.other_device: must be whitelisted, greylisted or blacklisted, not "unknown"`},
		{"equipment.other_subscription", good + "equipment: {other_subscription: unknown}\n",
			`equipment.other_subscription: must be whitelisted, greylisted or blacklisted, not "unknown"`},
		{"equipment.not_in_lot", good + "equipment: {not_in_lot: red}\n",
			`equipment.not_in_lot: must be whitelisted, greylisted, blacklisted or unknown, not "red"`},
		{"equipment.history", good + "equipment: {history: 5m}\n",
			`equipment.history: must be 0s, or a time from 1h on, not "5m0s"`},
		{"equipment.history_rows", good + "equipment: {history_rows: 0}\n",
			`equipment.history_rows: must be a whole number above zero, not "0"`},
		{"a webhook without url", good + "equipment: {webhook: {secret_file: f}}\n",
			`equipment.webhook.url: a webhook's address is https://HOST/PATH`},
		{"a webhook without secret", good + "equipment: {webhook: {url: 'https://h/'}}\n",
			`equipment.webhook.secret_file: it is missing`},
		{"a webhook in clear", good + "equipment: {webhook: {url: 'http://h/', secret_file: f}}\n",
			`equipment.webhook.url: a webhook's address is https://HOST/PATH`},
		{"a webhook without history", good + "equipment: {history: 0s, webhook: {url: 'https://h/', secret_file: f}}\n",
			`equipment.history: equipment.webhook needs it`},
		{"a client's setting", good + client + "limit: 1}]\n", `clients[0].limit: there is no such setting`},
		{"unknown", good + "listne: x\n", `line 3: listne: there is no such setting`},
		{"empty", good + "'': x\n", `line 3: there is no such setting`},
		{"twice", good + aSocket, `line 3: socket: it is there twice`},
		{"after ---", good + "---\ncalls: 5\n", `there is a second document`},
		{"no mapping", "- socket\n", `line 1: there must be settings, each as key: value`},
		{"no YAML", "socket: [\n", `yaml: line`},
	} {
		t.Run(c.setting, func(t *testing.T) {
			got, err := read(t, c.text)
			if err == nil {
				t.Fatalf("accepted: %+v", got)
			}
			_, printed, _ := strings.Cut(err.Error(), "keysvc.yaml: ")
			place := line.FindString(printed)
			if strings.HasPrefix(c.want, "line ") {
				place = ""
			}
			if !strings.HasPrefix(printed, place+c.want) || strings.Contains(printed, "hunter2") ||
				strings.Count(printed, "line ") > 1 {
				t.Errorf("%v\ndoes not say %s", err, c.want)
			}
		})
		refused.WriteString(c.want + "\n")
	}
	for _, s := range schema.Settings {
		rule := regexp.MustCompile(`(?m)^(line \d+: )?` + regexp.QuoteMeta(s.Name) + ": must be ")
		if s.Rule != "" && !rule.MatchString(refused.String()) {
			t.Errorf("%s is refused by no case", s.Name)
		}
	}
}

// Of several that are wrong in the same way, all are named.
func TestAllRefused(t *testing.T) {
	_, err := read(t, `socket: s
tokens: [hunter2, "pkcs11:token=x?module-path=/dev/null&pin-source=file:/dev/null", hunter2]
clients:
  - {name: a, san: x, roles: [root, hss, boss], plmns: [1]}
  - {name: b, san: x, uid: 1, roles: [hss], plmns: [all], rate: fast}
  - {name: c, roles: []}
  - {name: d, san: y, roles: [hss], plmns: [all]}
  - {name: e, san: y, roles: [hss], plmns: [all]}
eir: {nrf: "http://nrf", instance: X}
equipment: {lists: never, history: 0s, webhook: {url: "http://h/"}}
`)
	for _, want := range []string{
		"line 2: tokens: ", "line 2: tokens: ", `line 4: clients[0]: client "a": roles has "root"`,
		`line 4: clients[0]: client "a": roles has "boss"`, `line 4: clients[0]: client "a": plmns has "1"`,
		"line 5: clients[1].rate: must be a number", `line 6: clients[2]: client "c": it has either a san or a uid`,
		`line 6: clients[2]: client "c": it has no roles`, `line 6: clients[2]: client "c": it has no plmns`,
		`line 8: clients[4]: client "e": another client has the same san or uid`, "line 9: eir.nrf: must be",
		"line 9: eir.instance: must be", "line 10: equipment.lists: must be",
	} {
		before, after, found := strings.Cut(fmt.Sprint(err), want)
		if err = errors.New(before + after); !found {
			t.Errorf("%s is not in %v", want, err)
		}
	}
	if n := strings.Count(err.Error(), "keysvc.yaml: "); n != 13 {
		t.Errorf("%d problems: %v", n, err)
	}
	_, err = read(t, good+"equipment: {history: 0s, webhook: {url: 'http://h/'}}\n")
	if n := strings.Count(fmt.Sprint(err), "equipment.webhook"); n < 3 {
		t.Errorf("a webhook that has nothing: %v", err)
	}
}

// A token of the environment takes the place of all tokens of the file, and that is told.
func TestTokenOfTheEnvironment(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keysvc.yaml")
	if err := os.WriteFile(path, []byte(aSocket+"tokens: [a, b]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, r := Read(Source{Path: path, Given: config.Given{"token": {strings.TrimSpace(aToken[len("token: "):])}}})
	if len(c.Tokens) != 1 || len(r.Problems()) != 1 || r.Err() != nil ||
		!strings.Contains(r.Problems()[0].What, "the tokens of the file are not used") {
		t.Errorf("%q, %v", c.Tokens, r.Problems())
	}
}

// Files and folders that are not what serve needs, each with its setting's name.
func TestCheckPlaces(t *testing.T) {
	t.Setenv("VAULT_ADDR", "http://vault.example:8200")
	dir := certtest.Make(t, "a")
	for name, text := range map[string]string{"file": "x", "secret": "whsec_short"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	const secure = "tls: {certificate: a.pem, key: a.key, client_ca: ca.pem}\n" +
		"clients: [{name: x, san: y, roles: [eir], plmns: [all]}]\n"
	const nrf = aSocket + secure + "eir: {listen: ':0', instance: 5e0b0ba0-1c26-4d5a-8a2c-36d4f2a2a001, " +
		"nrf: https://nrf, advertise: 'e:1', "
	const webhook = aSocket + "equipment: {webhook: {url: 'https://h', "
	for _, c := range [][2]string{ // the configuration, and a problem of it
		{aSocket, ""},
		{nrf + "nrf_ca: ca.pem}", ""},
		{"socket: folder", "socket: "},
		{"socket: file", "socket: "},
		{"socket: link", "socket: "},
		{"socket: link/s", "socket: the folder of the socket: "},
		{"socket: none/none/s", "socket: the folder of the socket: "},
		{"socket: file/s", "socket: the folder of the socket: "},
		{aSocket + "store: sqlite:.", "store: "},
		{aSocket + "store: sqlite:file/keysvc.db", "store: the database"},
		{aSocket + "state: file\nstore: postgres://u@127.0.0.1:1/d", "state: "},
		{aSocket + "state: file", "state: " + dir + "/file is a file: "},
		{aSocket + "state: file/keysvc", "state: the database " + dir + "/file/keysvc/keysvc.db cannot be made: "},
		{aSocket + "audit_log: file", "audit_log: the folder of the audit log "},
		{aSocket + "audit_log: none/none", "warning audit_log: the folder of "},
		{aSocket + "directory: file:file", "directory: "},
		{aSocket + "listen: ':0'\n" + strings.Replace(secure, "a.key", "folder", 1), "tls.key: "},
		{aSocket + "listen: ':0'\n" + strings.Replace(secure, "a.pem", "folder", 1), "tls.certificate: "},
		{aSocket + "listen: ':0'\n" + strings.Replace(secure, "ca.pem", "a.key", 1), "tls.client_ca: "},
		{nrf + "nrf_ca: a.key}", "eir.nrf_ca: the NRF's CA "},
		{nrf + "token_key: folder}", "eir.token_key: "},
		{webhook + "secret_file: secret}}", "equipment.webhook.secret_file: "},
		{webhook + "secret_file: folder}}", "equipment.webhook.secret_file: "},
		{webhook + "secret_file: secret, ca: a.key}}", "equipment.webhook.ca: "},
		{aSocket + "vault: {role_id: x, secret_id_file: folder}", "vault.secret_id_file: "},
		{aSocket + "directory: vault:kme", "directory: the environment for Vault: whoever is on the way to "},
	} {
		text, want := c[0], c[1]
		path := filepath.Join(dir, "keysvc.yaml")
		if !strings.Contains(text, "state:") {
			text += "\nstate: ."
		}
		if err := os.WriteFile(path, []byte(text+"\n"+aToken), 0o600); err != nil {
			t.Fatal(err)
		}
		found := want == ""
		for _, p := range Check(t.Context(), Source{Path: path}, false).Problems() {
			text := strings.TrimPrefix(p.String(), line.FindString(p.String()))
			if p.Line == 0 {
				t.Errorf("%s: of no setting there: %s", c[0], p)
			}
			if p.Warning {
				text = "warning " + text
			}
			if p.Setting != "token" && !strings.Contains(text, "there is no store") {
				found = want != "" && (found || strings.HasPrefix(text, want))
			}
		}
		if !found {
			t.Errorf("%s: want %q: %v", text, want, Check(t.Context(), Source{Path: path}, false).Problems())
		}
	}
}

// Every setting is read, and the help has it.
func TestConfig(t *testing.T) {
	c, err := read(t, `
tokens: [&t "pkcs11:token=operator?module-path=/dev/null", *t]
token: unused
state: s
directory: vault:kme
listen: 127.0.0.1:0
tls: {certificate: a, key: b, client_ca: c}
eir: {listen: 127.0.0.1:0, token_key: k, instance: 5e0b0ba0-1c26-4d5a-8a2c-36d4f2a2a001, nrf: https://nrf,
  nrf_ca: d, advertise: e:1}
socket: s
operator_page: {listen: 127.0.0.1:0}
clients: [{name: x, san: y, roles: [hss], plmns: ["00101"], rate: 1.5}, {name: z, uid: 0, roles: [admin], plmns: [all]}]
store: postgres://keysvc@db/keysvc
audit_log: audit
attempt_ttl: 1m
pending_ttl: 3m
pending_vectors: 8
revocation_ttl: 2m
max_revocation_age: 72h
connections: 9
calls: 3
imei_rate: 4.5
imei_burst: 5
verify: software
hsm_timeout: 6s
drain_delay: 8s
cache_mb: 7
vault: {role_id: i, secret_id_file: f, secret_id_wrapped: true}
otlp: http://127.0.0.1:4318
log_identities: hashed
log_level: warn
equipment: {lists: last, other_device: greylisted, not_in_lot: unknown, history: 1h,
  webhook: {url: "https://h/", secret_file: f}}
`)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Tokens) != 2 || c.Tokens[1] != c.Tokens[0] || c.AttemptTTL != time.Minute ||
		c.PendingTTL != 3*time.Minute || c.PendingVectors != 8 || c.MaxRevocationAge != 72*time.Hour ||
		c.LogLevel != slog.LevelWarn ||
		*c.Equipment.Policy() != (binding.EquipmentPolicy{ListsLast: true, OtherDevice: binding.Greylisted,
			OtherSubscription: binding.Greylisted, NotInLot: binding.Unknown}) || c.Equipment.History != time.Hour ||
		!filepath.IsAbs(c.Equipment.Webhook.SecretFile) || !filepath.IsAbs(c.AuditLog) ||
		c.Clients[0].PLMNs[0] != "00101" || *c.Clients[1].UID != 0 || !c.Vault.SecretIDWrapped {
		t.Errorf("%+v", c)
	}
	for _, f := range reflect.VisibleFields(reflect.TypeFor[Config]()) {
		if key := f.Tag.Get("yaml"); !strings.Contains(Help(), "\n    "+key+":") {
			t.Errorf("the help has no %s", key)
		} else if v := reflect.ValueOf(c).Elem().FieldByIndex(f.Index); v.IsZero() {
			t.Errorf("%s was not read", key)
		}
	}
	if c, err = read(t, good); err != nil {
		t.Fatal(err)
	}
	times, want := c.Times(), binding.DefaultTimes()
	times.Now, want.Now = nil, nil // functions are not compared
	if !reflect.DeepEqual(times, want) || c.CacheMB != 64 || c.Verify != "token" || c.LogLevel != slog.LevelInfo ||
		filepath.Base(c.State) != "keysvc" {
		t.Errorf("the defaults: %+v", c)
	}
	if *c.Equipment.Policy() != binding.DefaultEquipmentPolicy() || c.Equipment.History != 9600*time.Hour {
		t.Errorf("the defaults: %+v", c.Equipment)
	}
	for _, s := range schema.Settings {
		if !strings.HasPrefix(s.Name, " ") && !slices.ContainsFunc(reflect.VisibleFields(reflect.TypeFor[Config]()),
			func(f reflect.StructField) bool { return f.Tag.Get("yaml") == strings.Split(s.Name, ".")[0] }) {
			t.Errorf("%s is no setting", s.Name)
		}
	}
}

// The page needs what the API over TCP needs, and is refused without.
func TestOperatorPageNeedsTLS(t *testing.T) {
	for _, text := range []string{
		"socket: s\noperator_page: {listen: 127.0.0.1:0}\n",
		"socket: s\noperator_page: {listen: 127.0.0.1:0}\ntls: {certificate: a, key: b, client_ca: c}\n",
		"socket: s\noperator_page: {listen: nowhere}\ntls: {certificate: a, key: b, client_ca: c}\n" +
			"clients: [{name: hss-1, san: hss.example, roles: [hss], plmns: [all]}]\n",
		"socket: s\noperator_page: {port: 1}\n",
	} {
		if _, err := read(t, aToken+text); err == nil || !strings.Contains(err.Error(), "operator_page") {
			t.Errorf("%q: %v", text, err)
		}
	}
}
