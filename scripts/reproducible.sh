#!/usr/bin/env bash
# usage: scripts/reproducible.sh [--warm] Builds the release twice, from two folders and with an empty cache each, and
# compares the SHA-256 of all files. With --warm the Go code is compiled once, in this machine's cache; it is linked,
# and kme.fdx is made, twice, without SBOM.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dir=$(mktemp -d)
trap 'chmod -R u+w "$dir" && rm -rf "$dir"' EXIT
for build in one a-second; do
	programs=--programs elsewhere=()
	# Another machine has another name; only root can have one for a moment.
	if [ $build = a-second ] && unshare --uts true 2>/dev/null; then
		# shellcheck disable=SC2016 # the other shell's
		elsewhere=(unshare --uts sh -c 'hostname elsewhere && exec "$@"' sh)
	fi
	if [ "${1:-}" != --warm ]; then
		export GOCACHE=$dir/$build/cache
		programs=
	fi
	mkdir -p "$dir/$build/tmp"
	git clone -q . "$dir/$build/from"
	(
		umask "$([ $build = one ] && echo 022 || echo 077)"
		export TMPDIR=$dir/$build/tmp
		"${elsewhere[@]}" "$dir/$build/from/scripts/release.sh" "$dir/$build/out" $programs >/dev/null
	)
done
cd "$dir"
diff -u one/out/SHA256SUMS a-second/out/SHA256SUMS
diff -r one/out a-second/out
echo "built twice, and the same, byte by byte:"
cat one/out/SHA256SUMS
