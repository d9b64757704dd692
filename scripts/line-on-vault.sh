# To be sourced, with dir set: makes the folder dir anew, with the tokens "factory" and "operator", a Vault on Raft
# storage with the mount kme, and the line's keys. Vault ends with the script.
# shellcheck shell=bash
export PATH="$PWD/bin:$PATH"
rm -rf "${dir:?}"
mkdir -p "$dir"
./softhsm-setup.sh --dir "$dir/softhsm" factory operator >/dev/null
# shellcheck source=/dev/null
. "$dir/softhsm/env"
export KMEHSM_TOKEN=$FACTORY_TOKEN
# shellcheck source=scripts/start-vault.sh
. scripts/start-vault.sh
trap 'kill "$vault"; wait "$vault" || true' EXIT
factory init --state "$dir/factory" >/dev/null
factory vault setup --directory vault:kme >/dev/null
