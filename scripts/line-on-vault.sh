# To be sourced, with dir set: a new folder dir, a token "factory" and a Vault on Raft storage in it, the line's keys and the
# mount kme. Vault ends with the script.
# shellcheck shell=bash
export PATH="$PWD/bin:$PATH"
rm -rf "${dir:?}"
mkdir -p "$dir"
./softhsm-setup.sh --dir "$dir/softhsm" factory >/dev/null
# shellcheck source=/dev/null
. "$dir/softhsm/env"
export KMEHSM_TOKEN=$FACTORY_TOKEN
bin/vaultrun -listen 127.0.0.1:0 -dir "$dir/vault" -log-level error >"$dir/vault.out" 2>"$dir/vault.log" &
vault=$!
trap 'kill "$vault"; wait "$vault" || true' EXIT
for _ in {1..600}; do
	[ -s "$dir/vault.out" ] && break
	kill -0 "$vault" 2>/dev/null || { cat "$dir/vault.log" >&2 && exit 1; }
	sleep 0.1
done
VAULT_ADDR=$(jq -r .address "$dir/vault.out")
VAULT_TOKEN=$(jq -r .root_token "$dir/vault/init.json")
export VAULT_ADDR VAULT_TOKEN
factory init --state "$dir/factory" >/dev/null
factory vault setup --directory vault:kme >/dev/null
