// Package proof tests what the project promises about the whole of it, on its built programs: that nothing private is
// fetched from a token, that nothing secret is in a log, and that other implementations agree with ours.
package proof

import (
	"bytes"
	"context"
	"crypto"
	"crypto/aes"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/tink-crypto/tink-go/v2/kwp/subtle"

	"github.com/kmehsm/kmehsm/internal/programs"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

func TestMain(m *testing.M) {
	testproc.Main(func() int {
		dir, err := os.MkdirTemp("", "proof-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		built.dir, built.preload = dir, map[string]string{}
		return m.Run()
	})
}

// A world is a manufacturer, an operator and a lot of each suite, in a folder of its own.
type world struct {
	t                 *testing.T
	dir               string
	env               []string
	factory, operator softhsmtest.Tok
	output            bytes.Buffer // of all programs, standard output and error
	wrap              func(uri string) string
	made              int // devices
	directory         string
}

// newWorld makes the tokens. wrap changes a token's URI before programs get it; nil leaves it.
func newWorld(t *testing.T, wrap func(string) string, env ...string) *world {
	t.Helper()
	return newWorldIn(t, t.TempDir(), wrap, env...)
}

// newWorldIn is newWorld in a folder, which may have one already.
func newWorldIn(t *testing.T, dir string, wrap func(string) string, env ...string) *world {
	t.Helper()
	toks := softhsmtest.Make(t, filepath.Join(dir, "softhsm"), "factory", "operator")
	w := &world{t: t, dir: dir, factory: toks["factory"], operator: toks["operator"], wrap: wrap,
		directory: "file:directory"}
	if wrap == nil {
		w.wrap = func(uri string) string { return uri }
	}
	w.env = append(append(os.Environ(), softhsmtest.Env(filepath.Join(dir, "softhsm"))), env...)
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) command(tok softhsmtest.Tok, program string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(programs.Dir(w.t), program), args...)
	// one may still run when the next is made
	cmd.Dir, cmd.Env = w.dir, slices.Concat(w.env, []string{"KMEHSM_TOKEN=" + w.wrap(tok.URI)})
	return cmd
}

// run runs a program, which must succeed, and gives its standard output.
func (w *world) run(tok softhsmtest.Tok, program string, args ...string) string {
	w.t.Helper()
	cmd := w.command(tok, program, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	w.output.Write(stdout.Bytes())
	w.output.Write(stderr.Bytes())
	if err != nil {
		w.t.Fatalf("%s %s: %v\n%s", program, strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String()
}

// A lotOf is a lot to make.
type lotOf struct {
	name, suite, tac string
	bits, devices    int
}

// bothSuites are lots with devices of both.
var bothSuites = []lotOf{
	{"LE", "tr33868-ecdsa-p256", "35209900", 2048, 6},
	{"LR", "tr33868-rsa2048", "35209901", 3072, 2},
}

// setUp runs everything that comes before the service of these lots: the fixture's key is made in
// software, as the fixture's own.
func (w *world) setUp(lots ...lotOf) {
	w.t.Helper()
	// What each reads out to the other.
	manufacturer := field(w.t, w.run(w.factory, "factory", "init", "--json"), "manufacturer")
	w.run(w.operator, "keysvc", "init")
	transport := field(w.t, w.run(w.operator, "keysvc", "transport", "new", "--json"), "thumbprint")
	w.enrolFixture()
	w.run(w.factory, "factory", "operator", "enroll", "op", "--transport-key", "var/keysvc/transport.json",
		"--thumbprint", transport, "--so-pin-source", "file:"+w.factory.SOPINFile, "--out", "enrolment.jws")
	w.run(w.operator, "keysvc", "enroll", "enrolment.jws", "--manufacturer", "var/factory/manufacturer.pem",
		"--thumbprint", manufacturer, "--directory", w.directory)
	for _, l := range lots {
		w.makeLot(l)
		w.run(w.factory, "factory", "lot", "grant", l.name, "--directory", w.directory, "--operator", "op",
			"--out", l.name+".jws")
		w.run(w.operator, "keysvc", "lot", "import", l.name+".jws")
		w.run(w.factory, "factory", "lot", "seal", l.name, "--yes", "--directory", w.directory)
	}
	w.run(w.factory, "factory", "doctor")
	w.run(w.operator, "keysvc", "doctor")
}

// shardSize is how many devices a shard of these lots has.
const shardSize = 4

// makeLot makes a lot and its devices.
func (w *world) makeLot(l lotOf) {
	w.t.Helper()
	w.made += l.devices
	w.run(w.factory, "factory", "lot", "create", l.name, "--directory", w.directory, "--suite", l.suite,
		"--tac", l.tac, "--first", "0",
		"--count", fmt.Sprint(l.devices), "--bits", fmt.Sprint(l.bits), "--shard-size", fmt.Sprint(shardSize))
	w.run(w.factory, "factory", "lot", "provision", l.name, "--directory", w.directory, "--out", "injection")
}

// enrolFixture makes a fixture's key in software, as the fixture's own, and enrols it.
func (w *world) enrolFixture() {
	w.t.Helper()
	for _, args := range [][]string{{"genrsa", "-out", "fixture.key", "3072"},
		{"rsa", "-in", "fixture.key", "-pubout", "-out", "fixture.pem"}} {
		w.openssl(nil, args...)
	}
	w.run(w.factory, "factory", "fixture", "enroll", "f1", "--fixture-key", "fixture.pem", "--so-pin-source",
		"file:"+w.factory.SOPINFile, "--out", "fixture.json")
}

// field is one of a command's JSON document.
func field(t *testing.T, document, name string) string {
	t.Helper()
	var fields map[string]any
	if err := json.Unmarshal([]byte(document), &fields); err != nil {
		t.Fatal(err)
	}
	value, _ := fields[name].(string)
	return value
}

// openssl runs the openssl command.
func (w *world) openssl(stdin []byte, args ...string) []byte {
	w.t.Helper()
	cmd := exec.Command("openssl", args...)
	cmd.Dir, cmd.Stdin = w.dir, bytes.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		w.t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return out
}

// serve runs f while the service runs, at debug level.
func (w *world) serve(f func(client *http.Client)) {
	w.t.Helper()
	if err := os.WriteFile(w.path("keysvc.yaml"), []byte("state: var/keysvc\nsocket: s\nlog_level: debug\n"+
		"drain_delay: 0s\n"),
		0o600); err != nil {
		w.t.Fatal(err)
	}
	cmd := w.command(w.operator, "keysvc", "serve", "--config", "keysvc.yaml")
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _,
		_ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", w.path("s"))
	}}}
	service := testproc.Start(w.t, cmd, func(*testproc.Process) bool { return ready(client) })
	f(client)
	client.CloseIdleConnections()
	if err := service.Stop(syscall.SIGTERM); err != nil {
		w.t.Errorf("keysvc serve: %v\n%s", err, service.Log)
	}
	w.output.WriteString(service.Log.String())
}

// ready says whether a service is.
func ready(client *http.Client) bool {
	r, err := client.Get("http://keysvc/readyz")
	if err != nil {
		return false
	}
	r.Body.Close()
	return r.StatusCode == http.StatusOK
}

// call makes one HTTP/JSON call.
func call(t *testing.T, client *http.Client, method string, request map[string]any) map[string]any {
	t.Helper()
	body, _ := json.Marshal(request)
	r, err := client.Post("http://keysvc/kme.v1.KeyService/"+method, "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	var answer map[string]any
	if err := json.NewDecoder(r.Body).Decode(&answer); err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s %v %v", method, r.Status, answer, err)
	}
	return answer
}

// A spyLog is what a spy's log says of C_GetAttributeValue.
type spyLog struct {
	calls, asked map[string]int
	// attributes that hold keys, and for which there was room, or of which the token said a length
	fetched []string
}

// A device as another implementation sees it, from the files of the line alone.
type device struct {
	imei, lot string
	key       crypto.Signer
	pkcs8     []byte
}

// injectionKey opens the fixture's enrolment.
func (w *world) injectionKey() []byte {
	w.t.Helper()
	var enrolment struct{ Wrapped strict.Base64 }
	w.readJSON("fixture.json", &enrolment)
	block, _ := pem.Decode(w.readFile("fixture.key"))
	fixture, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		w.t.Fatal(err)
	}
	key, err := rsa.DecryptOAEP(sha1.New(), nil, fixture.(*rsa.PrivateKey), enrolment.Wrapped, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return key
}

func (w *world) readFile(name string) []byte {
	w.t.Helper()
	b, err := os.ReadFile(w.path(name))
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

func (w *world) readJSON(name string, into any) {
	w.t.Helper()
	if err := json.Unmarshal(w.readFile(name), into); err != nil {
		w.t.Fatal(err)
	}
}

type injectionLine struct {
	IMEI      string
	Lot       string
	Shard     int
	PublicKey map[string]string `json:"public_key"`
	DeviceKey struct {
		Alg, Kid string
		Wrapped  strict.Base64
	} `json:"device_key"`
}

func (w *world) lines() (all []injectionLine) {
	w.t.Helper()
	files, _ := filepath.Glob(w.path("injection/*/injection-*.jsonl"))
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			w.t.Fatal(err)
		}
		for text := range strings.SplitSeq(strings.TrimSpace(string(b)), "\n") {
			var line injectionLine
			if err := json.Unmarshal([]byte(text), &line); err != nil {
				w.t.Fatal(err)
			}
			all = append(all, line)
		}
	}
	if len(all) != w.made {
		w.t.Fatalf("%d injection lines, want %d", len(all), w.made)
	}
	return all
}

