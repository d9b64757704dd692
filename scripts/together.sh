#!/usr/bin/env bash
# usage: scripts/together.sh COMMAND...
# Runs shell commands at the same time, and fails if one of them fails. It prints their outputs one after the other.
set -uo pipefail
logs=$(mktemp -d) running=()
trap 'rm -rf "$logs"' EXIT
for command in "${@:2}"; do
	bash -c "$command" >"$logs/${#running[@]}" 2>&1 &
	running+=($!)
done
bash -c "$1"
status=$?
for i in "${!running[@]}"; do
	wait "${running[i]}" || status=1
	cat "$logs/$i"
done
exit $status
