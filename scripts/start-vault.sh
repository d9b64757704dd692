# To be sourced, with dir set: starts a Vault on Raft storage in dir, process $vault, and sets VAULT_ADDR and
# VAULT_TOKEN. The caller ends the process.
# shellcheck shell=bash
: "${dir:?}"
bin/vaultrun -listen 127.0.0.1:0 -dir "$dir/vault" -log-level error >"$dir/vault.out" 2>"$dir/vault.log" &
vault=$!
for _ in {1..600}; do
	[ -s "$dir/vault.out" ] && break
	kill -0 "$vault" 2>/dev/null || { cat "$dir/vault.log" >&2 && exit 1; }
	sleep 0.1
done
VAULT_ADDR=$(jq -r .address "$dir/vault.out")
VAULT_TOKEN=$(jq -r .root_token "$dir/vault/init.json")
export VAULT_ADDR VAULT_TOKEN
