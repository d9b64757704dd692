#!/usr/bin/env bash
# usage: scripts/packages.sh BIN OUT VERSION
# Makes a .deb and a .rpm of each program in the folder BIN, and of kme.fdx if it is there, in the folder OUT. With
# SOURCE_DATE_EPOCH, the same BIN gives the same bytes.
set -euo pipefail
shopt -s inherit_errexit
MAINTAINER='kmehsm <kmehsm@users.noreply.github.com>'
NFPM=github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.45.0 # a module of its own: nothing of it enters the product
bin=$(realpath "$1") out=$(realpath -m "$2") version=$3
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
time=$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)
umask 022

cat >"$work/changelog.yaml" <<EOF
- semver: "$version"
  date: $time
  packager: $MAINTAINER
  deb: {urgency: medium, distributions: [stable]}
  changes: [{note: What is new stands in changelog.gz.}]
EOF
gzip -n9 <CHANGELOG.md >"$work/changelog.gz"

# licences PROGRAM: prints the licences of all code that is compiled into it: they must be passed on
licences() {
	local name dir
	{
		printf 'the Go standard library\t%s\n' "$(go env GOROOT)"
		go version -m "$1" | awk '$1 == "dep" && $3 != "(devel)" && $2 !~ "^github.com/kmehsm/" { print $2 }' |
			xargs go list -m -f '{{.Path}} {{.Version}}{{"\t"}}{{.Dir}}'
	} | while IFS=$'\t' read -r name dir; do
		printf '\n%s\n%s\n\n' "$(printf '=%.0s' {1..80})" "$name"
		find "$dir" -maxdepth 1 -iregex '.*/\(licen[cs]e\|copying\|notice\)[^/]*' | sort | xargs -rd '\n' cat
	done
}

# libraries FILE deb|rpm: prints the packages of the libraries that it is linked with, as a YAML list
libraries() {
	if [ "$2" = rpm ]; then
		readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/"\1()(64bit)"/p'
		readelf -VW "$1" | sed -nE 's/.*Name: (GLIBC_[0-9.]+).*/\1/p' | sort -uV | tail -n 1 |
			sed 's/.*/"libc.so.6(&)(64bit)"/'
	else
		mkdir -p "$work/debian"
		printf 'Source: kmehsm\n\nPackage: kmehsm\nArchitecture: any\n' >"$work/debian/control"
		(cd "$work" && dpkg-shlibdeps -O "$1" 2>/dev/null) | sed 's/^shlibs:Depends=//; s/, /\n/g'
	fi | paste -sd ,
}

# package PART NAME SUMMARY TEXT [UNIT USER STATE HOLDS]
package() {
	local part=$1 name=$2 summary=$3 text=$4 unit=${5:-} user=${6:-} state=${7:-} holds=${8:-}
	local tree=$work/$2 doc=$work/$2/usr/share/doc/$2 script format depends zsh file mode
	[ -e "$bin/$part" ] || return 0
	DESTDIR=$tree PREFIX=/usr scripts/install.sh "$bin" "$part"
	install -D -m 0644 "$work/changelog.gz" "$doc/changelog.gz"
	printf '%s\n' 'Copyright 2026 the kmehsm authors.' '' 'Licensed under the Apache License, Version 2.0. On Debian' \
		'systems it is in /usr/share/common-licenses/Apache-2.0.' >"$doc/copyright"
	if [ "$part" != kme.fdx ]; then
		printf '\nThe licences of all modules that are compiled in are in third-party-licences.gz.\n' >>"$doc/copyright"
		licences "$bin/$part" | gzip -n9 >"$doc/third-party-licences.gz"
	fi
	if [ -e "deploy/package/$name.lintian" ]; then
		install -D -m 0644 "deploy/package/$name.lintian" "$tree/usr/share/lintian/overrides/$name"
	fi
	for format in deb rpm; do
		depends=$(libraries "$bin/$part" $format)
		zsh=/usr/share/zsh/site-functions
		if [ $format = deb ]; then
			zsh=/usr/share/zsh/vendor-completions
			[ -z "$unit" ] ||
				depends+=', systemd | systemd-standalone-sysusers, systemd | systemd-standalone-tmpfiles'
		elif [ -n "$unit" ]; then
			depends+=', systemd'
		fi
		{
			cat <<-EOF
				name: $name
				arch: $(go env GOARCH)
				version: $version
				version_schema: none
				release: 1
				section: net
				priority: optional
				maintainer: $MAINTAINER
				homepage: https://github.com/kmehsm/kmehsm
				mtime: $time
				changelog: $work/changelog.yaml
				description: |
				  $summary
				$(fold -sw 76 <<<"$text" | sed 's/ *$//; s/^/  /')
				depends: [$depends]
			EOF
			# Without a name, the machine's own: an .rpm made elsewhere would be another.
			[ $format = deb ] || printf 'license: Apache-2.0\nrpm: {buildhost: localhost}\n'
			if [ -n "$unit" ]; then
				printf 'scripts:\n'
				for script in postinstall preremove postremove; do
					sed -e "s|@PACKAGE@|$name|g; s|@UNIT@|$unit|g; s|@USER@|$user|g" \
						-e "s|@STATE@|$state|g; s|@HOLDS@|$holds|g" "deploy/package/$script.sh" >"$work/$name.$script"
					printf '  %s: %s\n' "$script" "$work/$name.$script"
				done
			fi
			printf 'contents:\n'
			(cd "$tree" && find . -type f -printf '/%P %m\n' | sort) | while read -r file mode; do
				printf -- '- {src: %s, dst: %s, type: %s, file_info: {mode: 0%s}}\n' "$tree$file" \
					"${file/#\/usr\/share\/zsh\/site-functions/$zsh}" \
					"$([[ $file == /etc/* ]] && echo 'config|noreplace' || echo file)" "$mode"
			done
		} >"$work/$name.yaml"
		(cd "$work" && GOWORK=off go run $NFPM package --config "$name.yaml" --packager $format --target "$out/") \
			>/dev/null
	done
}

mkdir -p "$out"
package keysvc kmehsm-keysvc 'key service that binds subscriptions to devices' \
	"The operator's side of KME binding after 3GPP TR 33.868. An HSS calls keysvc to encrypt the RANDs of its \
authentication vectors under a key that only the bound device has. All keys are in an HSM, by PKCS #11." \
	keysvc.service kmehsm /var/lib/kmehsm \
	'the database of bindings and the ledger. Without it no bound subscriber can be served.'
package factory kmehsm-factory "lots and device keys of a manufacturer's line, and its injection stations" \
	"The manufacturer's side of KME binding after 3GPP TR 33.868. factory makes lots and device keys in an HSM, by \
PKCS #11, wraps them for the fixtures that inject them, and publishes the public keys. It serves the stations of the \
line and a page for a wall screen." \
	factory-station.service kmehsm-factory /var/lib/kmehsm-factory \
	'the journal, injection packages with wrapped device keys, and what stations did. No other copy is known.'
package mesim kmehsm-mesim 'simulated devices for KME binding' \
	"mesim plays devices that are bound after 3GPP TR 33.868, against keysvc: whole attaches, payloads that were \
tampered with, and load. It is for tests, and of no use in production."
package kme.fdx kmehsm-freediameter 'extension of freeDiameter for KME binding over S6a' \
	"kme.fdx is loaded into an HSS that is built on freeDiameter, or into a freeDiameter daemon between MME and HSS. \
It has keysvc process the authentication vectors of bound subscriptions."
ls "$out"
