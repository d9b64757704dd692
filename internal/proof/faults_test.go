package proof

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/vaulttest"
)

// A log that a program writes and a test reads.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// await waits until ok, for a minute at most.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

// provisioning is a lot in a new Vault, and its lot provision, started and under way.
func provisioning(t *testing.T, devices int) (w *world, server *vaulttest.Server, cmd *exec.Cmd, stderr *log, args []string) {
	server = vaulttest.Start(t)
	server.Mount(t, "kme", "2")
	w = newWorld(t, nil, "VAULT_ADDR="+server.Addr, "VAULT_TOKEN="+server.Root)
	w.run(w.factory, "factory", "init")
	w.run(w.factory, "factory", "lot", "create", "L1", "--directory", "vault:kme", "--tac", "35209900", "--first", "0", "--count", fmt.Sprint(devices), "--bits", "2048", "--shard-size", "50")
	args = []string{"lot", "provision", "L1", "--directory", "vault:kme"}
	cmd, stderr = w.command(w.factory, "factory", args...), new(log)
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	await(t, "the first package", func() bool {
		_, err := os.Stat(w.path("var/factory/injection/L1/injection-000000.jsonl"))
		return err == nil
	})
	return w, server, cmd, stderr, args
}

func (w *world) verify() {
	w.t.Helper()
	w.run(w.factory, "factory", "lot", "verify", "L1", "--directory", "vault:kme")
	w.run(w.factory, "factory", "reconcile", "L1", "--directory", "vault:kme")
	w.run(w.factory, "factory", "log", "verify")
}

// Vault is sealed while a lot is being published: keys go on being made, the run says what it waits for, and goes on by itself
// when Vault is unsealed.
func TestVaultSealedInTheMiddle(t *testing.T) {
	const devices = 4000
	w, server, cmd, stderr, _ := provisioning(t, devices)
	sys := server.Client(t, server.Root).Sys()
	if err := sys.Seal(); err != nil {
		t.Fatal(err)
	}
	await(t, "what it waits for", func() bool { return strings.Contains(stderr.String(), "wait for the directory") })
	last := w.path(fmt.Sprintf("var/factory/injection/L1/injection-%06d.jsonl", devices/50-1))
	await(t, "the last package, with Vault sealed", func() bool { _, err := os.Stat(last); return err == nil })
	data, err := os.ReadFile(filepath.Join(server.Dir, "init.json"))
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Key string `json:"unseal_key"`
	}
	if err := json.Unmarshal(data, &file); err != nil {
		t.Fatal(err)
	}
	if _, err := sys.Unseal(file.Key); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, stderr)
	}
	w.verify()
}

// The token goes away while a lot is made, and comes back: a clear word, and the same command goes on.
func TestTokenRemovedWhilePublishingToVault(t *testing.T) {
	w, _, cmd, stderr, args := provisioning(t, 4000)
	tokens := w.path("softhsm/tokens")
	if err := os.Rename(tokens, tokens+".away"); err != nil {
		t.Fatal(err)
	}
	err := cmd.Wait()
	t.Logf("without its token: %v, %s", err, stderr)
	if code := cmd.ProcessState.ExitCode(); err != nil && (code != 1 && code != 3 || strings.Contains(stderr.String(), "goroutine ")) {
		t.Errorf("exit code %d\n%s", cmd.ProcessState.ExitCode(), stderr)
	}
	again := w.command(w.factory, "factory", args...)
	if out, err := again.CombinedOutput(); err == nil || !bytes.Contains(out, []byte("token")) {
		t.Errorf("started without its token: %v\n%s", err, out)
	}
	os.RemoveAll(tokens) // SoftHSM may have made an empty one
	if err := os.Rename(tokens+".away", tokens); err != nil {
		t.Fatal(err)
	}
	w.run(w.factory, "factory", args...)
	w.verify()
}
