#!/bin/sh
# After a package was removed or purged. What the service wrote stays: it may be the only copy. An empty folder goes.
set -e
case ${1:-} in
remove | purge | 0) ;; # dpkg's, dpkg's, rpm's
*) exit 0 ;;           # upgraded
esac
[ ! -d /run/systemd/system ] || systemctl daemon-reload
[ "$1" != remove ] || exit 0
[ ! -d @STATE@ ] || rmdir --ignore-fail-on-non-empty @STATE@
if [ -d @STATE@ ]; then
	cat <<-EOF
		@PACKAGE@ leaves @STATE@:
		    @HOLDS@
		It leaves the user @USER@, all keys in HSMs, and what you put into /etc/kmehsm: PINs, TLS keys.
		If nobody needs them any more: rm -r @STATE@; userdel @USER@
	EOF
fi
