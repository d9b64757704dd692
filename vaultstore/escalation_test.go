package vaultstore

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/vaulttest"
	"github.com/kmehsm/kmehsm/policies"
)

// ask sends one request with a token, as curl would, and gives the status and the answer.
func ask(t *testing.T, server *vaulttest.Server, token, method, path, body string, header ...string) (status int, answer string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, server.Addr+"/v1/"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("X-Vault-Token", token)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(data)
}

const anything = `{"policy": "path \"*\" { capabilities = [\"create\", \"read\", \"update\", \"delete\", \"list\", \"sudo\"] }"}`

// What the holder of a policy would try, to get more than it gives. Vault's default policy, which each login has too, is tried along.
var escalations = []struct {
	what, method, path, body string
	allowed                  string // the policies that may, or "default": whoever has a login
	root                     int    // what root's token is answered, where that is no success
}{
	// Policies.
	{what: "write a policy", method: "PUT", path: "sys/policies/acl/anything", body: anything},
	{what: "write one by its older path", method: "PUT", path: "sys/policy/anything", body: anything},
	{what: "write a policy of the directory", method: "PUT", path: "sys/policies/acl/kme-operator-x", body: anything},
	{what: "write its own policy", method: "PUT", path: "sys/policies/acl/kme-directory-admin", body: anything},
	{what: "write the publisher's", method: "PUT", path: "sys/policy/kme-factory-publisher", body: anything},
	{what: "write the operator's", method: "PUT", path: "sys/policies/acl/kme-operator-acme", body: anything},
	{what: "write the default policy", method: "PUT", path: "sys/policies/acl/default", body: anything},
	{what: "read a policy of the directory", method: "GET", path: "sys/policies/acl/kme-auditor"},
	{what: "list the policies", method: "LIST", path: "sys/policies/acl"},
	{what: "list them by the older path", method: "GET", path: "sys/policy"},
	{what: "write a policy for passwords", method: "PUT", path: "sys/policies/password/p", body: `{"policy": "length = 20\nrule \"charset\" { charset = \"abcde\" }"}`},
	{what: "delete a policy", method: "DELETE", path: "sys/policies/acl/kme-operator-x"},

	// Logins that have another policy.
	{what: "make an AppRole of the directory with root's children", method: "POST", path: "auth/approle/role/kme-operator-x", body: `{"token_policies": "kme-factory-publisher,anything"}`},
	{what: "change the publisher's AppRole", method: "POST", path: "auth/approle/role/kme-factory-publisher/policies", body: `{"token_policies": "anything"}`},
	{what: "make another AppRole", method: "POST", path: "auth/approle/role/x", body: `{"token_policies": "anything"}`},
	{what: "read the publisher's role id", method: "GET", path: "auth/approle/role/kme-factory-publisher/role-id"},
	{what: "set it", method: "POST", path: "auth/approle/role/kme-factory-publisher/role-id", body: `{"role_id": "known"}`},
	{what: "have a secret id of the publisher", method: "POST", path: "auth/approle/role/kme-factory-publisher/secret-id"},
	{what: "set one", method: "POST", path: "auth/approle/role/kme-factory-publisher/custom-secret-id", body: `{"secret_id": "known"}`},
	{what: "list the AppRoles", method: "LIST", path: "auth/approle/role"},
	{what: "delete an AppRole", method: "DELETE", path: "auth/approle/role/kme-operator-x"},
	{what: "make a token with root's policy", method: "POST", path: "auth/token/create", body: `{"policies": ["root"]}`},
	{what: "make a token with its own", method: "POST", path: "auth/token/create", body: `{}`},
	{what: "make a token without parent", method: "POST", path: "auth/token/create-orphan", body: `{"policies": ["root"]}`},
	{what: "make a role of tokens", method: "POST", path: "auth/token/roles/r", body: `{"allowed_policies": "anything", "orphan": true}`},
	{what: "make a token of a role", method: "POST", path: "auth/token/create/r", body: `{"policies": ["anything"]}`},
	{what: "list the tokens", method: "LIST", path: "auth/token/accessors"},
	{what: "look up another's token", method: "POST", path: "auth/token/lookup", body: `{"token": "VICTIM"}`},
	{what: "look it up by its accessor", method: "POST", path: "auth/token/lookup-accessor", body: `{"accessor": "ACCESSOR"}`},
	{what: "look up its own token", method: "GET", path: "auth/token/lookup-self", allowed: "default"},

	// Policies by way of the identity that a login has.
	{what: "make an identity with a policy", method: "POST", path: "identity/entity", body: `{"name": "e", "policies": ["anything"]}`},
	{what: "change one", method: "POST", path: "identity/entity/name/e", body: `{"policies": ["anything", "kme-auditor"]}`},
	{what: "make a group with a policy", method: "POST", path: "identity/group", body: `{"name": "g", "policies": ["anything"]}`},
	{what: "change it", method: "POST", path: "identity/group/name/g", body: `{"policies": ["anything", "kme-auditor"]}`},
	{what: "make an alias of an identity", method: "POST", path: "identity/entity-alias", body: `{"name": "a", "canonical_id": "ENTITY", "mount_accessor": "APPROLE"}`},
	{what: "list the identities", method: "LIST", path: "identity/entity/name"},
	{what: "make an identity token's key", method: "POST", path: "identity/oidc/key/k", body: `{}`},

	// Mounts.
	{what: "enable a way to log in", method: "POST", path: "sys/auth/other", body: `{"type": "approle"}`},
	{what: "tune one", method: "POST", path: "sys/auth/approle/tune", body: `{"description": "d", "token_type": "default-service"}`},
	{what: "tune it by the path of a mount", method: "POST", path: "sys/mounts/auth/approle/tune", body: `{"description": "d"}`},
	{what: "disable one", method: "DELETE", path: "sys/auth/other"},
	{what: "list the ways to log in", method: "GET", path: "sys/auth"},
	{what: "make another mount", method: "POST", path: "sys/mounts/third", body: `{"type": "kv"}`},
	{what: "make one whose name begins alike", method: "POST", path: "sys/mounts/kme-third", body: `{"type": "kv"}`},
	{what: "mount another kind over the directory", method: "POST", path: "sys/mounts/kme", body: `{"type": "transit"}`, root: 400},
	{what: "tune another mount", method: "POST", path: "sys/mounts/other/tune", body: `{"description": "d"}`},
	{what: "read another mount's settings", method: "GET", path: "sys/mounts/other"},
	{what: "list the mounts", method: "GET", path: "sys/mounts"},
	{what: "read the directory's mount", method: "GET", path: "sys/mounts/kme", allowed: "directory-admin"},
	{what: "read how it is tuned", method: "GET", path: "sys/mounts/kme/tune", allowed: "directory-admin"},
	{what: "describe it", method: "POST", path: "sys/mounts/kme/tune", body: `{"description": "d"}`, allowed: "directory-admin"},
	{what: "make it of version 1", method: "POST", path: "sys/mounts/kme/tune", body: `{"options": {"version": "1"}}`, root: 400},
	{what: "hand clients' headers to it", method: "POST", path: "sys/mounts/kme/tune", body: `{"passthrough_request_headers": ["X-Vault-Token"]}`},
	{what: "take its values' hashes from the audit log", method: "POST", path: "sys/mounts/kme/tune", body: `{"audit_non_hmac_response_keys": ["jws"]}`},
	{what: "change how long a login lives", method: "POST", path: "sys/mounts/kme/tune", body: `{"max_lease_ttl": "87600h"}`},
	{what: "show it without login", method: "POST", path: "sys/mounts/kme/tune", body: `{"listing_visibility": "unauth"}`},
	{what: "choose its program", method: "POST", path: "sys/mounts/kme/tune", body: `{"plugin_version": "v0.0.1"}`, root: 400},
	{what: "move the directory away", method: "POST", path: "sys/remount", body: `{"from": "third", "to": "fourth"}`},
	{what: "disable the directory", method: "DELETE", path: "sys/mounts/kme-third"},

	// The directory's own settings.
	{what: "read how many versions are kept", method: "GET", path: "kme/config", allowed: "directory-admin auditor"},
	{what: "keep more versions", method: "POST", path: "kme/config", body: `{"max_versions": 20}`, allowed: "directory-admin"},
	{what: "insist on compare and set", method: "POST", path: "kme/config", body: `{"cas_required": true}`, allowed: "directory-admin"},
	{what: "have each object deleted after a second", method: "POST", path: "kme/config", body: `{"delete_version_after": "1s"}`},
	{what: "configure another mount", method: "POST", path: "other/config", body: `{"max_versions": 1}`},

	// Another tenant's secrets.
	{what: "read the granted lot", method: "GET", path: "kme/data/lots/L1/manifest", allowed: "factory-publisher auditor operator"},
	{what: "read a lot that was not granted", method: "GET", path: "kme/data/lots/L2/manifest", allowed: "factory-publisher auditor"},
	{what: "read a lot whose name begins alike", method: "GET", path: "kme/data/lots/L10/manifest", allowed: "factory-publisher auditor"},
	{what: "the same, its shard", method: "GET", path: "kme/data/lots/L1-x/shards/000000", allowed: "factory-publisher auditor"},
	{what: "the same, with a dot", method: "GET", path: "kme/data/lots/L1.x/manifest", allowed: "factory-publisher auditor"},
	{what: "read all lots by a star", method: "GET", path: "kme/data/lots/*/manifest", allowed: "factory-publisher auditor", root: 404},
	{what: "read all lots by a plus", method: "GET", path: "kme/data/lots/+/manifest", allowed: "factory-publisher auditor", root: 404},
	{what: "go up from the granted lot", method: "GET", path: "kme/data/lots/L1/shards/%2e%2e%2f%2e%2e%2fL2/manifest", allowed: "auditor", root: 500},
	{what: "read with a slash in the lot's name", method: "GET", path: "kme/data/lots/L1%2fmanifest", allowed: "factory-publisher auditor operator"},
	{what: "read another lot that way", method: "GET", path: "kme/data/lots%2fL2%2fmanifest", allowed: "factory-publisher auditor"},
	{what: "read below a shard", method: "GET", path: "kme/data/lots/L1/shards/000000/x", allowed: "auditor", root: 404},
	{what: "read which keys an object has", method: "GET", path: "kme/subkeys/lots/L2/manifest"},
	{what: "read metadata", method: "GET", path: "kme/metadata/lots/L2/manifest", allowed: "auditor"},
	{what: "list the lots", method: "LIST", path: "kme/metadata/lots", allowed: "factory-publisher auditor"},
	{what: "read on another mount", method: "GET", path: "other/data/lots/L1/manifest"},
	{what: "list another mount", method: "LIST", path: "other/metadata/lots"},

	// What is published stays.
	{what: "change a manifest", method: "POST", path: "kme/data/lots/L1/manifest", body: `{"data": {"jws": "y"}, "options": {"cas": 1}}`},
	{what: "patch it", method: "PATCH", path: "kme/data/lots/L1/manifest", body: `{"data": {"jws": "y"}, "options": {"cas": 2}}`},
	{what: "patch the revocations", method: "PATCH", path: "kme/data/lots/L1/revocations", body: `{"data": {"more": "y"}, "options": {"cas": 1}}`},
	{what: "change metadata", method: "POST", path: "kme/metadata/lots/L1/manifest", body: `{"max_versions": 5}`},
	{what: "delete a manifest", method: "DELETE", path: "kme/data/lots/L1/manifest"},
	{what: "delete a version", method: "POST", path: "kme/delete/lots/L1/manifest", body: `{"versions": [1]}`},
	{what: "take that back", method: "POST", path: "kme/undelete/lots/L1/manifest", body: `{"versions": [1]}`},
	{what: "destroy a version", method: "PUT", path: "kme/destroy/lots/L1/manifest", body: `{"versions": [1]}`},
	{what: "destroy the revocations", method: "PUT", path: "kme/destroy/lots/L1/revocations", body: `{"versions": [1]}`},
	{what: "delete all versions", method: "DELETE", path: "kme/metadata/lots/L1/manifest"},
	{what: "delete all of the revocations", method: "DELETE", path: "kme/metadata/lots/L1/revocations"},

	// Vault itself.
	{what: "read the raw storage", method: "GET", path: "sys/raw/core/keyring", root: 404},
	{what: "list the audit devices", method: "GET", path: "sys/audit"},
	{what: "enable one", method: "POST", path: "sys/audit/a", body: `{"type": "file", "options": {"file_path": "discard"}}`},
	{what: "disable it", method: "DELETE", path: "sys/audit/a"},
	{what: "hash a value as the audit log does", method: "POST", path: "sys/audit-hash/a", body: `{"input": "x"}`, root: 400},
	{what: "list leases", method: "LIST", path: "sys/leases/lookup/auth/approle/login", root: 404},
	{what: "revoke all leases", method: "POST", path: "sys/leases/revoke-prefix/third"},
	{what: "force that", method: "POST", path: "sys/leases/revoke-force/third"},
	{what: "take a snapshot of the storage", method: "GET", path: "sys/storage/raft/snapshot"},
	{what: "read the cluster", method: "GET", path: "sys/storage/raft/configuration"},
	{what: "take a server out of the cluster", method: "POST", path: "sys/storage/raft/remove-peer", body: `{"server_id": "none"}`},
	{what: "read the configuration", method: "GET", path: "sys/config/state/sanitized"},
	{what: "allow a web page", method: "POST", path: "sys/config/cors", body: `{"allowed_origins": "*"}`},
	{what: "register a program", method: "PUT", path: "sys/plugins/catalog/secret/x", body: `{"sha256": "00", "command": "x"}`, root: 500},
	{what: "limit the rate of others", method: "POST", path: "sys/quotas/rate-limit/q", body: `{"path": "other", "rate": 1000}`},
	{what: "rotate the storage's key", method: "PUT", path: "sys/rotate"},
	{what: "count the requests", method: "GET", path: "sys/internal/counters/requests", root: 404},

	// What a login without any policy has, and what it is worth.
	{what: "wrap a value of its own", method: "POST", path: "sys/wrapping/wrap", body: `{"a": "b"}`, allowed: "default"},
	{what: "look up another's wrapped value", method: "POST", path: "sys/wrapping/lookup", body: `{"token": "WRAPPED"}`, allowed: "default"}, // whoever has that token may
	{what: "keep a value in its own cubbyhole", method: "POST", path: "cubbyhole/x", body: `{"a": "b"}`, allowed: "default"},
	{what: "read another's cubbyhole", method: "GET", path: "cubbyhole/victim", allowed: "default", root: 404}, // each token sees its own alone
	{what: "ask what it may do", method: "POST", path: "sys/capabilities-self", body: `{"paths": ["kme/config"]}`, allowed: "default"},
	{what: "ask what another may do", method: "POST", path: "sys/capabilities", body: `{"paths": ["kme/config"], "token": "VICTIM"}`},
	{what: "revoke another's token by its accessor", method: "POST", path: "auth/token/revoke-accessor", body: `{"accessor": "ACCESSOR"}`},
	{what: "seal Vault", method: "PUT", path: "sys/seal"}, // root's last one
}

