package proof

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/vaulttest"
)

// Factory and Vault are killed at random points, many times, while 50 shards are published. In the end every shard is
// there exactly once, and its keys are those of its injection package.
func TestKilledWhilePublishingToVault(t *testing.T) {
	t.Parallel()
	server := vaulttest.Start(t)
	server.Mount(t, "kme", "2")
	w := newWorld(t, nil, "VAULT_ADDR="+server.Addr, "VAULT_TOKEN="+server.Root)
	w.run(w.factory, "factory", "init")
	w.enrolFixture()
	shards, size, rounds, window := 50, 100, 20, 150
	if os.Getenv("KMEHSM_SOAK") != "" { // make kills
		shards, size, rounds, window = 400, 50, 200, 130
	}
	w.run(w.factory, "factory", "lot", "create", "L1", "--directory", "vault:kme", "--tac", "35209900", "--first", "0",
		"--count", fmt.Sprint(shards*size),
		"--bits", "2048", "--shard-size", fmt.Sprint(size))
	provision := []string{"lot", "provision", "L1", "--workers", "2", "--directory", "vault:kme", "--out", "injection"}
	random := rand.New(rand.NewPCG(1, 2))
	mend := w.tokenFiles()
	interrupted := 0
	for round := range rounds {
		cmd := w.command(w.factory, "factory", provision...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(60+random.IntN(window)) * time.Millisecond)
		if round%4 == 3 {
			server.Kill()
			time.Sleep(time.Duration(random.IntN(200)) * time.Millisecond)
		}
		cmd.Process.Kill()
		if cmd.Wait() != nil {
			interrupted++
		}
		mend()
		if round%4 == 3 {
			server.Restart(t, false)
		}
	}
	t.Logf("%d of %d runs were killed before they had ended", interrupted, rounds)
	if interrupted < rounds/2 {
		t.Errorf("only %d runs were killed before they had ended, so that this test sees little", interrupted)
	}
	t.Log(strings.SplitN(w.run(w.factory, "factory", provision...), "\n", 2)[0])
	w.run(w.factory, "factory", "log", "verify")
	w.run(w.factory, "factory", "lot", "verify", "L1", "--directory", "vault:kme", "--injection", "injection")

	client := server.Client(t, server.Root)
	seen := map[string]bool{}
	for n := range shards {
		path := fmt.Sprintf("lots/L1/shards/%06d", n)
		secret, err := client.Logical().Read("kme/data/" + path)
		if err != nil || secret == nil {
			t.Fatalf("%s: %v, %v", path, secret, err)
		}
		if v := fmt.Sprint(secret.Data["metadata"].(map[string]any)["version"]); v != "1" {
			t.Errorf("%s was published %s times", path, v)
		}
		jws := secret.Data["data"].(map[string]any)["jws"].(string)
		payload, err := base64.RawURLEncoding.DecodeString(strings.Split(jws, ".")[1])
		if err != nil {
			t.Fatal(err)
		}
		var published struct{ Keys []map[string]string }
		if err := json.Unmarshal(payload, &published); err != nil {
			t.Fatal(err)
		}
		file, err := os.ReadFile(w.path(fmt.Sprintf("injection/L1/injection-%06d.jsonl", n)))
		if err != nil {
			t.Fatal(err)
		}
		var packed []map[string]string
		for text := range strings.SplitSeq(strings.TrimSpace(string(file)), "\n") {
			var line injectionLine
			if err := json.Unmarshal([]byte(text), &line); err != nil {
				t.Fatal(err)
			}
			packed = append(packed, line.PublicKey)
			seen[line.IMEI] = true
		}
		if len(packed) != size || !reflect.DeepEqual(packed, published.Keys) {
			t.Errorf("%s: the package has other keys than are published", path)
		}
	}
	if len(seen) != shards*size {
		t.Errorf("%d devices, want %d", len(seen), shards*size)
	}
}

// tokenFiles gives what brings back a token's own file, if a process was killed that was writing it: SoftHSM 2.6.1
// truncates it and writes it anew at each login, so that a process that is killed between the two leaves no token. An
// HSM does not do that.
func (w *world) tokenFiles() (mend func()) {
	w.t.Helper()
	files := must.Get[[]string](w.t)(filepath.Glob(w.path("softhsm/tokens/*/token.object")))
	if len(files) == 0 {
		w.t.Fatal("where does SoftHSM keep its tokens?")
	}
	saved := make([][]byte, len(files))
	for i, file := range files {
		saved[i] = must.Get[[]byte](w.t)(os.ReadFile(file))
	}
	return func() {
		for i, file := range files {
			if len(must.Get[[]byte](w.t)(os.ReadFile(file))) < len(saved[i]) {
				w.t.Log("SoftHSM was killed while it wrote its token's file")
				must.Do(w.t, os.WriteFile(file, saved[i], 0o600))
			}
		}
	}
}
