#!/usr/bin/env bash
# What make test tests, N times with every core kept busy by something else, and once with GOMAXPROCS=1. make flaky runs
# it. The logs are in var/flaky; those of runs that passed are removed. PACKAGES and ARGS are for go test.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
n=${N:-20}
mkdir -p var/flaky
rm -f var/flaky/*.log
busy=()
stop() { [ ${#busy[@]} -eq 0 ] || kill "${busy[@]}" 2>/dev/null; }
trap stop EXIT
trap 'exit 130' INT TERM
for _ in $(seq "$(nproc)"); do
	timeout $((n * 3600)) sh -c 'while :; do :; done' &
	busy+=($!)
done

failed=()
# run NAME COMMAND...
run() {
	local log=var/flaky/$1.log begin=$SECONDS
	shift
	# shellcheck disable=SC2086 # a list each
	if scripts/leaves-nothing.sh env "$@" \
		go test -race -count=1 -timeout 90m ${ARGS:-} ${PACKAGES:-work} >"$log" 2>&1; then
		printf '%s: passed in %d s\n' "$log" $((SECONDS - begin))
		rm "$log"
	else
		printf '%s: FAILED after %d s\n' "$log" $((SECONDS - begin))
		grep -E '^(\s*--- FAIL|FAIL|panic:|left by)' "$log"
		failed+=("$log")
	fi
}
for i in $(seq "$n"); do run "$i"; done
run gomaxprocs-1 GOMAXPROCS=1
if [ ${#failed[@]} -gt 0 ]; then
	printf '%d of %d runs failed: %s\n' ${#failed[@]} $((n + 1)) "${failed[*]}"
	exit 1
fi
echo "all $((n + 1)) runs passed"
