#!/usr/bin/env bash
set -euo pipefail
export LC_ALL=C # labels, PINs and paths are bytes here

usage() {
	cat <<'EOF'
usage: ./softhsm-setup.sh [--dir DIR] [--reset] [LABEL...]

Makes SoftHSM tokens for local work: one for each LABEL (default: factory operator), all in DIR
(default: var/softhsm). It touches no other token of the machine.

    ./softhsm-setup.sh                         makes the tokens "factory" and "operator"
    . var/softhsm/env                          sets SOFTHSM2_CONF, FACTORY_TOKEN and OPERATOR_TOKEN
    factory doctor --token "$FACTORY_TOKEN"

Running it again changes nothing, finishes what was interrupted, and adds the tokens of new LABELs.

    --dir DIR     the folder to work in
    --reset       first remove every token that this script made in DIR, with the keys in it and its PINs
    -h, --help    print this text

DIR holds:

    env              to source: SOFTHSM2_CONF, and for each token its RFC 7512 URI, LABEL_TOKEN in capitals
    softhsm2.conf    SoftHSM's configuration
    LABEL.pin        the user's PIN, random, mode 0600
    LABEL.so-pin     the security officer's PIN, likewise
    tokens/LABEL     the token itself

A LABEL has 1 to 32 of the characters A-Z a-z 0-9 . _ - and begins with neither . nor -. A LABEL.pin or
LABEL.so-pin that is there before its token gives the PIN. SOFTHSM2_MODULE names libsofthsm2.so, for where
it is in none of the usual places.

SoftHSM keeps keys in files: fit for work and tests, not for keys that anything of worth depends on.
EOF
}

die() {
	printf 'softhsm-setup.sh: %s\n' "$1" >&2
	exit "${2:-1}"
}

wrong_usage() {
	die "$1 (--help tells more)" 2
}

readonly marker='# Made by softhsm-setup.sh.'
readonly how_to_install='Debian and Ubuntu: apt-get install softhsm2; Fedora: dnf install softhsm;'\
' macOS: brew install softhsm'

find_module() {
	if [ -n "${SOFTHSM2_MODULE:-}" ]; then
		case $SOFTHSM2_MODULE in /*) ;; *) die "SOFTHSM2_MODULE=$SOFTHSM2_MODULE is not an absolute path" 2 ;; esac
		[ -f "$SOFTHSM2_MODULE" ] || die "SOFTHSM2_MODULE=$SOFTHSM2_MODULE is no file" 2
		printf '%s' "$SOFTHSM2_MODULE"
		return
	fi
	local folder
	for folder in /usr/lib/softhsm /usr/lib/x86_64-linux-gnu/softhsm /usr/lib/aarch64-linux-gnu/softhsm \
		/usr/lib64/pkcs11 /usr/local/lib/softhsm /opt/homebrew/lib/softhsm; do
		if [ -f "$folder/libsofthsm2.so" ]; then
			printf '%s' "$folder/libsofthsm2.so"
			return
		fi
	done
	die "libsofthsm2.so not found: install SoftHSM 2 ($how_to_install), or name the file in SOFTHSM2_MODULE"
}

# put FILE TEXT writes a file whole or not at all, and not if it has that text already.
put() {
	if [ -f "$1" ] && [ "$(cat -- "$1")" = "$2" ]; then return; fi
	mkdir -p -- "$new"
	printf '%s\n' "$2" >"$new/file"
	mv -f -- "$new/file" "$1"
}

conf() {
	printf '%s\n' "$marker" "directories.tokendir = $1" 'objectstore.backend = file' 'log.level = ERROR' \
		'slots.removable = false'
}

# is_made LABEL: a token is moved to its place last of all, so one that is there is complete.
is_made() {
	[ -d "$dir/tokens/$1" ]
}

# made_labels prints the labels of the tokens that this script made in DIR. A token with no PIN files is another's.
made_labels() {
	local token label
	for token in "$dir"/tokens/*/; do
		label=$(basename -- "$token")
		if [ -f "$dir/$label.pin" ] && [ -f "$dir/$label.so-pin" ]; then
			printf '%s\n' "$label"
		fi
	done
}

# variable LABEL prints the name of the variable for a token's URI.
variable() {
	local name
	name=$(printf '%s_TOKEN' "$1" | tr 'a-z.-' 'A-Z__')
	case $name in [0-9]*) name=_$name ;; esac
	printf '%s\n' "$name"
}