// Each policy against each of them. What is refused has changed nothing, and what root may not do either shows nothing of a policy.
func TestVaultEscalation(t *testing.T) {
	server := vaulttest.Start(t) // root's own requests would harm another
	_, client := world(t, server)
	root := server.Client(t, server.Root)
	if err := root.Sys().EnableAuthWithOptions("approle", &api.EnableAuthOptions{Type: "approle"}); err != nil {
		t.Fatal(err)
	}
	for _, role := range []string{"kme-factory-publisher", "kme-operator-acme"} {
		if _, err := root.Logical().Write("auth/approle/role/"+role, map[string]any{"token_policies": role}); err != nil {
			t.Fatal(err)
		}
	}
	entity, err := root.Logical().Write("identity/entity", map[string]any{"name": "victim"})
	if err != nil {
		t.Fatal(err)
	}
	victim, err := root.Auth().Token().Create(&api.TokenCreateRequest{Policies: []string{"kme-auditor"}})
	if err != nil {
		t.Fatal(err)
	}
	if status, answer := ask(t, server, victim.Auth.ClientToken, "POST", "cubbyhole/victim", `{"secret": "s"}`); status != 204 {
		t.Fatal(status, answer)
	}
	wrapping := server.Client(t, server.Root)
	wrapping.SetWrappingLookupFunc(func(string, string) string { return "5m" })
	wrapped, err := wrapping.Logical().Write("auth/approle/role/kme-factory-publisher/secret-id", nil)
	if err != nil {
		t.Fatal(err)
	}
	auths, err := root.Sys().ListAuth()
	if err != nil {
		t.Fatal(err)
	}
	fill := strings.NewReplacer("VICTIM", victim.Auth.ClientToken, "ACCESSOR", victim.Auth.Accessor, "WRAPPED", wrapped.WrapInfo.Token,
		"ENTITY", entity.Data["id"].(string), "APPROLE", auths["approle/"].Accessor)
	try := func(token string, i int) (status int, answer string) {
		e := escalations[i]
		var header []string
		switch {
		case e.method == "PATCH":
			header = []string{"Content-Type", "application/merge-patch+json"}
		case e.path == "sys/wrapping/wrap":
			header = []string{"X-Vault-Wrap-TTL", "5m"}
		}
		return ask(t, server, token, e.method, e.path, fill.Replace(e.body), header...)
	}
	if err := root.Sys().TuneMount("kme", api.MountConfigInput{Description: new("d")}); err != nil { // as whoever may will describe it
		t.Fatal(err)
	}
	before := state(t, server)
	for _, role := range slices.Sorted(maps.Keys(client)) {
		for i, e := range escalations {
			status, answer := try(client[role].Token(), i)
			may := e.allowed == "default" || strings.Contains(" "+e.allowed+" ", " "+role+" ")
			switch {
			case !may && status != 403:
				t.Errorf("%s can %s: %s %s: %d %s", role, e.what, e.method, e.path, status, answer)
			case may && status/100 != 2 && status != e.root:
				t.Errorf("%s cannot %s: %s %s: %d %s", role, e.what, e.method, e.path, status, answer)
			}
		}
	}
	after := state(t, server)
	for _, request := range slices.Sorted(maps.Keys(after)) {
		if before[request] != after[request] {
			t.Errorf("what was refused has changed something: %s gives\n%s\nwas\n%s", request, after[request], before[request])
		}
	}
	for i, e := range escalations {
		if status, answer := try(server.Root, i); status != e.root && (e.root != 0 || status/100 != 2) {
			t.Errorf("root's token to %s: %s %s: %d %s", e.what, e.method, e.path, status, answer)
		}
	}
}

