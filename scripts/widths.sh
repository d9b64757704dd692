#!/usr/bin/env bash
# usage: scripts/widths.sh
# Prints FILE:LINE for each line that has more than 120 characters, and fails if there is one.
# A tab counts 4. It ignores lines of one word, such as links; rows of tables in Markdown; the commands of testscripts;
# JSON, the licence, generated files, and data of others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export LC_ALL=C.UTF-8

# wide COMMANDS PATHSPEC...: sed's COMMANDS delete the lines that may be wider.
wide() {
	local commands=$1
	shift
	git grep -zLE '^// Code generated .* DO NOT EDIT\.$' -- "$@" ':!*.json' ':!*.sum' ':!LICENSE' \
		':!hsmkeys/testdata' ':!kme/testdata' ':!internal/n5geir/testdata' ':!*.png' |
		xargs -0r sed -snE "$commands"'; s/\t/    /g; /^\s*(\S{1,3}\s+)?\S+$/d; /^.{121}/ {F;=}' | paste -d : - -
}

lines=$(
	wide '/^\s*\|/d' '*.md'
	wide '/^[^#]/d' '*.txtar'
	wide '' . ':!*.md' ':!*.txtar'
)
if [ -n "$lines" ]; then
	printf 'wider than 120 columns:\n%s\n' "$lines" >&2
	exit 1
fi
