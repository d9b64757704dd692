package proof

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/programs"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// slotDaemon starts openCryptoki's daemon, unless one is running, and ends it with the test.
func slotDaemon(t *testing.T) {
	t.Helper()
	pid, _ := os.ReadFile("/var/run/pkcsslotd.pid") // it stays when the daemon has ended
	name, _ := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/comm")
	if string(name) == "pkcsslotd\n" {
		return
	}
	if err := os.MkdirAll("/var/lock/opencryptoki", 0o770); err != nil {
		t.Fatal(err)
	}
	daemon := testproc.Start(t, exec.Command("pkcsslotd", "-f", "-l", "/dev/stderr"), nil)
	t.Cleanup(func() { daemon.Stop(syscall.SIGTERM) }) // it removes its shared memory
	testproc.Await(t, "pkcsslotd", func() bool {
		if daemon.Ended() {
			t.Fatal("pkcsslotd has ended: ", daemon.Wait())
		}
		return exec.Command("pkcsconf", "-c", "3", "-t").Run() == nil
	})
}

// openCryptoki's soft token has no EC and no AES key wrap: the doctor says so before anything is begun, and what
// follows;
// and who begins all the same is told too, and has changed nothing.
func TestDoctorOnOpenCryptoki(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("openCryptoki's daemon needs root: make check leaves this test out for others")
	}
	modules, err := filepath.Glob("/usr/lib/*/opencryptoki/libopencryptoki.so.0")
	if err != nil || len(modules) == 0 {
		t.Fatal("libopencryptoki.so.0 is not there", err)
	}
	// The daemon and its token are the machine's, and so is the turn to use them.
	turn := must.Get[*os.File](t)(os.Open(modules[0]))
	t.Cleanup(func() { turn.Close() })
	must.Do(t, syscall.Flock(int(turn.Fd()), syscall.LOCK_EX))
	slotDaemon(t)
	const label, soPIN, userPIN = "kmehsm-test", "11223344", "22334455"
	info, err := exec.Command("pkcsconf", "-c", "3", "-t").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, info)
	}
	if !strings.Contains(string(info), label) {
		if strings.Contains(string(info), "|TOKEN_INITIALIZED") {
			t.Fatal("openCryptoki's soft token here is somebody's, and is left alone: run the tests where it is not " +
				"in use")
		}
		for _, step := range []struct {
			stdin string
			args  []string
		}{
			{label + "\n", []string{"-I", "-S", "87654321"}},
			{"", []string{"-P", "-S", "87654321", "-n", soPIN}},
			{"", []string{"-u", "-S", soPIN, "-n", "12345678"}},
			{"", []string{"-p", "-U", "12345678", "-n", userPIN}},
		} {
			cmd := exec.Command("pkcsconf", append([]string{"-c", "3"}, step.args...)...)
			cmd.Stdin = strings.NewReader(step.stdin)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("pkcsconf %v: %v\n%s", step.args, err, out)
			}
		}
	}
	dir := t.TempDir()
	pin := filepath.Join(dir, "pin")
	if err := os.WriteFile(pin, []byte(userPIN), 0o600); err != nil {
		t.Fatal(err)
	}
	uri := "pkcs11:token=" + label + "?module-path=" + modules[0] + "&pin-source=file:" + pin
	run := func(program string, args ...string) (stdout, stderr string, code int) {
		cmd := exec.Command(filepath.Join(programs.Dir(t), program), args...)
		var out, errs strings.Builder
		cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = dir, append(os.Environ(), "KMEHSM_TOKEN="+uri), &out, &errs
		cmd.Run()
		return out.String(), errs.String(), cmd.ProcessState.ExitCode()
	}
	for program, wants := range map[string]map[string]string{
		"factory": {
			"CKM_RSA_PKCS_KEY_PAIR_GEN": "", "CKM_RSA_X_509": "", "CKM_RSA_PKCS_OAEP": "", "CKM_AES_KEY_GEN": "",
			"CKM_EC_KEY_PAIR_GEN": "not possible", "CKM_ECDSA": "not possible", "CKM_AES_KEY_WRAP_PAD": "not possible",
			"CKA_WRAP_WITH_TRUSTED on a new RSA key": "CKR_",
		},
		// It decrypts payloads and tags KMEs; KME_SIG would be for keysvc to validate; and nothing seals KMEs.
		"keysvc": {"CKM_RSA_X_509": "", "CKM_SHA256_HMAC": "", "CKM_ECDSA": "verify: software",
			"CKM_AES_KEY_WRAP": "not possible"},
	} {
		stdout, stderr, code := run(program, "doctor", "--json")
		var report struct {
			OK       bool
			Findings []struct {
				Check, Consequence string
				OK, Required       bool
			}
		}
		if err := json.NewDecoder(strings.NewReader(stdout)).Decode(&report); err != nil || code != 1 || report.OK {
			t.Fatalf("%s: exit code %d, %v\n%s%s", program, code, err, stdout, stderr)
		}
		for _, f := range report.Findings {
			if !f.OK && f.Consequence == "" {
				t.Errorf("%s is not there, and what follows is not said", f.Check)
			}
			if want, ok := wants[f.Check]; ok {
				delete(wants, f.Check)
				if f.OK != (want == "") || !strings.Contains(f.Consequence, want) {
					t.Errorf("%s: %s: %v, %q", program, f.Check, f.OK, f.Consequence)
				}
			}
		}
		if len(wants) > 0 {
			t.Errorf("the doctor of %s does not say anything of %v", program, wants)
		}
	}
	if _, stderr, code := run("factory", "init"); code != 1 || !strings.Contains(stderr, "CKR_MECHANISM_INVALID") &&
		!strings.Contains(stderr, "CKM_EC_KEY_PAIR_GEN") {
		t.Errorf("init: exit code %d, %s", code, stderr)
	}
}