// state is who may do what on a server, and all objects of ours: what no refused request may have changed.
func state(t *testing.T, server *vaulttest.Server) map[string]string {
	t.Helper()
	all := map[string]string{}
	show := func(method, path string) []string {
		_, answer := ask(t, server, server.Root, method, path, "")
		var said struct {
			Data map[string]any `json:"data"`
		}
		if err := json.Unmarshal([]byte(answer), &said); err != nil {
			t.Fatalf("%s %s: %v\n%s", method, path, err, answer)
		}
		all[method+" "+path] = fmt.Sprint(said.Data)
		keys, _ := said.Data["keys"].([]any)
		var names []string
		for _, k := range keys {
			names = append(names, k.(string))
		}
		return names
	}
	for _, path := range []string{"sys/mounts", "sys/auth", "sys/audit", "sys/config/cors"} {
		show("GET", path)
	}
	for _, folder := range []string{"sys/policies/acl", "sys/policies/password", "auth/approle/role", "auth/token/roles", "identity/entity/name", "identity/group/name", "sys/quotas/rate-limit"} {
		for _, name := range show("LIST", folder) {
			show("GET", folder+"/"+name)
		}
	}
	for _, mount := range []string{"kme", "other"} {
		for _, lot := range show("LIST", mount+"/metadata/lots") {
			for _, object := range show("LIST", mount+"/metadata/lots/"+strings.TrimSuffix(lot, "/")) {
				show("GET", mount+"/metadata/lots/"+lot+object)
			}
		}
	}
	return all
}

