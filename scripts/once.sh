#!/usr/bin/env bash
# usage: scripts/once.sh NAME INPUTS COMMAND...
# Runs a command, unless it has passed in this tree with the same INPUTS: a text with everything that the result depends
# on. var/test/NAME.passed has the digest of INPUTS.
set -euo pipefail
name=$1 passed=var/test/$1.passed inputs=$(sha256sum <<<"$2")
shift 2
if [ "$inputs" = "$(cat "$passed" 2>/dev/null)" ]; then
	printf '%s: it has passed, and nothing has changed that it depends on (%s)\n' "$name" "$passed" >&2
	exit
fi
"$@"
mkdir -p var/test
printf '%s\n' "$inputs" >"$passed"
