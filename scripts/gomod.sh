#!/usr/bin/env bash
# usage: scripts/gomod.sh DIR COMMAND...
# Runs go get or go mod tidy in the folder of a module. These commands ignore go.work, and would download the other
# modules of this repository. So go.mod replaces them while the command runs.
set -euo pipefail
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$1"
shift
replace=() drop=()
while read -r module version _ folder; do
	replace+=("-replace=$module@$version=$tree/$folder") drop+=("-dropreplace=$module@$version")
done < <(sed -n 's/^\t\(github.com.* => .*\)/\1/p' "$tree/go.work")
trap 'go mod edit "${drop[@]}"' EXIT
go mod edit "${replace[@]}"
GOWORK=off "$@"