// What each policy needs, and all that it has: of every path that is here, and of every one that is tried above.
func TestVaultCapabilities(t *testing.T) {
	server := vaulttest.Any(t)
	world(t, server)
	need := map[string]map[string]string{
		policies.Publisher: {
			"kme/data/lots/L1/manifest": "create read", "kme/data/lots/L1/shards/000000": "create read",
			"kme/data/lots/L1/revocations": "create read update", "kme/data/lots/L1/revoked/000000": "create read update",
			"kme/metadata/lots": "list", "kme/metadata/lots/L1/shards": "list", "kme/metadata/lots/L1/revoked": "list",
		},
		policies.Auditor: {"kme/data/": "read", "kme/metadata/": "list read", "kme/config": "read"}, // and all below
		policies.Admin: {
			"sys/mounts/kme": "read", "sys/mounts/kme/tune": "read update", "kme/config": "create read update",
		},
		"operator": {
			"kme/data/lots/L1/manifest": "read", "kme/data/lots/L1/shards/000000": "read",
			"kme/data/lots/L1/revocations": "read", "kme/data/lots/L1/revoked/000000": "read",
		},
	}
	paths := []string{
		"kme", "kme/", "kme/data/lots", "kme/data/lots/L1", "kme/data/lots/L1/shards", "kme/data/lots/L1/revoked", "kme/data/lots/L1/other", "kme/data/other",
		"kme/metadata", "kme/detailed-metadata/lots", "kme/delete/lots/L1/shards/000000", "kme/destroy/lots/L1/shards/000000", "kme/undelete/lots/L1/shards/000000",
		"other/config", "other/data/lots/L1/shards/000000", "other/metadata", "auth/approle/role/kme-auditor", "auth/approle/role/kme-auditor/secret-id", "auth/token/create",
		"sys/mounts/kme-other", "sys/mounts/kme/other", "sys/policies/acl/kme-auditor", "sys/policies/acl/kme-kme", "sys/policies/egp/x", "sys/policies/rgp/x", "sys/namespaces/x",
		"sys/remount/status/x", "sys/raw", "sys/step-down", "sys/leases/lookup", "sys/leases/revoke", "sys/replication/status", "sys/config/auditing/request-headers/x",
		"identity/group/id/x", "identity/lookup/entity", "identity/oidc/role/x", "cubbyhole/x",
	}
	for _, e := range escalations {
		if !strings.Contains(e.path, "%") {
			paths = append(paths, e.path)
		}
	}
	for _, has := range need {
		paths = append(paths, slices.Collect(maps.Keys(has))...)
	}
	// wanted: to an operator a lot is its own; to others all lots are alike, and to an auditor all objects.
	wanted := func(role, path string) string {
		if role != "operator" {
			path = regexp.MustCompile(`/lots/(L[^/]+|[*+])/`).ReplaceAllString(path, "/lots/L1/")
		}
		if role == policies.Auditor {
			path = regexp.MustCompile(`^kme/(data|metadata)/.*`).ReplaceAllString(path, "kme/$1/")
		}
		return cmp.Or(need[role][path], "deny")
	}
	slices.Sort(paths)
	paths = slices.Compact(paths)
	root := server.Client(t, server.Root)
	for role := range need {
		policy := policies.Name("kme", role)
		if role == "operator" {
			policy = policies.OperatorName("kme", "acme")
		}
		token, err := root.Auth().Token().Create(&api.TokenCreateRequest{Policies: []string{policy}, NoDefaultPolicy: true, TTL: "10m"})
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			got, err := root.Sys().Capabilities(token.Auth.ClientToken, path)
			if err != nil {
				t.Fatal(err)
			}
			slices.Sort(got)
			if want := wanted(role, path); strings.Join(got, " ") != want {
				t.Errorf("%s on %s has %s, and needs %s", role, path, got, want)
			}
		}
	}
}

// An operator's policy is for one lot, whatever that is called: no name is written into it that a policy would take for more.
func TestOperatorNames(t *testing.T) {
	for _, name := range []string{"", "+", "*", "L*", "L1/+", "../L2", "L1..", "L1\" { capabilities = [\"sudo\"] }\npath \"*", "L1\n", "{{identity.entity.id}}"} {
		if text, err := policies.Operator("kme", "acme", []string{"L1", name}); err == nil {
			t.Errorf("lot %q: %s", name, text)
		}
		if text, err := policies.Operator("kme", name, []string{"L1"}); err == nil {
			t.Errorf("operator %q: %s", name, text)
		}
		if text, err := policies.Operator(name, "acme", []string{"L1"}); err == nil {
			t.Errorf("mount %q: %s", name, text)
		}
		if directory.CheckName(name) == nil {
			t.Errorf("a lot may be called %q", name)
		}
	}
}
