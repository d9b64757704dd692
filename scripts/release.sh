#!/usr/bin/env bash
# usage: scripts/release.sh DIR [--programs]
# Builds the release of the last commit, from a clone, into the new folder DIR: factory, keysvc and mesim; kme.fdx, if
# its headers are installed; a .deb and a .rpm of each; an archive with all of them, the pages and deploy/;
# CHANGELOG.md; the SBOM kmehsm.cdx.json (CycloneDX), except with --programs; and SHA256SUMS. The same commit, Go, C
# compiler and headers give the same bytes on every machine: scripts/reproducible.sh shows it.
set -euo pipefail
shopt -s inherit_errexit
out=$(realpath -m "$1") sbom_too=true
[ "${2:-}" != --programs ] || sbom_too=false
CYCLONEDX_GOMOD=github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v1.10.0

die() {
	printf 'scripts/release.sh: %s\n' "$1" >&2
	exit 1
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -z "$(git status --porcelain)" ] || echo 'scripts/release.sh: what is not committed is not in the release' >&2
rm -rf "$out"
mkdir -p "$out"
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
git clone -q . "$source"
cd "$source"
# Nothing of this shell's environment goes into the programs.
unset GOFLAGS GOWORK GOAMD64 GOARM64 GOEXPERIMENT GODEBUG
unset CGO_CFLAGS CGO_CPPFLAGS CGO_CXXFLAGS CGO_LDFLAGS CFLAGS LDFLAGS CPATH
for name in GOPROXY GOSUMDB GONOSUMDB GOPRIVATE GOCACHE GOMODCACHE; do # where modules come from, and are kept
	export "$name=$(go env $name)"
done
export GOENV=off CGO_ENABLED=1 LC_ALL=C TZ=UTC
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH

go build -trimpath -buildvcs=true -ldflags='-s -w' -o "$out/" ./cmd/...
for program in factory keysvc mesim; do
	[[ $("$out/$program" --version) == *"commit $(git rev-parse HEAD),"* ]] ||
		die "$program --version does not name the commit"
done
headers='#include <freeDiameter/extension.h>
#include <curl/curl.h>'
cc=$(go env CC)
if $cc -E -xc - <<<"$headers" >/dev/null 2>&1; then
	make -s -C plugins/freediameter CC="$cc" OUT="$out" "$out/kme.fdx"
	strip --strip-unneeded "$out/kme.fdx"
else
	echo 'scripts/release.sh: without kme.fdx: scripts/deps.sh plugin installs what it is built with' >&2
fi

cd "$out"
programs=(*)
sha256sum -- "${programs[@]}" >SHA256SUMS

# finish: makes packages and the archive of the programs, and the sums of all files
finish() {
	local version name
	# A tag names a release. A commit without a tag comes after the last tag.
	if version=$(git -C "$source" describe --tags --match 'v[0-9]*' 2>/dev/null); then
		version=$(sed -E 's/^v//; s/-([0-9]+)-g/+\1.g/; s/-/~/g' <<<"$version")
	else
		version=0.0.0+$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y%m%d%H%M%S)
		version+=.g$(git -C "$source" rev-parse --short=12 HEAD)
	fi
	"$source/scripts/packages.sh" "$out" "$out" "$version" >/dev/null
	cp "$source/CHANGELOG.md" .
	name=kmehsm-$version-linux-$(go env GOARCH)
	mkdir "$source/$name"
	cp -r -- "${programs[@]}" "$source"/{README.md,CHANGELOG.md,LICENSE,SECURITY.md,docs,deploy,policies} \
		"$source/$name"
	tar -C "$source" --sort=name --owner=0 --group=0 --numeric-owner --mode=go=u-w --mtime="@$SOURCE_DATE_EPOCH" \
		-c "$name" | gzip -n >"$name.tar.gz"
	rm SHA256SUMS
	sha256sum -- * >"$source/sums"
	cp "$source/sums" SHA256SUMS
	cat SHA256SUMS
}
if ! $sbom_too; then
	finish
	exit
fi

# component PROGRAM NAME LICENCE HEADER VERSION: of a C library. VERSION is a text that the preprocessor makes the
# version of.
component() {
	local version
	version=$(printf '#include <%s>\n%s\n' "$4" "$5" | $cc -E -P -xc - | tail -n 1 | tr -d '" ')
	[[ $version =~ ^[0-9.]+$ ]] || die "which version of $2 is in $1? $4 says: $version"
	jq -n --arg of "$1" --arg name "$2" --arg version "$version" --arg licence "$3" \
		--arg purl "pkg:generic/$2@$version" '{$of, component: {"bom-ref": $purl, type: "library", $name, $version,
			scope: "required", licenses: [{license: {id: $licence}}], $purl}}'
}

