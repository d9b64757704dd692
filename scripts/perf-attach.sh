#!/usr/bin/env bash
# Shows by perf how keysvc spends its CPU time during whole attaches, over mutual TLS, for SECONDS_EACH=10, with the lot
# of BITS=2048. It uses what make bench has made in var/bench, and needs root for perf. It prints a table in Markdown.
# The shares of keysvc's CPU time are right also on a busy machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bits=${BITS:-2048} seconds=${SECONDS_EACH:-10} dir=$PWD/var/bench
command -v perf >/dev/null || { echo 'perf is not there: Debian has it in linux-perf' >&2 && exit 1; }
[ -r "$dir/softhsm/env" ] || { echo 'run make bench first' >&2 && exit 1; }
# shellcheck source=/dev/null
. "$dir/softhsm/env"
bin/keysvc serve --config "$dir/keysvc.yaml" 2>"$dir/keysvc.log" &
keysvc=$!
trap 'kill "$keysvc"; wait "$keysvc" || true; rm -f "$dir/perf.data"' EXIT
until address=$(jq -r 'select(.msg == "serving") | .addresses[0]' "$dir/keysvc.log") && [ -n "$address" ]; do
	kill -0 "$keysvc" && sleep 0.2
done
attach() {
	bin/mesim load --whole --duration "${1}s" --server "https://$address" --ca "$dir/tls/ca.pem" \
		--cert "$dir/tls/hss.pem" --key "$dir/tls/hss.key" --injection "$dir/injection-$bits" \
		--fixture-key "$dir/fixture.key" --fixture-enrolment "$dir/fixture-enrolment.json"
}
attach 2 >/dev/null # to warm up
perf record -q -e cpu-clock -F 1999 -g -p "$keysvc" -o "$dir/perf.data" 2>"$dir/perf.log" &
perf=$!
ticks() { awk '{ sub(/.*\) /, ""); print $12 + $13 }' "/proc/$keysvc/stat"; }
before=$(ticks)
attach "$seconds" >"$dir/perf-load.json"
spent=$(($(ticks) - before))
kill -INT "$perf"
wait "$perf" || true
us=$(jq "$spent * 10000 / .attach.calls" "$dir/perf-load.json")
perf script -i "$dir/perf.data" -F ip,sym,dso 2>>"$dir/perf.log" | awk -v us="$us" -f scripts/perf-attach.awk
