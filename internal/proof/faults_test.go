package proof

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/internal/vaulttest"
)

// provisioning is a lot in a new Vault, and its lot provision, started and under way.
func provisioning(t *testing.T, devices int) (w *world, server *vaulttest.Server,
	run *testproc.Process, args []string) {
	server = vaulttest.Start(t)
	server.Mount(t, "kme", "2")
	w = newWorld(t, nil, "VAULT_ADDR="+server.Addr, "VAULT_TOKEN="+server.Root)
	w.run(w.factory, "factory", "init")
	w.enrolFixture()
	w.run(w.factory, "factory", "lot", "create", "L1", "--directory", "vault:kme", "--tac", "35209900", "--first", "0",
		"--count", fmt.Sprint(devices), "--bits", "2048", "--shard-size", "50")
	args = []string{"lot", "provision", "L1", "--directory", "vault:kme"}
	run = testproc.Start(t, w.command(w.factory, "factory", args...), func(*testproc.Process) bool {
		_, err := os.Stat(w.path("var/factory/injection/L1/injection-000000.jsonl"))
		return err == nil
	})
	return w, server, run, args
}

func (w *world) verify() {
	w.t.Helper()
	w.run(w.factory, "factory", "lot", "verify", "L1", "--directory", "vault:kme")
	w.run(w.factory, "factory", "reconcile", "L1", "--directory", "vault:kme")
	w.run(w.factory, "factory", "log", "verify")
}

// Vault is sealed while a lot is being published: keys go on being made, the run says what it waits for, and goes on by
// itself when Vault is unsealed.
func TestVaultSealedInTheMiddle(t *testing.T) {
	t.Parallel()
	const devices = 4000
	w, server, run, _ := provisioning(t, devices)
	sys := server.Client(t, server.Root).Sys()
	if err := sys.Seal(); err != nil {
		t.Fatal(err)
	}
	testproc.Await(t, "what it waits for", func() bool {
		return strings.Contains(run.Log.String(), "wait for the directory")
	})
	for n := range devices / 50 { // one by one: all may take a busy machine minutes
		made := w.path(fmt.Sprintf("var/factory/injection/L1/injection-%06d.jsonl", n))
		testproc.Await(t, fmt.Sprintf("package %d, with Vault sealed", n), func() bool {
			_, err := os.Stat(made)
			return err == nil
		})
	}
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
	if err := run.Wait(); err != nil {
		t.Fatal(err)
	}
	w.verify()
}

// The token goes away while a lot is made, and comes back: a clear word, and the same command goes on.
func TestTokenRemovedWhilePublishingToVault(t *testing.T) {
	t.Parallel()
	w, _, run, args := provisioning(t, 4000)
	tokens := w.path("softhsm/tokens")
	if err := os.Rename(tokens, tokens+".away"); err != nil {
		t.Fatal(err)
	}
	err := run.Wait()
	t.Logf("without its token: %v, %s", err, run.Log)
	if code := run.Cmd.ProcessState.ExitCode(); err != nil &&
		(code != 1 && code != 3 || strings.Contains(run.Log.String(), "goroutine ")) {
		t.Errorf("exit code %d\n%s", code, run.Log)
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