// devices unwraps every device key with Tink.
func (w *world) devices() (all []device) {
	w.t.Helper()
	kwp, err := subtle.NewKWP(w.injectionKey())
	if err != nil {
		w.t.Fatal(err)
	}
	for _, line := range w.lines() {
		pkcs8, err := kwp.Unwrap(line.DeviceKey.Wrapped)
		if err != nil {
			w.t.Fatal(err)
		}
		key, err := x509.ParsePKCS8PrivateKey(pkcs8)
		if err != nil {
			w.t.Fatal(err)
		}
		all = append(all, device{line.IMEI, line.Lot, key.(crypto.Signer), pkcs8})
	}
	return all
}

// No PIN, KME, RME or private key is in any output at debug level, nor in any file that the programs write.
func TestNothingSecretIsWritten(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	w.setUp(bothSuites...)
	secrets := map[string][]byte{
		"the factory's PIN": []byte(w.factory.PIN), "the factory's SO PIN": []byte(w.factory.SOPIN),
		"the operator's PIN": []byte(w.operator.PIN), "the operator's SO PIN": []byte(w.operator.SOPIN),
		"the injection key": w.injectionKey(),
	}
	wrong := w.path("wrong.pin")
	if err := os.WriteFile(wrong, []byte("4711-wrong-pin"), 0o600); err != nil {
		t.Fatal(err)
	}
	secrets["a wrong PIN"] = []byte("4711-wrong-pin")
	cmd := w.command(w.operator, "keysvc", "doctor", "--token",
		strings.Replace(w.operator.URI, w.operator.PINFile, wrong, 1))
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Error("a wrong PIN was taken")
	}
	w.output.Write(out)

	w.serve(func(client *http.Client) {
		for i, d := range w.devices() {
			var scalar []byte
			switch k := d.key.(type) {
			case *ecdsa.PrivateKey:
				scalar, err = k.Bytes()
				if err != nil {
					t.Fatal(err)
				}
			case *rsa.PrivateKey:
				scalar = k.Primes[0].Bytes()
			}
			secrets["the private key of "+d.imei] = scalar
			secrets["the PKCS #8 of "+d.imei] = d.pkcs8

			p := w.plaintext(d)
			secrets["the KME of "+d.imei] = bytes.Clone(p.KME.Bytes())
			secrets["the RME of "+d.imei] = bytes.Clone(p.RME.Bytes())
			payload := w.encrypt(d, p)
			imsi := fmt.Sprintf("0010100000%05d", i)
			prepared := call(t, client, "PrepareVector",
				map[string]any{"imsi": imsi, "rands": [][]byte{[]byte("what is in clear")}})
			answer := call(t, client, "EstablishKME",
				map[string]any{"imsi": imsi, "imei": d.imei, "attempt_id": prepared["attempt_id"], "payload": payload})
			want := sha256.Sum256(append(bytes.Clone(p.KME.Bytes()), p.RME.Bytes()...))
			if answer["nw_sig"] != base64.StdEncoding.EncodeToString(want[:]) || answer["state"] != "PENDING" {
				t.Errorf("NW_SIG is %v", answer)
			}
			prepared = call(t, client, "PrepareVector",
				map[string]any{"imsi": imsi, "rands": [][]byte{make([]byte, 16)}})
			if prepared["control"] != "PREPROCESSED" || fmt.Sprint(prepared["rands"]) !=
				fmt.Sprint([]string{base64.StdEncoding.EncodeToString(aesOfZero(t, p.KME.Bytes()))}) {
				t.Errorf("the next vector is %v", prepared)
			}
			if state := call(t, client, "ReportAuthentication",
				map[string]any{"imsi": imsi, "ok": true})["state"]; state != "ACTIVE" {
				t.Errorf("state %v", state)
			}
			// And one that is refused, with its cause in the log.
			bad := w.plaintext(d)
			secrets["the refused KME of "+d.imei] = bytes.Clone(bad.KME.Bytes())
			bad.Sig[20] ^= 1
			imsi = fmt.Sprintf("0010111111%05d", i)
			prepared = call(t, client, "PrepareVector",
				map[string]any{"imsi": imsi, "rands": [][]byte{[]byte("what is in clear")}})
			body, _ := json.Marshal(map[string]any{"imsi": imsi, "imei": d.imei, "attempt_id": prepared["attempt_id"],
				"payload": w.encrypt(d, bad)})
			r, err := client.Post("http://keysvc/kme.v1.KeyService/EstablishKME", "application/json",
				bytes.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			r.Body.Close()
			if r.StatusCode != http.StatusForbidden {
				t.Errorf("a bad signature: %s", r.Status)
			}
		}
	})
	if !bytes.Contains(w.output.Bytes(), []byte(`"reason":"KME_REJECTED"`)) {
		t.Error("the log does not have the refusals, so that this test sees nothing")
	}

	written := map[string][]byte{"the programs' output": w.output.Bytes()}
	err = filepath.WalkDir(w.dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || strings.HasPrefix(path, w.path("softhsm")) || path == wrong ||
			entry.Type()&(fs.ModeSocket|fs.ModeSymlink) != 0 {
			return err
		}
		written[path], err = os.ReadFile(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(written) < 10 {
		t.Errorf("only %d files were searched", len(written))
	}
	for name, secret := range secrets {
		for form, text := range forms(secret) {
			for where, data := range written {
				if bytes.Contains(data, text) {
					t.Errorf("%s is in %s, %s", name, where, form)
				}
			}
		}
	}
}

// forms are the ways in which a secret could have been written.
func forms(secret []byte) map[string][]byte {
	std := base64.RawStdEncoding.EncodeToString(secret)
	url := base64.RawURLEncoding.EncodeToString(secret)
	return map[string][]byte{
		"as it is": secret, "in hex": []byte(hex.EncodeToString(secret)),
		"in upper hex": []byte(strings.ToUpper(hex.EncodeToString(secret))), "in base64": []byte(std),
		"in base64url": []byte(url), "as Go prints bytes": []byte(strings.Trim(fmt.Sprint(secret), "[]")),
	}
}

func aesOfZero(t *testing.T, key []byte) []byte {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	out := make([]byte, aes.BlockSize)
	block.Encrypt(out, out)
	return out
}
