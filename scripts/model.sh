#!/usr/bin/env bash
# Checks docs/model/binding.pml with spin: the rules hold, and without each rule spin finds what that rule prevents.
set -euo pipefail

model=$PWD/docs/model/binding.pml
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# check OPTIONS...: fails with spin's report unless all states were searched and have no error.
check() {
	local options=(-DSAFETY -DNOCLAIM) search=()
	if [ "${1:-}" = -N ]; then
		options=() search=(-a)
		shift
	fi
	spin -a "$@" "$model" >/dev/null
	gcc -DMEMLIM=2000 "${options[@]}" -o pan pan.c
	./pan -m1000000 "${search[@]}" >report
	grep -q 'errors: 0' report && ! grep -qE 'Search not completed|max search depth' report
}

check || { cat report && exit 1; }
echo "all assertions hold in$(sed -n 's/ states, stored.*//p' report | tr -s ' ') states"
check -N || { cat report && exit 1; }
echo "a lost answer heals in all$(sed -n 's/ states, stored.*//p' report | tr -s ' ') states"

sed -nE 's/^#(ifdef|elif defined)[ (]([A-Z_]+).*/\2/p' "$model" | while read -r rule; do
	if check "-D$rule"; then
		echo "$rule: no trail is found" >&2
		exit 1
	fi
	grep -m1 -E '^pan:1: ' report | sed "s/^pan:1/$rule/; s/ (at depth.*//"
done
