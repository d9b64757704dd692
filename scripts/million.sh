#!/usr/bin/env bash
# One lot of DEVICES devices (a million) in one command, published to a Vault on Raft storage: its progress, its rate, and
# the memory that it took at most.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
devices=${DEVICES:-1000000}
dir=$PWD/var/million
export PATH="$PWD/bin:$PATH"
rm -rf "$dir"
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
	sleep 0.1
done
VAULT_ADDR=$(jq -r .address "$dir/vault.out")
VAULT_TOKEN=$(jq -r .root_token "$dir/vault/init.json")
export VAULT_ADDR VAULT_TOKEN
flags=(--directory vault:kme --state "$dir/factory")
factory init --state "$dir/factory" >/dev/null
factory vault setup --directory vault:kme >/dev/null
set -x
factory lot create M1 "${flags[@]}" --tac 35209900 --first 0 --count "$devices"
factory lot provision M1 "${flags[@]}" &
pid=$!
{ set +x; } 2>/dev/null
peak=0
while [ -r "/proc/$pid/status" ]; do
	now=$(awk '/^VmHWM/ {print $2}' "/proc/$pid/status" 2>/dev/null || true)
	[ -z "$now" ] || peak=$now
	sleep 0.5
done
wait "$pid"
echo "at most $((peak / 1024)) MiB of memory"
set -x
factory lot verify M1 "${flags[@]}"
