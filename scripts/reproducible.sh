#!/usr/bin/env bash
# usage: scripts/reproducible.sh [--warm]
# Builds the release twice at the same time, in two folders, each with an empty cache, and compares the SHA-256 of all
# files. With --warm, it compiles the Go code once, with this machine's cache, and only links the programs and makes
# kme.fdx twice; it makes no SBOM, and leaves the result in bin/packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dir=$(mktemp -d) warm=${1:-}
trap 'chmod -R u+w "$dir" && rm -rf "$dir"' EXIT

# build NAME UMASK COMMAND...: builds in the folder NAME, with this umask, through a command
build() {
	local from=$dir/$1 programs=--programs
	mkdir -p "$from/tmp"
	git clone -q . "$from/from"
	if [ "$warm" != --warm ]; then
		export GOCACHE=$from/cache
		programs=
	fi
	umask "$2"
	export TMPDIR=$from/tmp
	"${@:3}" "$from/from/scripts/release.sh" "$from/out" $programs >/dev/null
}

# Another machine has another name. Only root can change the name for a moment.
elsewhere=(env)
if unshare --uts true 2>/dev/null; then
	# shellcheck disable=SC2016 # the other shell's
	elsewhere=(unshare --uts sh -c 'hostname elsewhere && exec "$@"' sh)
fi
(build one 022 env) &
one=$!
(build a-second 077 "${elsewhere[@]}") &
second=$!
wait $one
wait $second
diff -u "$dir"/{one,a-second}/out/SHA256SUMS
diff -r "$dir"/{one,a-second}/out
echo 'built twice, and the same, byte by byte:'
cat "$dir/one/out/SHA256SUMS"
if [ "$warm" = --warm ]; then
	mkdir -p bin
	rm -rf bin/packages
	mv "$dir/one/out" bin/packages
fi
