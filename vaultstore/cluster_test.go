package vaultstore

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/internal/vaulttest"
	"github.com/kmehsm/kmehsm/kme"
)

// A store that talks to a standby works as any other, and goes on when the active node dies and the cluster elects
// another.
func TestVaultStandby(t *testing.T) {
	active := vaulttest.Start(t)
	root := active.Client(t, active.Root)
	// A node that joined gets a vote when the autopilot has seen it stable for a while. Until then, no node that stands
	// still for half a second ends what the first one leads.
	votesAfter := func(stable string) {
		t.Helper()
		if _, err := root.Logical().Write("sys/storage/raft/autopilot/configuration",
			map[string]any{"server_stabilization_time": stable}); err != nil {
			t.Fatal(err)
		}
	}
	votesAfter("24h")
	second := active.Join(t)
	third := active.Join(t)
	active.Mount(t, "kme", "2")
	store := New(second.Client(t, active.Root), "kme")
	if health, err := second.Client(t, "").Sys().Health(); err != nil || !health.Standby {
		t.Fatalf("the node that joined is no standby: %+v, %v", health, err)
	}
	if err := store.Create(t.Context(), directory.ManifestPath("L1"), []byte("one")); err != nil {
		t.Fatal(err)
	}
	if data, _, err := store.Read(t.Context(), directory.ManifestPath("L1")); err != nil || string(data) != "one" {
		t.Fatalf("%q, %v", data, err)
	}
	// Without votes of two, a cluster of three does not outlive its first.
	votesAfter("1s")
	voters := func() (n int) {
		secret, err := root.Logical().Read("sys/storage/raft/configuration")
		if err != nil {
			return 0 // another one is elected
		}
		for _, s := range secret.Data["config"].(map[string]any)["servers"].([]any) {
			if s.(map[string]any)["voter"].(bool) {
				n++
			}
		}
		return n
	}
	testproc.Await(t, "the nodes that joined have a vote", func() bool { return voters() == 3 })
	active.Kill()
	for i, node := range []*vaulttest.Server{second, third} {
		store := New(node.Client(t, active.Root), "kme")
		path := directory.ShardPath("L1", i)
		// A run ends while there is no leader for longer than the tries last, and is started again.
		var data []byte
		testproc.Await(t, "the store works again", func() bool {
			err := store.Create(t.Context(), path, []byte(path))
			if err == nil {
				data, _, err = store.Read(t.Context(), directory.ManifestPath("L1"))
			}
			return err == nil
		})
		if string(data) != "one" {
			t.Fatalf("%q", data)
		}
	}
}

// A hundred who ask at once for devices of a shard that nobody has asked for are one read, by the server's own audit
// log.
func TestVaultColdShardIsOneRead(t *testing.T) {
	server := vaulttest.Start(t)
	server.Mount(t, "kme", "2")
	store := New(server.Client(t, server.Root), "kme")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := directory.NewSigner(key)
	if err != nil {
		t.Fatal(err)
	}
	lot, err := testkeys.RSA(2048)
	if err != nil {
		t.Fatal(err)
	}
	tac, err := kme.ParseTAC("35209900")
	if err != nil {
		t.Fatal(err)
	}
	const size = 256
	m := &directory.Manifest{
		Lot: "L1", Manufacturer: signer.KeyID(), Suite: kme.SuiteECDSA, N: lot.N.Bytes(), E: lot.E,
		Mechanism: "CKM_RSA_PKCS_KEY_PAIR_GEN", Ranges: []directory.Range{{TAC: tac, Count: size}}, ShardSize: size,
		Created: time.Now().UTC().Truncate(time.Second),
	}
	keys := make([]directory.DeviceKey, size)
	for i := range keys {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys[i] = directory.DeviceKey{IMEI: m.IMEI(i), Key: &k.PublicKey}
	}
	shard, err := directory.NewShard(m, 0, keys, make([]byte, sha256.Size))
	if err != nil {
		t.Fatal(err)
	}
	if err := directory.Publish(t.Context(), store, directory.ShardPath("L1", 0), signer, directory.TypeShard,
		shard); err != nil {
		t.Fatal(err)
	}
	if err := directory.BeginRevocations(t.Context(), store, signer, m, time.Now(), time.Hour); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(t.TempDir(), "audit.log")
	if err := server.Client(t, server.Root).Sys().EnableAuditWithOptions("file",
		&api.EnableAuditOptions{Type: "file", Options: map[string]string{"file_path": log}}); err != nil {
		t.Fatal(err)
	}
	reader := directory.NewReader(store, directory.NewVerifier(&key.PublicKey),
		directory.ReaderOptions{ReadTimeout: testproc.Patience})
	start := make(chan struct{})
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			<-start
			if _, err := reader.Device(t.Context(), m, m.IMEI(i)); err != nil {
				t.Error(err)
			}
		})
	}
	close(start)
	all.Wait()
	data, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	reads := map[string]int{}
	for line := range strings.Lines(string(data)) {
		var entry struct {
			Type    string
			Request struct{ Operation, Path string }
		}
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Fatal(err)
		}
		if entry.Type == "request" && entry.Request.Operation == "read" &&
			strings.HasPrefix(entry.Request.Path, "kme/") {
			reads[entry.Request.Path]++
		}
	}
	if want := "map[kme/data/lots/L1/revocations:1 kme/data/lots/L1/shards/000000:1]"; fmt.Sprint(reads) != want {
		t.Errorf("reads %v, not %s", reads, want)
	}
}
