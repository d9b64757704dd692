#!/usr/bin/env bash
# usage: scripts/step.sh [-q | -l LOG] [-n TOTAL] WHAT COMMAND...
# Runs a command. It says on standard error what the command is for, and every ten seconds how long it has run and which
# programs run now. With -q it shows the command's output only if the command fails. Until then it shows the last line
# of the output, and with -n which of TOTAL lines that is. With -l it writes the output to a file, and does not show it.
# A signal goes on to all that the command has started; this script ends with the command. The end of this script's
# parent is a SIGTERM.
# shellcheck disable=SC2317 # what a trap calls
set -euo pipefail
[ "${1:-}" = --bound ] || exec setpriv --pdeathsig TERM "$0" --bound "$@"
shift
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

# descendants PID: prints the process, and all below it
descendants() {
	local pid
	echo "$1"
	cat "/proc/$1/task/"*/children 2>/dev/null | tr ' ' '\n' | while read -r pid; do descendants "$pid"; done
}

# hand_on SIGNAL: to the command, or a TERM as soon as it has begun
running='' early=false
hand_on() {
	if [ -z "$running" ]; then
		early=true
	else
		descendants "$running" | xargs kill "-$1" 2>/dev/null || true
	fi
}

# run COMMAND...: runs it in the background, because a trap waits for what runs in the foreground; but in the process
# group that has the terminal.
run() {
	local status=0
	trap 'hand_on INT' INT
	trap 'hand_on TERM' TERM
	trap 'hand_on HUP' HUP
	(trap - INT QUIT && exec "$@") <&0 {ticks}>&- &
	running=$!
	! $early || hand_on TERM # its shell may still ignore INT
	wait "$running" || status=$?
	while kill -0 "$running" 2>/dev/null; do # a signal has ended wait
		status=0
		wait "$running" || status=$?
	done
	return $status
}

printf '%s\n' "$what" >&2
exec {ticks}> >(tick)
ticker=$!
status=0
if [ -z "$log" ]; then
	run "$@" || status=$?
else
	run "$@" >"$log" 2>&1 || status=$?
	[ $status -eq 0 ] || ! $show || cat "$log" >&2
fi
exec {ticks}>&-
wait $ticker
exit $status
