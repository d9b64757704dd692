#!/bin/sh
# After a package was installed or upgraded. A service that does not run is not started: it has no token yet.
set -e
systemd-sysusers @PACKAGE@.conf
systemd-tmpfiles --create @PACKAGE@.conf
if [ -d /run/systemd/system ]; then
	control=$(command -v deb-systemd-invoke || command -v systemctl)
	systemctl daemon-reload
	"$control" try-restart @UNIT@ ||
		echo "@PACKAGE@: @UNIT@ did not start again: journalctl -u @UNIT@ says why" >&2
fi
