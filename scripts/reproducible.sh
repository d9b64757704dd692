#!/usr/bin/env bash
# usage: scripts/reproducible.sh [--warm] Builds the release twice at the same time, from two folders and with an empty
# cache each, and compares the SHA-256 of all files. With --warm the Go code is compiled once, in this machine's cache;
# it is linked, and kme.fdx is made, twice, without SBOM, and what was built is left in bin/packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dir=$(mktemp -d) warm=${1:-}
trap 'chmod -R u+w "$dir" && rm -rf "$dir"' EXIT

# build NAME UMASK COMMAND...: in the folder NAME, with this umask, by way of a command
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

# Another machine has another name; only root can have one for a moment.
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
