package vaultstore

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/internal/vaulttest"
	"github.com/kmehsm/kmehsm/policies"
)

func TestVaultMountVersion1(t *testing.T) {
	server := vaulttest.Any(t)
	server.Mount(t, "old", "1")
	store := New(server.Client(t, server.Root), "old")
	for what, err := range map[string]error{
		"create": store.Create(t.Context(), "lots/L1/manifest", []byte("x")),
		"update": store.Update(t.Context(), "lots/L1/revocations", []byte("x"), ""),
		"read":   second(store.Read(t.Context(), "lots/L1/manifest")),
		"list":   first(store.List(t.Context(), "lots")),
	} {
		if err == nil || !strings.Contains(err.Error(), "needs kv version 2") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if secret, err := server.Client(t, server.Root).Logical().List("old/"); err != nil || secret != nil {
		t.Errorf("something was written: %v %v", secret, err)
	}
}

func first(_ []string, err error) error { return err }

func second(_ []byte, _ string, err error) error { return err }

// A fresh mount refuses writes for a moment: the store waits for it.
func TestVaultFreshMount(t *testing.T) {
	server := vaulttest.Any(t)
	for i := range 5 {
		mount := fmt.Sprintf("kme%d", i)
		server.Mount(t, mount, "2")
		if err := New(server.Client(t, server.Root), mount).Create(t.Context(), "lots/L1/manifest",
			[]byte("x")); err != nil {
			t.Error(err)
		}
	}
}

func TestVaultSealedAndRestarted(t *testing.T) {
	server := vaulttest.Start(t)
	server.Mount(t, "kme", "2")
	store := New(server.Client(t, server.Root), "kme")
	if err := store.Create(t.Context(), "lots/L1/manifest", []byte("x")); err != nil {
		t.Fatal(err)
	}
	server.Kill()
	if _, _, err := store.Read(t.Context(), "lots/L1/manifest"); !errors.Is(err, directory.ErrUnavailable) {
		t.Errorf("no server: %v", err)
	}
	server.Restart(t, true)
	if _, _, err := store.Read(t.Context(), "lots/L1/manifest"); !errors.Is(err, directory.ErrUnavailable) {
		t.Errorf("sealed: %v", err)
	}
	server.Kill()

	// A client that tries again gets through once the server is back.
	t.Setenv("VAULT_ADDR", server.Addr)
	t.Setenv("VAULT_TOKEN", server.Root)
	back := make(chan struct{})
	go func() {
		defer close(back)
		time.Sleep(500 * time.Millisecond)
		server.Restart(t, false)
	}()
	client, err := Connect(t.Context(), Login{Wait: true}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	client.SetMaxRetries(60)
	client.SetClientTimeout(testproc.Patience)
	got, version, err := New(client, "kme").Read(t.Context(), "lots/L1/manifest")
	<-back
	if err != nil || string(got) != "x" || version != "1" {
		t.Errorf("%s %s %v", got, version, err)
	}
}

// A caller that waits for a Vault that is away gets its client at once, and it works when the server is there; one that
// does not wait is told.
func TestVaultConnectWhileAway(t *testing.T) {
	server := vaulttest.Start(t)
	server.Mount(t, "kme", "2")
	root := server.Client(t, server.Root)
	if err := New(root, "kme").Create(t.Context(), "lots/L1/manifest", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := root.Sys().EnableAuthWithOptions("approle", &api.EnableAuthOptions{Type: "approle"}); err != nil {
		t.Fatal(err)
	}
	write := func(path string, data map[string]any, field string) string {
		t.Helper()
		secret, err := root.Logical().Write(path, data)
		if err != nil {
			t.Fatal(err)
		}
		if field == "" {
			return ""
		}
		return secret.Data[field].(string)
	}
	if err := root.Sys().PutPolicy("reader", `path "kme/data/*" { capabilities = ["read"] }`); err != nil {
		t.Fatal(err)
	}
	write("auth/approle/role/r", map[string]any{"token_policies": "reader"}, "")
	write("auth/approle/role/r/role-id", map[string]any{"role_id": "the-role"}, "")
	file := filepath.Join(t.TempDir(), "secret-id")
	if err := os.WriteFile(file, []byte(write("auth/approle/role/r/secret-id", nil, "secret_id")), 0o600); err != nil {
		t.Fatal(err)
	}
	server.Kill()
	t.Setenv("VAULT_ADDR", server.Addr)
	t.Setenv("VAULT_TOKEN", "")
	login := Login{RoleID: "the-role", SecretIDFile: file}
	if _, err := Connect(t.Context(), login, slog.New(slog.DiscardHandler)); !errors.Is(err, directory.ErrUnavailable) {
		t.Errorf("without waiting: %v", err)
	}
	login.Wait = true
	client, err := Connect(t.Context(), login, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	store := New(client, "kme")
	if _, _, err := store.Read(t.Context(), "lots/L1/manifest"); !errors.Is(err, directory.ErrUnavailable) {
		t.Error(err)
	}
	server.Restart(t, false)
	for deadline := time.Now().Add(testproc.Patience); ; time.Sleep(100 * time.Millisecond) {
		if data, _, err := store.Read(t.Context(), "lots/L1/manifest"); err == nil && string(data) == "x" {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func TestVaultDeletedIsNotNew(t *testing.T) {
	server := vaulttest.Any(t)
	server.Mount(t, "kme", "2")
	client := server.Client(t, server.Root)
	store := New(client, "kme")
	if err := store.Create(t.Context(), "lots/L1/manifest", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Logical().Delete("kme/data/lots/L1/manifest"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := store.Read(t.Context(), "lots/L1/manifest"); !errors.Is(err, directory.ErrNotFound) {
		t.Error(err)
	}
	if err := store.Create(t.Context(), "lots/L1/manifest", []byte("y")); err == nil ||
		!strings.Contains(err.Error(), "undelete") {
		t.Errorf("a deleted object was published anew: %v", err)
	}
	// A list of revoked devices is replaced where that is what is meant.
	list := directory.RevocationsPath("L1")
	if err := store.Update(t.Context(), list, []byte("x"), ""); err != nil {
		t.Fatal(err)
	}
	for name, at := range map[string]string{"deleted": "kme/data/", "gone": "kme/metadata/"} {
		if _, err := client.Logical().Delete(at + list); err != nil {
			t.Fatal(err)
		}
		_, version, err := store.Read(t.Context(), list)
		if !errors.Is(err, directory.ErrNotFound) {
			t.Errorf("a list that is %s: %v", name, err)
		}
		if err := store.Update(t.Context(), list, []byte("y"), version); err != nil {
			t.Errorf("a list that is %s, of version %q: %v", name, version, err)
		}
	}
	// What is no object is refused, so that who checks others goes on, and may be replaced.
	for i, foreign := range []map[string]any{{"other": "x"}, {"jws": []string{"x"}}, {"jws": 1}, {}} {
		path := fmt.Sprint("lots/L1/foreign", i)
		if _, err := client.Logical().Write("kme/data/"+path, map[string]any{"data": foreign}); err != nil {
			t.Fatal(err)
		}
		_, version, err := store.Read(t.Context(), path)
		if !errors.As(err, new(*directory.RefusedError)) || !strings.Contains(err.Error(), "no object of ours") {
			t.Error(foreign, err)
		}
		if err := store.Update(t.Context(), path, []byte("x"), version); err != nil {
			t.Error(foreign, err)
		}
	}
}

// world has two mounts with a lot each, and a second lot on the first, and a token for each policy on the first.
func world(t *testing.T, server *vaulttest.Server) (as map[string]*Store, client map[string]*api.Client) {
	t.Helper()
	root := server.Client(t, server.Root)
	for _, mount := range []string{"kme", "other"} {
		server.Mount(t, mount, "2")
		store := New(root, mount)
		for _, path := range []string{
			directory.ManifestPath("L1"), directory.ShardPath("L1", 0), directory.ManifestPath("L2"),
			directory.ShardPath("L2", 0), directory.ManifestPath("L10"), directory.ShardPath("L1-x", 0),
			directory.ManifestPath("L1.x"),
		} {
			if err := store.Create(t.Context(), path, []byte("object")); err != nil {
				t.Fatal(err)
			}
		}
		for _, path := range []string{directory.RevocationsPath("L1"), directory.RevocationPartPath("L1", 0),
			directory.RevocationPartPath("L2", 0)} {
			if err := store.Update(t.Context(), path, []byte("list"), ""); err != nil {
				t.Fatal(err)
			}
		}
	}
	as, client = map[string]*Store{}, map[string]*api.Client{}
	grant := func(role, name, policy string, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		if err := root.Sys().PutPolicy(name, policy); err != nil {
			t.Fatalf("%s: %v\n%s", role, err, policy)
		}
		secret, err := root.Auth().Token().Create(&api.TokenCreateRequest{Policies: []string{name}, TTL: "10m"})
		if err != nil {
			t.Fatal(err)
		}
		client[role] = server.Client(t, secret.Auth.ClientToken)
		as[role] = New(client[role], "kme")
	}
	for _, role := range policies.Names {
		text, err := policies.Of("kme", role)
		grant(role, policies.Name("kme", role), text, err)
	}
	text, err := policies.Operator("kme", "acme", []string{"L1"})
	grant("operator", policies.OperatorName("kme", "acme"), text, err)
	return as, client
}

// Each policy on the directory's objects, in both directions: what its holder must be able to do, and all else refused.
// TestVaultEscalation has the rest of Vault.
func TestVaultPolicies(t *testing.T) {
	as, client := world(t, vaulttest.Any(t))
	const (
		manifest1, manifest2 = "kme/data/lots/L1/manifest", "kme/data/lots/L2/manifest"
		shard1, shard2       = "kme/data/lots/L1/shards/000000", "kme/data/lots/L2/shards/000000"
		revocations1         = "kme/data/lots/L1/revocations"
		revoked1, revoked2   = "kme/data/lots/L1/revoked/000000", "kme/data/lots/L2/revoked/000000"
	)
	read := func(path string) func(*api.Client) error {
		return func(c *api.Client) error {
			s, err := c.Logical().Read(path)
			if err == nil && s == nil {
				return fmt.Errorf("nothing at %s", path)
			}
			return err
		}
	}
	list := func(path string) func(*api.Client) error {
		return func(c *api.Client) error { _, err := c.Logical().List(path); return err }
	}
	write := func(path string) func(*api.Client) error {
		return func(c *api.Client) error {
			_, err := c.Logical().Write(path, map[string]any{"data": map[string]any{"jws": "y"}})
			return err
		}
	}
	remove := func(path string) func(*api.Client) error {
		return func(c *api.Client) error { _, err := c.Logical().Delete(path); return err }
	}
	all := []struct {
		what    string
		do      func(*api.Client) error
		allowed string // the roles that may
	}{
		{"read a granted lot's manifest", read(manifest1), "factory-publisher auditor operator"},
		{"read its shard", read(shard1), "factory-publisher auditor operator"},
		{"read its revocations", read(revocations1), "factory-publisher auditor operator"},
		{"read a part of them", read(revoked1), "factory-publisher auditor operator"},
		{"read a part of another lot's", read(revoked2), "factory-publisher auditor"},
		{"read another lot's manifest", read(manifest2), "factory-publisher auditor"},
		{"read another lot's shard", read(shard2), "factory-publisher auditor"},
		{"read on another mount", read("other/data/lots/L1/manifest"), ""},
		{"list the lots", list("kme/metadata/lots"), "factory-publisher auditor"},
		{"list a lot", list("kme/metadata/lots/L1"), "auditor"},
		{"list a lot's shards", list("kme/metadata/lots/L1/shards"), "factory-publisher auditor"},
		{"list a lot's parts of revocations", list("kme/metadata/lots/L1/revoked"), "factory-publisher auditor"},
		{"list another mount", list("other/metadata/lots"), ""},
		{"read metadata", read("kme/metadata/lots/L1/manifest"), "auditor"},
		{"change a manifest", write(manifest1), ""},
		{"change a shard", write(shard1), ""},
		{"change revocations", write(revocations1), "factory-publisher"},
		{"change a part of them", write(revoked1), "factory-publisher"},
		{"publish below a part", write(revoked1 + "/x"), ""},
		{"publish what is no object", write("kme/data/lots/L1/anything"), ""},
		{"publish elsewhere", write("kme/data/anything"), ""},
		{"publish on another mount", write("other/data/lots/L9/manifest"), ""},
		{"delete a manifest", remove(manifest1), ""},
		{"delete revocations", remove(revocations1), ""},
		{"delete a part of them", remove(revoked1), ""},
		{"delete all versions", remove("kme/metadata/lots/L1/manifest"), ""},
		{"destroy versions", func(c *api.Client) error {
			_, err := c.Logical().Write("kme/destroy/lots/L1/manifest", map[string]any{"versions": []int{1}})
			return err
		}, ""},
	}
	for role, c := range client {
		for _, a := range all {
			err := a.do(c)
			may := strings.Contains(" "+a.allowed+" ", " "+role+" ")
			if may && err != nil || !may && statusOf(err) != 403 {
				t.Errorf("%s, %s: allowed %v, got %v", role, a.what, may, err)
			}
		}
	}
	// Through the store: what is published stays, whoever tries; and a 403 says which path.
	publisher := as[policies.Publisher]
	if err := publisher.Create(t.Context(), directory.ManifestPath("L3"), []byte("new")); err != nil {
		t.Errorf("the publisher cannot publish: %v", err)
	}
	if err := publisher.Create(t.Context(), directory.ManifestPath("L1"), []byte("object")); err != nil {
		t.Errorf("the same object again: %v", err)
	}
	if err := publisher.Create(t.Context(), directory.ManifestPath("L1"), []byte("other")); !errors.As(err,
		new(*directory.ConflictError)) {
		t.Errorf("another object: %v", err)
	}
	if _, _, err := as["operator"].Read(t.Context(), directory.ManifestPath("L2")); err == nil ||
		!strings.Contains(err.Error(), "kme/data/lots/L2/manifest") || !strings.Contains(err.Error(), "policy") {
		t.Error(err)
	}
}

func TestVaultSetup(t *testing.T) {
	server := vaulttest.Start(t)
	root := server.Client(t, server.Root)
	if _, _, err := New(root, "kme").Read(t.Context(), "lots/L1/manifest"); err == nil ||
		!strings.Contains(err.Error(), "no mount kme") {
		t.Errorf("a mount that is not there: %v", err)
	}
	todo := func(dryRun bool) (n int) {
		t.Helper()
		steps, err := Setup(t.Context(), root, "kme", dryRun)
		if err != nil || len(steps) != 1+len(policies.Names) {
			t.Fatal(steps, err)
		}
		for _, s := range steps {
			if !s.Done {
				n++
			}
		}
		return n
	}
	for i, want := range []int{4, 4, 0} { // a dry run changes nothing; a second run has nothing to do
		if n := todo(i == 0); n != want {
			t.Errorf("round %d: %d steps to do, want %d", i, n, want)
		}
	}
	if err := New(root, "kme").Create(t.Context(), "lots/L1/manifest", []byte("x")); err != nil {
		t.Error(err)
	}
	if err := root.Sys().PutPolicy("kme-auditor", `path "a" { capabilities = ["read"] }`); err != nil {
		t.Fatal(err)
	}
	if n := todo(false); n != 1 {
		t.Errorf("a changed policy: %d steps", n)
	}
	// The admin's policy is not for setting up: its holder may not even look at a policy.
	token, err := root.Auth().Token().
		Create(&api.TokenCreateRequest{Policies: []string{policies.Name("kme", policies.Admin)}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = Setup(t.Context(), server.Client(t, token.Auth.ClientToken), "kme", false)
	if err == nil || !strings.Contains(err.Error(), "sys/policies/acl/kme-factory-publisher") ||
		!strings.Contains(err.Error(), "runs Vault") {
		t.Errorf("a set-up with the admin's token: %v", err)
	}
	server.Mount(t, "old", "1")
	if _, err := Setup(t.Context(), root, "old", false); err == nil || !strings.Contains(err.Error(), "version 1") {
		t.Errorf("a mount of version 1: %v", err)
	}
}
