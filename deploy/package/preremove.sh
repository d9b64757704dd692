#!/bin/sh
# Before a package is removed; not before an upgrade, which restarts the service when the new program is there.
set -e
case ${1:-} in
remove | 0) ;; # dpkg's, rpm's
*) exit 0 ;;
esac
if [ -d /run/systemd/system ]; then
	control=$(command -v systemctl)
	"$control" --no-reload disable --now @UNIT@
fi
