#!/usr/bin/env bash
# usage: scripts/image.sh
# Builds the image of deploy/Containerfile from bin/packages, with buildah. Then it runs the image's command, and waits
# until the health check of deploy/compose.yaml passes. As the base it uses Debian, made by debootstrap and kept in
# var/image/base.tar, and not the base that the Containerfile names. It removes the image at the end.
# It needs root, buildah, debootstrap, and a mirror of Debian's packages (MIRROR, http_proxy).
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "$(id -u)" -eq 0 ] || { echo 'scripts/image.sh: it needs root: it mounts' >&2 && exit 1; }
if [ "${1:-}" != --alone ]; then # mounts and processes go with their namespaces
	exec unshare --mount --propagation private --pid --fork --kill-child --mount-proc "$0" --alone
fi
base=var/image/base.tar
mkdir -p var/image
work=$(mktemp -d var/image/XXXXXX)
trap 'rm -rf "$work"' EXIT
work=$(realpath "$work")
if [ ! -e $base ]; then
	debootstrap --variant=minbase bookworm "$work/debian" ${MIRROR:+"$MIRROR"}
	tar -C "$work/debian" -cf "$work/base.tar" .
	mv "$work/base.tar" $base
fi
export BUILDAH_ISOLATION=chroot
image() { buildah --root "$work/store" --runroot "$work/run" --storage-driver vfs "$@"; }

container=$(image from scratch)
image add "$container" $base / >/dev/null
image commit --rm "$container" localhost/base >/dev/null
image build --pull-never --from localhost/base --tag kmehsm --file deploy/Containerfile bin/packages
container=$(image from --pull-never kmehsm)
readarray -t command < <(image inspect --type image kmehsm | jq -r '.OCIv1.config.Cmd[]')
read -ra check < <(sed -n 's/^ *test: \[CMD, \(.*\)\]$/\1/p' deploy/compose.yaml | tr -d ,)
image run "$container" -- "${command[@]}" &
until image run "$container" -- "${check[@]}" 2>/dev/null; do
	kill -0 $! # it fails when the service has ended
	sleep 1
done
echo 'the image is built, and its service is ready'
