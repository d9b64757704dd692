#!/usr/bin/env bash
# Runs the tests of make test N times while other work keeps every core busy, and once with GOMAXPROCS=1. make flaky
# runs it. It builds the tests of PACKAGES once, and runs them with ARGS, such as -test.run=NAME. var/flaky/results has
# a line for each run, and var/flaky has the logs of runs that failed. If it is called again for the same code, it
# continues. A run that SIGINT or SIGTERM ends counts for nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
n=${N:-20} results=var/flaky/results
export bin=$PWD/var/flaky/bin
mkdir -p "$bin"
of=$({ git rev-parse HEAD; git diff HEAD; go version; printf '%s\n' "${PACKAGES:-}" "${ARGS:-}"; } | sha256sum)
if [ "$(head -n 1 $results 2>/dev/null)" != "$of" ]; then
	rm -f var/flaky/*.log
	printf '%s\n' "$of" >$results
fi
busy=() running=false
stop() {
	trap '' INT TERM
	[ ${#busy[@]} -eq 0 ] || kill "${busy[@]}" 2>/dev/null
	if $running && kill -TERM -- "-$!" 2>/dev/null; then
		for _ in {1..300}; do # leaves-nothing.sh looks for what is left
			kill -0 -- "-$!" 2>/dev/null || break
			sleep 0.1
		done
	fi
	rm -rf "$bin"
}

# ended COMMAND...: runs a command as a process group that ends with this script. A signal does not wait for its end.
ended() {
	local status
	running=true
	set -m
	"$@" &
	set +m
	wait $!
	status=$?
	running=false
	return $status
}
trap stop EXIT
trap 'exit 130' INT TERM
# shellcheck disable=SC2086 # a list
folders=$(go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.Dir}}{{end}}' ${PACKAGES:-work}) &&
	ended scripts/step.sh 'building the tests' go test -c -race -vet=off -ldflags=-w -o "$bin/" $folders || exit
for _ in $(seq "$(nproc)"); do
	timeout $((n * 3600)) sh -c 'while :; do :; done' &
	busy+=($!)
done

# left: prints how long the other runs will take, judged by those that have ended
left() {
	awk -v n=$((n + 1)) 'NR > 1 { runs++; s += $3 }
		END { if (runs) printf ", some %d min left", (n - runs) * s / runs / 60 + 1 }' $results
}

# package FOLDER: the tests of a package, as go test runs them
package() {
	local output
	cd "$1" || return
	# shellcheck disable=SC2086 # a list
	if output=$("$bin/$(basename "$1").test" -test.paniconexit0 -test.timeout=90m \
		-test.parallel=$((2 * $(nproc))) $ARGS 2>&1); then
		echo "ok $1"
	else
		printf '%s\nFAIL %s\n' "$output" "$1"
		return 1
	fi
}
export -f package
export ARGS=${ARGS:-}

# run NAME [VARIABLE=VALUE...]
run() {
	local name=$1 log=var/flaky/$1.log begin=$SECONDS result=passed
	shift
	if grep -q "^$name " $results; then
		return
	fi
	ended scripts/step.sh -l "$log" -n "$(wc -l <<<"$folders")" "run $name of $n$(left)" scripts/leaves-nothing.sh \
		env "$@" xargs -P $((3 * $(nproc))) -I FOLDER bash -c 'package FOLDER' <<<"$folders" || result=FAILED
	printf '%s %s %d s\n' "$name" $result $((SECONDS - begin)) | tee -a $results
	if [ $result = passed ]; then
		rm "$log"
	else
		grep -E '^(\s*--- FAIL|FAIL|panic:|left by)' "$log"
	fi
}
for i in $(seq "$n"); do run "$i"; done
run gomaxprocs-1 GOMAXPROCS=1
if grep -q ' FAILED ' $results; then
	printf 'runs that failed, by their logs:\n'
	sed -n 's,^\([^ ]*\) FAILED.*,var/flaky/\1.log,p' $results
	exit 1
fi
echo "all $((n + 1)) runs passed"