# percent TEXT encodes more than RFC 7512 asks for: readers differ in what they take as it is.
percent() {
	local i char
	for ((i = 0; i < ${#1}; i++)); do
		char=${1:i:1}
		case $char in
		[A-Za-z0-9._~/-]) printf '%s' "$char" ;;
		*) printf '%%%02X' "$(($(printf '%d' "'$char") & 255))" ;;
		esac
	done
}

quote() {
	printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")"
}

# new_pin FILE makes a PIN, if there is none.
new_pin() {
	if [ ! -e "$1" ]; then
		# No newline at the end: some readers of a pin-source would take it for a part of the PIN.
		od -An -N16 -tx1 /dev/urandom | tr -d ' \n' >"$new/pin"
		mv -- "$new/pin" "$1"
	fi
	chmod 600 -- "$1"
}

# pin FILE prints the PIN in it.
pin() {
	local text
	text=$(cat -- "$1")
	case $text in
	*[!\!-~]*)
		die "$1 holds more than one line, or a character that is not printable ASCII: write another PIN, \
or remove the file"
		;;
	esac
	if [ ${#text} -lt 4 ] || [ ${#text} -gt 255 ]; then
		die "$1 holds ${#text} characters, and a PIN has 4 to 255: write another, or remove the file"
	fi
	printf '%s' "$text"
}

# init_token LABEL PIN SO-PIN makes a token in $new/tokens.
init_token() {
	local ok=true
	export MODULE=$module LABEL=$1 LOG=$new/log SOFTHSM2_CONF=$new/softhsm2.conf
	# softhsm2-util takes PINs as arguments, which every user of the machine can read while it runs, or from a
	# terminal, and from nothing else: a pipe it refuses. script(1) of util-linux gives it a terminal of its own.
	# That terminal echoes, so what it shows is thrown away; softhsm2-util itself prints asterisks.
	# The pipe to script stays open for writing: at its end script would wait for a quarter of a second.
	mkfifo -- "$new/pins"
	exec 3<>"$new/pins"
	if SHELL=/bin/sh script -q -e -c true /dev/null <&3 >/dev/null 2>&1; then
		printf '%s\n' "$3" "$3" "$2" "$2" >&3
		# shellcheck disable=SC2016 # the inner shell expands these
		SHELL=/bin/sh script -q -e \
			-c 'exec softhsm2-util --init-token --free --module "$MODULE" --label "$LABEL" >"$LOG" 2>&1' \
			/dev/null <&3 >/dev/null || ok=false
	else
		# The tokens are for work on one's own machine, where nobody else is there to look for this instant.
		printf 'note: script(1) of util-linux does not work here: the PINs of %s are visible to ps while %s runs\n' \
			"$1" softhsm2-util >&2
		softhsm2-util --init-token --free --module "$MODULE" --label "$LABEL" --pin "$2" --so-pin "$3" \
			>"$LOG" 2>&1 </dev/null || ok=false
	fi
	exec 3>&-
	if ! $ok; then
		cat -- "$LOG" >&2 || true
		die "softhsm2-util could not make the token $1"
	fi
}

# make_token makes a token apart from the others and then moves it to its place. Were it made in its place, an
# interruption could leave it without a user PIN; and to ask SoftHSM which tokens are whole writes to each of them.
make_token() {
	local user_pin so_pin
	rm -rf -- "$new"
	mkdir -p -- "$new/tokens" "$dir/tokens"
	new_pin "$dir/$1.pin"
	new_pin "$dir/$1.so-pin"
	user_pin=$(pin "$dir/$1.pin")
	so_pin=$(pin "$dir/$1.so-pin")
	conf "$new/tokens" >"$new/softhsm2.conf"
	init_token "$1" "$user_pin" "$so_pin"
	mv -- "$new"/tokens/* "$dir/tokens/$1"
}

# reset takes each token away in one step, and before its PINs: half a token must not look like a whole one.
reset() {
	local label
	rm -rf -- "$new"
	mkdir -- "$new"
	for label in $(made_labels) "${labels[@]}"; do
		if is_made "$label"; then mv -- "$dir/tokens/$label" "$new/$label"; fi
		rm -f -- "$dir/$label.pin" "$dir/$label.so-pin"
	done
	rm -f -- "$dir/env"
}

# env_file LABEL... prints the file to source.
env_file() {
	local label uri
	printf '%s Source it:\n' "$marker"
	printf '#     . %s\n' "$(quote "$dir/env")"
	printf 'export SOFTHSM2_CONF=%s\n' "$(quote "$dir/softhsm2.conf")"
	for label; do
		uri="pkcs11:token=$label?module-path=$(percent "$module")&pin-source=file:$(percent "$dir/$label.pin")"
		printf 'export %s=%s\n' "$(variable "$label")" "$(quote "$uri")"
	done
}

dir=var/softhsm
reset=false
labels=()
while [ $# -gt 0 ]; do
	case $1 in
	-h | --help) usage && exit ;;
	--dir)
		[ $# -ge 2 ] || wrong_usage '--dir needs a folder'
		dir=$2
		shift
		;;
	--dir=*) dir=${1#--dir=} ;;
	--reset) reset=true ;;
	-*) wrong_usage "unknown option $1" ;;
	*) labels+=("$1") ;;
	esac
	shift
done
[ ${#labels[@]} -gt 0 ] || labels=(factory operator)

for label in "${labels[@]}"; do
	case $label in
	'' | [.-]* | *[!A-Za-z0-9._-]*) wrong_usage "the label \"$label\" has characters that a label cannot have" ;;
	esac
	[ ${#label} -le 32 ] || wrong_usage "the label $label has ${#label} characters; 32 are the most"
done

[ -n "$dir" ] || wrong_usage '--dir needs a folder'
case $dir in /*) ;; *) dir=$PWD/$dir ;; esac
# SoftHSM's configuration ends a path at # or =. A % stands for itself once or twice decoded, and readers of a
# pin-source differ in that.
case $dir in
*[#=%]* | *[[:cntrl:]]*)
	die "$dir: the path has a character (# = % or a control character) that SoftHSM or URIs cannot take" 2
	;;
esac
[ ${#dir} -le 900 ] || die "$dir: the path is too long for SoftHSM's configuration" 2

command -v softhsm2-util >/dev/null || die "softhsm2-util not found: install SoftHSM 2 ($how_to_install)"
module=$(find_module)

if [ -e "$dir/softhsm2.conf" ]; then
	grep -qxF -- "$marker" "$dir/softhsm2.conf" ||
		die "$dir/softhsm2.conf was not made by this script: choose another --dir"
elif $reset && [ -e "$dir" ]; then
	die "$dir has no softhsm2.conf of this script, so nothing there is its to reset: is --dir right?"
elif [ -e "$dir/env" ] || [ -e "$dir/tokens" ]; then
	die "$dir/env or $dir/tokens was not made by this script: choose another --dir"
fi

mkdir -p -- "$(dirname -- "$dir")"
[ -d "$dir" ] || mkdir -m 700 -- "$dir"
dir=$(CDPATH='' cd -- "$dir" && pwd)
umask 077
new=$dir/.softhsm-setup.new
trap 'rm -rf -- "$new"' EXIT

kept=
$reset || kept=$(made_labels)
all=$(printf '%s\n' "$kept" "${labels[@]}" | sort -u)
for name in $(for label in $all; do variable "$label"; done | sort | uniq -d); do
	wrong_usage "two labels would share the variable $name: choose another label"
done

if $reset && [ -e "$dir/softhsm2.conf" ]; then reset; fi
# An edited configuration is left as it is, unless the folder has moved.
if $reset || ! grep -qxF -- "directories.tokendir = $dir/tokens" "$dir/softhsm2.conf" 2>/dev/null; then
	put "$dir/softhsm2.conf" "$(conf "$dir/tokens")"
fi
for label in "${labels[@]}"; do
	if ! is_made "$label"; then
		make_token "$label"
		printf 'made the token %s\n' "$label"
	elif [ -f "$dir/$label.pin" ] && [ -f "$dir/$label.so-pin" ]; then
		printf 'the token %s is there already\n' "$label"
	else
		die "the token $label is there, but its PIN is gone ($dir/$label.pin, $dir/$label.so-pin): \
--reset makes a new one"
	fi
done
# shellcheck disable=SC2046 # labels have no spaces
put "$dir/env" "$(env_file $(made_labels))"
printf 'to use: . %s\n' "$(quote "$dir/env")"
