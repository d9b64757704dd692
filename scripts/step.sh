#!/usr/bin/env bash
# usage: scripts/step.sh [-q | -l LOG] [-n TOTAL] WHAT COMMAND...
# Runs a command. It says on standard error what the command is for, and every ten seconds how long it has run and which
# programs run now. With -q it shows the command's output only if the command fails. Until then it shows the last line
# of the output, and with -n which of TOTAL lines that is. With -l it writes the output to a file, and does not show it.
set -euo pipefail
log='' total='' show=true
while getopts ql:n: option; do
	case $option in
	q) log=$(mktemp) && trap 'rm -f "$log"' EXIT ;;
	l) log=$OPTARG show=false ;;
	n) total=$OPTARG ;;
	*) exit 2 ;;
	esac
done
shift $((OPTIND - 1))
what=$1
shift

# programs names the children of the command, which is the child of this script that the caller is not.
programs() {
	local command child
	for command in $(<"/proc/$$/task/$$/children"); do
		[ "$command" = "$1" ] || cat "/proc/$command/task/"*/children
	done 2>/dev/null | tr ' ' '\n' | while read -r child; do cat "/proc/$child/comm"; done 2>/dev/null |
		sort -u | paste -sd ' ' || true
}

# tick reports until its standard input ends. Nobody writes to that; only this script has its other end open.
tick() {
	local status progress self=$BASHPID
	while read -r -t 10; status=$?; [ $status -gt 128 ]; do
		if [ -n "$log" ]; then
			progress=${total:+$(wc -l <"$log") of $total, }$(tail -n 1 "$log")
		else
			progress=$(programs "$self")
		fi
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
	[ $status -eq 0 ] || ! $show || cat "$log" >&2
fi
exec {ticks}>&-
wait $!
exit $status
