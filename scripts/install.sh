#!/usr/bin/env bash
# usage: [PREFIX=/usr/local] [DESTDIR=] scripts/install.sh BIN [PART...]
# Installs parts from the folder BIN: keysvc, factory, mesim, kme.fdx; without PART, all that it finds there. It
# installs programs, man pages, completion, units, users and sample configurations. It keeps a configuration that
# exists.
set -euo pipefail
bin=$(realpath "$1")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../deploy"
prefix=${PREFIX:-/usr/local} to=${DESTDIR:-}${PREFIX:-/usr/local} etc=${DESTDIR:-}/etc
[[ $prefix == /* ]] || { echo "scripts/install.sh: PREFIX=$prefix is not an absolute path" >&2 && exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# put MODE FILE TO: installs a file
put() { install -D -m "$1" "$2" "$3"; }

# config MODE FILE TO: installs a sample, if there is no such file yet
config() { [ -e "$3" ] || put "$@"; }

# program NAME: installs a program, and the man page and completion that it prints
program() {
	local shell
	put 0755 "$bin/$1" "$to/bin/$1"
	"$bin/$1" man >"$work/$1.1"
	gzip -n9 "$work/$1.1"
	put 0644 "$work/$1.1.gz" "$to/share/man/man1/$1.1.gz"
	for shell in bash zsh fish; do
		"$bin/$1" completion $shell >"$work/$1.$shell"
	done
	put 0644 "$work/$1.bash" "$to/share/bash-completion/completions/$1"
	put 0644 "$work/$1.zsh" "$to/share/zsh/site-functions/_$1"
	put 0644 "$work/$1.fish" "$to/share/fish/vendor_completions.d/$1.fish"
}

# service PACKAGE UNIT: installs a unit and its users
service() {
	sed "s,=/usr/bin/,=$prefix/bin/," "$2" >"$work/$2"
	put 0644 "$work/$2" "$to/lib/systemd/system/$2"
	put 0644 "package/$1.sysusers" "$to/lib/sysusers.d/$1.conf"
	put 0644 "package/$1.tmpfiles" "$to/lib/tmpfiles.d/$1.conf"
}

if [ $# = 0 ]; then
	for part in keysvc factory mesim kme.fdx; do
		[ ! -e "$bin/$part" ] || set -- "$@" $part
	done
	[ $# -gt 0 ] || { echo "scripts/install.sh: nothing is built in $bin: make build" >&2 && exit 1; }
fi
for part; do
	case $part in
	keysvc)
		program keysvc
		service kmehsm-keysvc keysvc.service
		config 0640 keysvc.yaml "$etc/kmehsm/keysvc.yaml"
		;;
	factory)
		program factory
		service kmehsm-factory factory-station.service
		config 0640 factory.yaml "$etc/kmehsm/factory.yaml"
		;;
	mesim)
		program mesim
		put 0755 ../softhsm-setup.sh "$to/share/kmehsm/softhsm-setup.sh"
		;;
	kme.fdx)
		put 0644 "$bin/kme.fdx" "$to/lib/freeDiameter/kme.fdx"
		config 0644 kme.conf "$etc/freeDiameter/kme.conf"
		;;
	*)
		echo "scripts/install.sh: there is no part $part: keysvc, factory, mesim, kme.fdx" >&2
		exit 2
		;;
	esac
done
