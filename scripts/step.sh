#!/usr/bin/env bash
# usage: scripts/step.sh [-q [-n TOTAL]] WHAT COMMAND...
# Runs a command, and says on standard error what it is for, and every ten seconds for how long it has run. With -q the command's own output is
# shown only if it fails; until then its last line tells how far it is, and with -n which line of how many that is.
set -euo pipefail
log='' total=''
while getopts qn: option; do
	case $option in
	q) log=$(mktemp) && trap 'rm -f "$log"' EXIT ;;
	n) total=$OPTARG ;;
	*) exit 2 ;;
	esac
done
shift $((OPTIND - 1))
what=$1
shift

# tick speaks until its standard input ends: nobody writes to it, and only this script holds its other end.
tick() {
	local status progress=''
	while read -r -t 10; status=$?; [ $status -gt 128 ]; do
		[ -z "$log" ] || progress=${total:+$(wc -l <"$log") of $total, }$(tail -n 1 "$log")
		printf '%s: %d s%s\n' "$what" $SECONDS "${progress:+, $progress}" >&2
	done
}

printf '%s\n' "$what" >&2
exec {ticks}> >(tick)
status=0
if [ -z "$log" ]; then
	"$@" {ticks}>&- || status=$?
else
	"$@" >"$log" 2>&1 {ticks}>&- || status=$?
	[ $status -eq 0 ] || cat "$log" >&2
fi
exec {ticks}>&-
wait $!
exit $status