# modules PROGRAM: the Go modules in it, PATH@VERSION; none of kme.fdx. Those of this repository are "(devel)" in it,
# and have the version of the program.
modules() {
	{ go version -m "$1" 2>/dev/null || true; } |
		awk '$1 == "mod" { version = $3 } $1 == "dep" { print $2 "@" ($3 == "(devel)" ? version : $3) }'
}

# libraries PROGRAM: the C libraries in it. One that is not known here is no release: its licence is to be looked up
# first.
libraries() {
	local name sqlite
	sqlite=$(modules "$1" | sed -n '/^github.com.mattn.go-sqlite3@/p')
	# It comes as source.
	[ -z "$sqlite" ] || component "$1" sqlite blessing "$GOMODCACHE/$sqlite/sqlite3-binding.h" SQLITE_VERSION
	for name in $(readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'); do
		case $name in
		libc.so.* | ld-linux*) component "$1" glibc LGPL-2.1-or-later features.h __GLIBC__.__GLIBC_MINOR__ ;;
		libcurl.so.*) component "$1" curl curl curl/curl.h LIBCURL_VERSION ;;
		libfdcore.so.* | libfdproto.so.*)
			component "$1" freediameter BSD-3-Clause freeDiameter/freeDiameter-host.h \
				FD_PROJECT_VERSION_MAJOR.FD_PROJECT_VERSION_MINOR.FD_PROJECT_VERSION_REV
			;;
		*) die "$1 has $name: which library is that, and what is its licence?" ;;
		esac
	done
}

sbom=$source/sbom
mkdir "$sbom"
for program in factory keysvc mesim; do
	(cd "$source" && go run $CYCLONEDX_GOMOD app -json -licenses -assert-licenses -std -noserial -notimestamp \
		-main cmd/$program -output "$sbom/$program.json" .) 2>"$sbom/log" || die "$(<"$sbom/log")"
done
for program in "${programs[@]}"; do
	libraries "$program"
done >"$sbom/c"
time=$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)
# Go's own: cyclonedx-gomod makes one with the date of the commit's author, which may be another than the commit's.
version=$(go version -m keysvc | awk '$1 == "mod" { print $3 }')
jq -S --slurp --slurpfile c "$sbom/c" --rawfile sums SHA256SUMS --arg time "$time" --arg version "$version" '
	# What the detector takes for another of the same family, or does not find in the Go distribution.
	def licensed: if .name == "std" or (.name | startswith("golang.org/x/"))
		then .licenses = [{license: {id: "BSD-3-Clause"}}] else . end;
	# The other modules of this repository are of the same commit.
	def ours($main): if .name | startswith($main.name + "/")
		then .version = $main.version | .licenses = $main.licenses
			| .purl |= sub("(@[^?]*)?[?]"; "@\($main.version)?") else . end;
	($sums | rtrimstr("\n") | split("\n") | map(split("  ") | {name: .[1], sha256: .[0]})) as $programs
	| (.[0].metadata.component | .version = $version) as $main
	| (map({key: (.metadata.component["bom-ref"] | split("cmd/")[1]), value: .}) | from_entries) as $boms
	| {
		bomFormat: "CycloneDX", specVersion: .[0].specVersion, version: 1,
		metadata: {
			timestamp: $time, tools: (.[0].metadata.tools | map(del(.hashes))),
			component: ($main | {"bom-ref": "kmehsm", type: "application", name, version, licenses, externalReferences})
		},
		components: ([$programs[] | {"bom-ref": .name, type: "application", name, version: $main.version,
				licenses: $main.licenses, hashes: [{alg: "SHA-256", content: .sha256}],
				properties: ($boms[.name].metadata.component.properties // [])}]
			+ (map(.components[] | licensed | ours($main)) + ($c | map(.component)) | unique_by(.["bom-ref"]))),
		dependencies: ([{ref: "kmehsm", dependsOn: ($programs | map(.name))}]
			+ [$programs[].name as $p | {ref: $p, dependsOn: ([($boms[$p].components // [])[]["bom-ref"]]
				+ [$c[] | select(.of == $p).component["bom-ref"]] | unique)}]
			+ (map(.dependencies[] | select(.ref | contains("#cmd/") | not)) | group_by(.ref)
				| map({ref: .[0].ref, dependsOn: (map(.dependsOn // []) | add | unique)} | select(.dependsOn != []))))
	}' "$sbom"/{factory,keysvc,mesim}.json >kmehsm.cdx.json
# It fits CycloneDX's schema, and each module of each program is in it, with version and licence.
(cd "$source/tools/sbom" && GOWORK=off go run . "$out") || die 'kmehsm.cdx.json is not right'
finish
