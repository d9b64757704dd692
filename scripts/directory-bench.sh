#!/usr/bin/env bash
# Measures how many devices a second a line provisions into a folder, into a Vault on Raft storage, and into a Vault
# with a record for each device, with one token. It prints the medians of PAIRS runs of DEVICES devices.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
devices=${DEVICES:-10000} pairs=${PAIRS:-5}
dir=$PWD/var/directory-bench
. scripts/line-on-vault.sh

# provision DIRECTORY LOT SHARD-SIZE COUNT: prints devices a second
provision() {
	factory lot create "$2" --state "$dir/factory" --directory "$1" --tac "$tac" --first 0 --count "$4" \
		--bits 2048 --shard-size "$3" >/dev/null
	factory lot provision "$2" --state "$dir/factory" --directory "$1" --out "$dir/out" --json 2>/dev/null |
		jq '.devices / .seconds | round'
}
median() { sort -n | awk '{v[NR] = $1} END {print v[int((NR + 1) / 2)], "(" v[1] " to " v[NR] ")"}'; }
for i in $(seq "$pairs"); do
	tac=$((35209900 + i)) # an IMEI is in one lot, whatever the directory
	provision "file:$dir/files" "F$i" 256 "$devices" >>"$dir/files.txt"
	tac=$((35209930 + i))
	provision vault:kme "V$i" 256 "$devices" >>"$dir/vault.txt"
	tac=$((35209960 + i))
	provision vault:kme "R$i" 1 $((devices / 5)) >>"$dir/records.txt"
done
echo "files, shards of 256:    $(median <"$dir/files.txt") devices a second"
echo "Vault, shards of 256:    $(median <"$dir/vault.txt") devices a second"
echo "Vault, a record each:    $(median <"$dir/records.txt") devices a second"
