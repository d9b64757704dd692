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
func ask(t *testing.T, server *vaulttest.Server, token, method, path, body string, header ...string) (int, string) {
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

const anything = `{"policy": "path \"*\" { capabilities = [\"create\", \"read\", \"update\", \"delete\", \"sudo\"] }"}`

// What the holder of a policy would try, to get more than it gives. Vault's default policy, which each login has too,
// is tried along.
var escalations = []struct {
	what    string
	request string // method and path
	body    string
	allowed string // the policies that may, or "default": whoever has a login
	root    int    // what root's token is answered, where that is no success
}{
	// Policies.
	{"write a policy", "PUT sys/policies/acl/anything", anything, "", 0},
	{"write one by its older path", "PUT sys/policy/anything", anything, "", 0},
	{"write a policy of the directory", "PUT sys/policies/acl/kme-operator-x", anything, "", 0},
	{"write its own policy", "PUT sys/policies/acl/kme-directory-admin", anything, "", 0},
	{"write the publisher's", "PUT sys/policy/kme-factory-publisher", anything, "", 0},
	{"write the operator's", "PUT sys/policies/acl/kme-operator-acme", anything, "", 0},
	{"write the default policy", "PUT sys/policies/acl/default", anything, "", 0},
	{"read a policy of the directory", "GET sys/policies/acl/kme-auditor", "", "", 0},
	{"list the policies", "LIST sys/policies/acl", "", "", 0},
	{"list them by the older path", "GET sys/policy", "", "", 0},
	{
		"write a policy for passwords", "PUT sys/policies/password/p",
		`{"policy": "length = 20\nrule \"charset\" { charset = \"abcde\" }"}`, "", 0,
	},
	{"delete a policy", "DELETE sys/policies/acl/kme-operator-x", "", "", 0},

	// Logins that have another policy.
	{
		"make an AppRole of the directory with root's children", "POST auth/approle/role/kme-operator-x",
		`{"token_policies": "kme-factory-publisher,anything"}`, "", 0,
	},
	{
		"change the publisher's AppRole", "POST auth/approle/role/kme-factory-publisher/policies",
		`{"token_policies": "anything"}`, "", 0,
	},
	{"make another AppRole", "POST auth/approle/role/x", `{"token_policies": "anything"}`, "", 0},
	{"read the publisher's role id", "GET auth/approle/role/kme-factory-publisher/role-id", "", "", 0},
	{"set it", "POST auth/approle/role/kme-factory-publisher/role-id", `{"role_id": "known"}`, "", 0},
	{"have a secret id of the publisher", "POST auth/approle/role/kme-factory-publisher/secret-id", "", "", 0},
	{"set one", "POST auth/approle/role/kme-factory-publisher/custom-secret-id", `{"secret_id": "known"}`, "", 0},
	{"list the AppRoles", "LIST auth/approle/role", "", "", 0},
	{"delete an AppRole", "DELETE auth/approle/role/kme-operator-x", "", "", 0},
	{"make a token with root's policy", "POST auth/token/create", `{"policies": ["root"]}`, "", 0},
	{"make a token with its own", "POST auth/token/create", `{}`, "", 0},
	{"make a token without parent", "POST auth/token/create-orphan", `{"policies": ["root"]}`, "", 0},
	{"make a role of tokens", "POST auth/token/roles/r", `{"allowed_policies": "anything", "orphan": true}`, "", 0},
	{"make a token of a role", "POST auth/token/create/r", `{"policies": ["anything"]}`, "", 0},
	{"list the tokens", "LIST auth/token/accessors", "", "", 0},
	{"look up another's token", "POST auth/token/lookup", `{"token": "VICTIM"}`, "", 0},
	{"look it up by its accessor", "POST auth/token/lookup-accessor", `{"accessor": "ACCESSOR"}`, "", 0},
	{"look up its own token", "GET auth/token/lookup-self", "", "default", 0},

	// Policies by way of the identity that a login has.
	{"make an identity with a policy", "POST identity/entity", `{"name": "e", "policies": ["anything"]}`, "", 0},
	{"change one", "POST identity/entity/name/e", `{"policies": ["anything", "kme-auditor"]}`, "", 0},
	{"make a group with a policy", "POST identity/group", `{"name": "g", "policies": ["anything"]}`, "", 0},
	{"change it", "POST identity/group/name/g", `{"policies": ["anything", "kme-auditor"]}`, "", 0},
	{
		"make an alias of an identity", "POST identity/entity-alias",
		`{"name": "a", "canonical_id": "ENTITY", "mount_accessor": "APPROLE"}`, "", 0,
	},
	{"list the identities", "LIST identity/entity/name", "", "", 0},
	{"make an identity token's key", "POST identity/oidc/key/k", `{}`, "", 0},

	// Mounts.
	{"enable a way to log in", "POST sys/auth/other", `{"type": "approle"}`, "", 0},
	{"tune one", "POST sys/auth/approle/tune", `{"description": "d", "token_type": "default-service"}`, "", 0},
	{"tune it by the path of a mount", "POST sys/mounts/auth/approle/tune", `{"description": "d"}`, "", 0},
	{"disable one", "DELETE sys/auth/other", "", "", 0},
	{"list the ways to log in", "GET sys/auth", "", "", 0},
	{"make another mount", "POST sys/mounts/third", `{"type": "kv"}`, "", 0},
	{"make one whose name begins alike", "POST sys/mounts/kme-third", `{"type": "kv"}`, "", 0},
	{"mount another kind over the directory", "POST sys/mounts/kme", `{"type": "transit"}`, "", 400},
	{"tune another mount", "POST sys/mounts/other/tune", `{"description": "d"}`, "", 0},
	{"read another mount's settings", "GET sys/mounts/other", "", "", 0},
	{"list the mounts", "GET sys/mounts", "", "", 0},
	{"read the directory's mount", "GET sys/mounts/kme", "", "directory-admin", 0},
	{"read how it is tuned", "GET sys/mounts/kme/tune", "", "directory-admin", 0},
	{"describe it", "POST sys/mounts/kme/tune", `{"description": "d"}`, "directory-admin", 0},
	{"make it of version 1", "POST sys/mounts/kme/tune", `{"options": {"version": "1"}}`, "", 400},
	{
		"hand clients' headers to it", "POST sys/mounts/kme/tune",
		`{"passthrough_request_headers": ["X-Vault-Token"]}`, "", 0,
	},
	{
		"take its values' hashes from the audit log", "POST sys/mounts/kme/tune",
		`{"audit_non_hmac_response_keys": ["jws"]}`, "", 0,
	},
	{"change how long a login lives", "POST sys/mounts/kme/tune", `{"max_lease_ttl": "87600h"}`, "", 0},
	{"show it without login", "POST sys/mounts/kme/tune", `{"listing_visibility": "unauth"}`, "", 0},
	{"choose its program", "POST sys/mounts/kme/tune", `{"plugin_version": "v0.0.1"}`, "", 400},
	{"move the directory away", "POST sys/remount", `{"from": "third", "to": "fourth"}`, "", 0},
	{"disable the directory", "DELETE sys/mounts/kme-third", "", "", 0},

	// The directory's own settings.
	{"read how many versions are kept", "GET kme/config", "", "directory-admin auditor", 0},
	{"keep more versions", "POST kme/config", `{"max_versions": 20}`, "directory-admin", 0},
	{"insist on compare and set", "POST kme/config", `{"cas_required": true}`, "directory-admin", 0},
	{"have each object deleted after a second", "POST kme/config", `{"delete_version_after": "1s"}`, "", 0},
	{"configure another mount", "POST other/config", `{"max_versions": 1}`, "", 0},

	// Another tenant's secrets.
	{"read the granted lot", "GET kme/data/lots/L1/manifest", "", "factory-publisher auditor operator", 0},
	{"read a lot that was not granted", "GET kme/data/lots/L2/manifest", "", "factory-publisher auditor", 0},
	{"read a lot whose name begins alike", "GET kme/data/lots/L10/manifest", "", "factory-publisher auditor", 0},
	{"the same, its shard", "GET kme/data/lots/L1-x/shards/000000", "", "factory-publisher auditor", 0},
	{"the same, with a dot", "GET kme/data/lots/L1.x/manifest", "", "factory-publisher auditor", 0},
	{"read all lots by a star", "GET kme/data/lots/*/manifest", "", "factory-publisher auditor", 404},
	{"read all lots by a plus", "GET kme/data/lots/+/manifest", "", "factory-publisher auditor", 404},
	{"go up from the granted lot", "GET kme/data/lots/L1/shards/%2e%2e%2f%2e%2e%2fL2/manifest", "", "auditor", 500},
	{
		"read with a slash in the lot's name", "GET kme/data/lots/L1%2fmanifest",
		"", "factory-publisher auditor operator", 0,
	},
	{"read another lot that way", "GET kme/data/lots%2fL2%2fmanifest", "", "factory-publisher auditor", 0},
	{"read below a shard", "GET kme/data/lots/L1/shards/000000/x", "", "auditor", 404},
	{"read which keys an object has", "GET kme/subkeys/lots/L2/manifest", "", "", 0},
	{"read metadata", "GET kme/metadata/lots/L2/manifest", "", "auditor", 0},
	{"list the lots", "LIST kme/metadata/lots", "", "factory-publisher auditor", 0},
	{"read on another mount", "GET other/data/lots/L1/manifest", "", "", 0},
	{"list another mount", "LIST other/metadata/lots", "", "", 0},

	// What is published stays.
	{"change a manifest", "POST kme/data/lots/L1/manifest", `{"data": {"jws": "y"}, "options": {"cas": 1}}`, "", 0},
	{"patch it", "PATCH kme/data/lots/L1/manifest", `{"data": {"jws": "y"}, "options": {"cas": 2}}`, "", 0},
	{
		"patch the revocations", "PATCH kme/data/lots/L1/revocations",
		`{"data": {"more": "y"}, "options": {"cas": 1}}`, "", 0,
	},
	{"change metadata", "POST kme/metadata/lots/L1/manifest", `{"max_versions": 5}`, "", 0},
	{"delete a manifest", "DELETE kme/data/lots/L1/manifest", "", "", 0},
	{"delete a version", "POST kme/delete/lots/L1/manifest", `{"versions": [1]}`, "", 0},
	{"take that back", "POST kme/undelete/lots/L1/manifest", `{"versions": [1]}`, "", 0},
	{"destroy a version", "PUT kme/destroy/lots/L1/manifest", `{"versions": [1]}`, "", 0},
	{"destroy the revocations", "PUT kme/destroy/lots/L1/revocations", `{"versions": [1]}`, "", 0},
	{"delete all versions", "DELETE kme/metadata/lots/L1/manifest", "", "", 0},
	{"delete all of the revocations", "DELETE kme/metadata/lots/L1/revocations", "", "", 0},

	// Vault itself.
	{"read the raw storage", "GET sys/raw/core/keyring", "", "", 404},
	{"list the audit devices", "GET sys/audit", "", "", 0},
	{"enable one", "POST sys/audit/a", `{"type": "file", "options": {"file_path": "discard"}}`, "", 0},
	{"disable it", "DELETE sys/audit/a", "", "", 0},
	{"hash a value as the audit log does", "POST sys/audit-hash/a", `{"input": "x"}`, "", 400},
	{"list leases", "LIST sys/leases/lookup/auth/approle/login", "", "", 404},
	{"revoke all leases", "POST sys/leases/revoke-prefix/third", "", "", 0},
	{"force that", "POST sys/leases/revoke-force/third", "", "", 0},
	{"take a snapshot of the storage", "GET sys/storage/raft/snapshot", "", "", 0},
	{"read the cluster", "GET sys/storage/raft/configuration", "", "", 0},
	{"take a server out of the cluster", "POST sys/storage/raft/remove-peer", `{"server_id": "none"}`, "", 0},
	{"read the configuration", "GET sys/config/state/sanitized", "", "", 0},
	{"allow a web page", "POST sys/config/cors", `{"allowed_origins": "*"}`, "", 0},
	{"register a program", "PUT sys/plugins/catalog/secret/x", `{"sha256": "00", "command": "x"}`, "", 500},
	{"limit the rate of others", "POST sys/quotas/rate-limit/q", `{"path": "other", "rate": 1000}`, "", 0},
	{"rotate the storage's key", "PUT sys/rotate", "", "", 0},
	{"count the requests", "GET sys/internal/counters/requests", "", "", 404},

	// What a login without any policy has, and what it is worth.
	{"wrap a value of its own", "POST sys/wrapping/wrap", `{"a": "b"}`, "default", 0},
	{
		"look up another's wrapped value", "POST sys/wrapping/lookup",
		`{"token": "WRAPPED"}`, "default", 0,
	}, // whoever has that token may
	{"keep a value in its own cubbyhole", "POST cubbyhole/x", `{"a": "b"}`, "default", 0},
	{"read another's cubbyhole", "GET cubbyhole/victim", "", "default", 404}, // each token sees its own alone
	{"ask what it may do", "POST sys/capabilities-self", `{"paths": ["kme/config"]}`, "default", 0},
	{"ask what another may do", "POST sys/capabilities", `{"paths": ["kme/config"], "token": "VICTIM"}`, "", 0},
	{"revoke another's token by its accessor", "POST auth/token/revoke-accessor", `{"accessor": "ACCESSOR"}`, "", 0},
	{"seal Vault", "PUT sys/seal", "", "", 0}, // root's last one
}

// Each policy against each of them. What is refused has changed nothing, and what root may not do either shows
// nothing of a policy.
func TestVaultEscalation(t *testing.T) {
	server := vaulttest.Start(t) // root's own requests would harm another
	_, client := world(t, server)
	root := server.Client(t, server.Root)
	if err := root.Sys().EnableAuthWithOptions("approle", &api.EnableAuthOptions{Type: "approle"}); err != nil {
		t.Fatal(err)
	}
	for _, role := range []string{"kme-factory-publisher", "kme-operator-acme"} {
		if _, err := root.Logical().Write("auth/approle/role/"+role,
			map[string]any{"token_policies": role}); err != nil {
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
	if status, answer := ask(t, server, victim.Auth.ClientToken, "POST", "cubbyhole/victim",
		`{"secret": "s"}`); status != 204 {
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
	fill := strings.NewReplacer("VICTIM", victim.Auth.ClientToken, "ACCESSOR", victim.Auth.Accessor, "WRAPPED",
		wrapped.WrapInfo.Token,
		"ENTITY", entity.Data["id"].(string), "APPROLE", auths["approle/"].Accessor)
	try := func(token string, i int) (status int, answer string) {
		e := escalations[i]
		method, path, _ := strings.Cut(e.request, " ")
		var header []string
		switch {
		case method == "PATCH":
			header = []string{"Content-Type", "application/merge-patch+json"}
		case path == "sys/wrapping/wrap":
			header = []string{"X-Vault-Wrap-TTL", "5m"}
		}
		return ask(t, server, token, method, path, fill.Replace(e.body), header...)
	}
	if status, answer := ask(t, server, server.Root, "POST", "sys/mounts/kme/tune",
		`{"description": "d"}`); status != 204 {
		t.Fatal(status, answer) // it is described as whoever may will describe it
	}
	before := state(t, server)
	for _, role := range slices.Sorted(maps.Keys(client)) {
		for i, e := range escalations {
			status, answer := try(client[role].Token(), i)
			may := e.allowed == "default" || strings.Contains(" "+e.allowed+" ", " "+role+" ")
			switch {
			case !may && status != 403:
				t.Errorf("%s can %s: %s: %d %s", role, e.what, e.request, status, answer)
			case may && status/100 != 2 && status != e.root:
				t.Errorf("%s cannot %s: %s: %d %s", role, e.what, e.request, status, answer)
			}
		}
	}
	after := state(t, server)
	for _, request := range slices.Sorted(maps.Keys(after)) {
		if before[request] != after[request] {
			t.Errorf("what was refused has changed something: %s gives\n%s\nwas\n%s", request, after[request],
				before[request])
		}
	}
	for i, e := range escalations {
		if status, answer := try(server.Root, i); status != e.root && (e.root != 0 || status/100 != 2) {
			t.Errorf("root's token to %s: %s: %d %s", e.what, e.request, status, answer)
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
	for _, folder := range []string{"sys/policies/acl", "sys/policies/password", "auth/approle/role",
		"auth/token/roles", "identity/entity/name", "identity/group/name", "sys/quotas/rate-limit"} {
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
			"kme/data/lots/L1/revocations":    "create read update",
			"kme/data/lots/L1/revoked/000000": "create read update", "kme/metadata/lots": "list",
			"kme/metadata/lots/L1/shards": "list", "kme/metadata/lots/L1/revoked": "list",
		},
		policies.Auditor: {"kme/data/": "read", "kme/metadata/": "list read", "kme/config": "read"}, // and all below
		policies.Admin: {
			"sys/mounts/kme": "read", "sys/mounts/kme/tune": "read update", "kme/config": "read update",
		},
		"operator": {
			"kme/data/lots/L1/manifest": "read", "kme/data/lots/L1/shards/000000": "read",
			"kme/data/lots/L1/revocations": "read", "kme/data/lots/L1/revoked/000000": "read",
		},
	}
	paths := []string{
		"kme", "kme/", "kme/data/lots", "kme/data/lots/L1", "kme/data/lots/L1/shards", "kme/data/lots/L1/revoked",
		"kme/data/lots/L1/other", "kme/data/other", "kme/metadata", "kme/detailed-metadata/lots",
		"kme/delete/lots/L1/shards/000000", "kme/destroy/lots/L1/shards/000000", "kme/undelete/lots/L1/shards/000000",
		"other/config", "other/data/lots/L1/shards/000000", "other/metadata", "auth/approle/role/kme-auditor",
		"auth/approle/role/kme-auditor/secret-id", "auth/token/create", "sys/mounts/kme-other", "sys/mounts/kme/other",
		"sys/policies/acl/kme-auditor", "sys/policies/acl/kme-kme", "sys/policies/egp/x", "sys/policies/rgp/x",
		"sys/namespaces/x", "sys/remount/status/x", "sys/raw", "sys/step-down", "sys/leases/lookup",
		"sys/leases/revoke", "sys/replication/status", "sys/config/auditing/request-headers/x", "identity/group/id/x",
		"identity/lookup/entity", "identity/oidc/role/x", "cubbyhole/x",
	}
	for _, e := range escalations {
		if _, path, _ := strings.Cut(e.request, " "); !strings.Contains(path, "%") {
			paths = append(paths, path)
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
		token, err := root.Auth().Token().Create(&api.TokenCreateRequest{Policies: []string{policy},
			NoDefaultPolicy: true, TTL: "10m"})
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

// An operator's policy is for one lot, whatever that is called: no name is written into it that a policy would take
// for more.
func TestOperatorNames(t *testing.T) {
	for _, name := range []string{"", "+", "*", "L*", "L1/+", "../L2", "L1..",
		"L1\" { capabilities = [\"sudo\"] }\npath \"*", "L1\n", "{{identity.entity.id}}"} {
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
	// Its auditor's policy would be that of an operator "auditor" of the mount kme.
	// They would have the policies of operators of the mount kme: auditor, b-auditor and b-operator-c.
	for _, mount := range []string{"kme-operator", "kme-operator-b"} {
		if text, err := policies.Of(mount, policies.Auditor); err == nil {
			t.Errorf("mount %s: %s", mount, text)
		}
		if text, err := policies.Operator(mount, "c", []string{"L1"}); err == nil {
			t.Errorf("mount %s: %s", mount, text)
		}
	}
}
