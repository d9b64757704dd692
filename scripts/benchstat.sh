#!/usr/bin/env bash
# Runs the benchmarks of the hot paths at another revision and in this tree, in turn, and compares them by benchstat.
# make benchstat runs it. BASE is the revision; COUNT is how often each benchmark runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
base=${BASE:-HEAD~1} count=${COUNT:-6}
benchstat=golang.org/x/perf/cmd/benchstat@v0.0.0-20250813145418-2f7363a06fe1
packages=(kme directory hsmkeys binding binding/sqlstore)
hot='Payload|Device|Shard256|RawDecrypt|Verify|Tag|Seal|EncryptRAND|Establish|PrepareBound'
dir=$(mktemp -d)
trap 'git worktree remove --force "$dir/base"; rm -rf "$dir"' EXIT
git worktree add --quiet --detach "$dir/base" "$base"
# each COMMAND: runs it in both trees, with $name and $p set
each() {
	for p in "${packages[@]}"; do
		for name in base now; do
			tree=$PWD
			[ $name = now ] || tree=$dir/base
			(cd "$tree/$p" && "$@")
		done
	done
}
compile() { go test -c -o "$dir/$name-${p//\//-}" .; }
measure() { "$dir/$name-${p//\//-}" -test.run '^$' -test.bench "$hot" -test.benchtime 0.5s >>"$dir/$name.txt"; }
each compile
for _ in $(seq "$count"); do each measure; done
go run "$benchstat" "base=$dir/base.txt" "now=$dir/now.txt"
