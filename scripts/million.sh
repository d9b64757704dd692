#!/usr/bin/env bash
# Provisions one lot of DEVICES devices (a million) with one command, and publishes it to a Vault on Raft storage. It
# shows progress and rate, and prints the most memory that the command has used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
devices=${DEVICES:-1000000}
dir=$PWD/var/million
. scripts/line-on-vault.sh
flags=(--directory vault:kme --state "$dir/factory")
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
