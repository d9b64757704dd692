package vaultstore

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/certtest"
	"github.com/kmehsm/kmehsm/internal/vaulttest"
	"github.com/kmehsm/kmehsm/kme"
	"github.com/kmehsm/kmehsm/policies"
)

// A server that limits the rate answers 429: the client waits, tries again and gets through.
func TestVaultRateLimit(t *testing.T) {
	server := vaulttest.Start(t)
	server.Mount(t, "kme", "2")
	root := server.Client(t, server.Root)
	if err := New(root, "kme").Create(t.Context(), directory.ManifestPath("L1"), []byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := root.Logical().Write("sys/quotas/rate-limit/slow",
		map[string]any{"path": "kme", "rate": 10, "interval": "1s"}); err != nil {
		t.Fatal(err)
	}
	limited := 0
	for range 50 {
		if _, err := root.Logical().Read("kme/data/lots/L1/manifest"); statusOf(err) == 429 {
			limited++
		}
	}
	if limited == 0 {
		t.Error("the server never answered 429, so that this test sees nothing")
	}
	t.Setenv("VAULT_ADDR", server.Addr)
	t.Setenv("VAULT_TOKEN", server.Root)
	client, err := Connect(t.Context(), Login{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	store := New(client, "kme")
	var all sync.WaitGroup
	for range 30 {
		all.Go(func() {
			if _, _, err := store.Read(t.Context(), directory.ManifestPath("L1")); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

// Ten thousand devices of a million are revoked in Vault as it is set up, by the line's own policy, and one more; an
// operator reads them by its policy. One list of all of them would be more than a Raft entry takes.
func TestVaultRevocationsOfAMillion(t *testing.T) {
	server := vaulttest.Any(t)
	as, _ := world(t, server)
	for _, path := range []string{"revocations", "revoked/000000"} {
		if _, err := server.Client(t, server.Root).Logical().Delete("kme/metadata/lots/L1/" + path); err != nil {
			t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := directory.NewSigner(key)
	if err != nil {
		t.Fatal(err)
	}
	tac, err := kme.ParseTAC("35209900")
	if err != nil {
		t.Fatal(err)
	}
	m := &directory.Manifest{Lot: "L1", Suite: kme.SuiteECDSA, Ranges: []directory.Range{{TAC: tac, Count: 1_000_000}},
		ShardSize: 256}
	publisher := as[policies.Publisher]
	if err := directory.BeginRevocations(t.Context(), publisher, signer, m, time.Now(), time.Hour); err != nil {
		t.Fatal(err)
	}
	var imeis []kme.IMEI
	for i := 0; i < m.Devices(); i += 100 {
		imeis = append(imeis, m.IMEI(i))
	}
	if err := directory.Revoke(t.Context(), publisher, signer, m, imeis, "stolen from the warehouse in Rotterdam",
		time.Now(), nil); err != nil {
		t.Fatal(err)
	}
	if err := directory.Revoke(t.Context(), publisher, signer, m, []kme.IMEI{m.IMEI(1)}, "stolen", time.Now(),
		nil); err != nil {
		t.Fatal(err)
	}
	reader := directory.NewReader(as["operator"], directory.NewVerifier(signer.Public()),
		directory.ReaderOptions{ReadTimeout: time.Minute})
	if err := reader.Refresh(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	for i := range 1000 {
		revoked, err := reader.Revoked(m, m.IMEI(i))
		if err != nil {
			t.Fatal(err)
		}
		if revoked != (i%100 == 0 || i == 1) {
			t.Errorf("device %d is revoked: %v", i, revoked)
		}
	}
	if history, err := reader.History(t.Context(), m, m.IMEI(999_900)); err != nil || len(history) != 1 {
		t.Error(history, err)
	}
	if err := directory.RevokeLot(t.Context(), publisher, signer, m, "the lot's key has leaked",
		time.Now()); err != nil {
		t.Error(err)
	}
}

// An object that is too large for a Vault, which may have been set up with less room than ours need, is not taken for a
// Vault that is away.
func TestVaultTooLarge(t *testing.T) {
	server := vaulttest.Any(t)
	server.Mount(t, "kme", "2")
	store := New(server.Client(t, server.Root), "kme")
	if err := store.Create(t.Context(), directory.ManifestPath("L1"), []byte("x")); err != nil { // waits for the mount
		t.Fatal(err)
	}
	for _, size := range []int{1 << 20, 1<<20 + 1} { // by the storage, and by the parser
		_, err := store.client.Logical().Write("kme/data/lots/L1/revocations",
			map[string]any{"data": map[string]any{"jws": strings.Repeat("e", size)}})
		if err = store.explain(err, "update", "lots/L1/revocations"); err == nil ||
			errors.Is(err, directory.ErrUnavailable) || !strings.Contains(err.Error(), "max_entry_size") {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

func TestVaultCertificateLogin(t *testing.T) {
	dir := certtest.Make(t, "127.0.0.1", "client")
	at := func(name string) string { return filepath.Join(dir, name) }
	t.Setenv("VAULT_CACERT", at("ca.pem"))
	server := vaulttest.Start(t, "-tls-cert", at("127.0.0.1.pem"), "-tls-key", at("127.0.0.1.key"),
		"-tls-client-ca", at("ca.pem"))
	server.Mount(t, "kme", "2")
	root := server.Client(t, server.Root)
	if err := New(root, "kme").Create(t.Context(), directory.ManifestPath("L1"), []byte("x")); err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(at("ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if err := root.Sys().PutPolicy("p", `path "kme/data/lots/*" { capabilities = ["read"] }`); err != nil {
		t.Fatal(err)
	}
	if err := root.Sys().EnableAuthWithOptions("cert", &api.EnableAuthOptions{Type: "cert"}); err != nil {
		t.Fatal(err)
	}
	if _, err := root.Logical().Write("auth/cert/certs/operator", map[string]any{"certificate": string(ca),
		"allowed_common_names": "client", "token_policies": "p"}); err != nil {
		t.Fatal(err)
	}
	t.Setenv("VAULT_ADDR", server.Addr)
	t.Setenv("VAULT_TOKEN", "")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if _, err := Connect(ctx, Login{CertRole: "operator"}, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a login without a certificate")
	}
	t.Setenv("VAULT_CLIENT_CERT", at("client.pem"))
	t.Setenv("VAULT_CLIENT_KEY", at("client.key"))
	client, err := Connect(ctx, Login{CertRole: "operator"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if got, _, err := New(client, "kme").Read(ctx, directory.ManifestPath("L1")); err != nil || string(got) != "x" {
		t.Error(string(got), err)
	}
	if _, err := Connect(ctx, Login{CertRole: "nobody"}, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a login in a role that is not there")
	}
}
