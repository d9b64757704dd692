#!/usr/bin/env bash
# usage: scripts/leaves-nothing.sh COMMAND...
# Runs a command, and fails if it leaves a process, or a file in TMPDIR. It names what is left, and ends or removes it.
# TMPDIR is a folder for this tree alone, always the same. All processes of the run inherit it: this shows which
# processes belong to the run. Since it is always the same, go test can cache results of tests that read TMPDIR.
set -uo pipefail
dir=/tmp/kmehsm-$(printf %s "$PWD" | cksum | cut -d ' ' -f 1)

# running: lists the processes of this run
running() {
	local file line
	grep -lsF "TMPDIR=$dir" /proc/[0-9]*/environ | while read -r file; do
		line=$(tr '\0' ' ' 2>/dev/null <"${file%environ}cmdline")
		[ -z "$line" ] || printf '%s %s\n' "${file//[^0-9]/}" "$line"
	done
}

others=$(running)
if [ -n "$others" ]; then
	printf 'the tests of this tree run already, or a run was killed and left these: end them first\n%s\n' "$others" >&2
	exit 1
fi
rm -rf "$dir"
mkdir -m 711 "$dir" || exit
trap : INT TERM HUP # the command gets them too; what it leaves is looked for all the same
TMPDIR=$dir "$@"
status=$?

for _ in {1..300}; do # what is ending already
	[ -n "$(running)" ] || break
	sleep 0.1
done
left=$(running)
if [ -n "$left" ]; then
	printf 'left by the run, and ended now:\n%s\n' "$left" >&2
	cut -d ' ' -f 1 <<<"$left" | xargs kill -KILL 2>/dev/null
	status=1
fi
files=$(find "$dir" -mindepth 1 -maxdepth 2)
if [ -n "$files" ]; then
	printf 'left by the run in TMPDIR, and removed now:\n%s\n' "$files" >&2
	status=1
fi
rm -rf "$dir"
exit $status
