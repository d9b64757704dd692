#!/usr/bin/env bash
# usage: scripts/systemctl.sh daemon-reload | enable|disable [--now] UNIT | start|stop|try-restart|is-active UNIT
# Replaces systemd in packages-test.sh, where systemd does not run. A service runs with the user, the variables, the
# umask and the folders of its unit. As with systemd, a unit is read once, and again only after daemon-reload, and stop
# waits until the service has ended. Logs are in /tmp/NAME.log.
# shellcheck disable=SC1090,SC2046
set -euo pipefail
run=/run/systemctl now=false arguments=()
for argument; do
	case $argument in
	--now) now=true ;;
	-*) ;;
	*) arguments+=("$argument") ;;
	esac
done
verb=${arguments[0]} name=${arguments[1]:-}
name=${name%.service}
unit=$run/$name.service process=$run/$name.pid log=/tmp/$name.log
wanted=/etc/systemd/system/multi-user.target.wants/$name.service

# of SETTING: prints its value in the unit as it was read
of() { sed -n "s/^$1=//p" "$unit"; }

active() { [ -e "$process" ] && ! [ -e "$process.end" ]; }

start() {
	local user dir
	! active || return 0
	[ -e "$unit" ] || cp "/usr/lib/systemd/system/$name.service" "$unit"
	rm -f "$process.end"
	user=$(of User)
	install -d -m "$(of StateDirectoryMode)" -o "$user" -g "$user" "/var/lib/$(of StateDirectory)"
	dir=$(of RuntimeDirectory)
	[ -z "$dir" ] || install -d -o "$user" -g "$user" "/run/$dir"
	touch "$log" # the service may be slow to start
	(
		set -a
		[ -z "$(of Environment)" ] || eval "$(of Environment)"
		! [ -e "$(of EnvironmentFile | sed 's/^-//')" ] || . "$(of EnvironmentFile | sed 's/^-//')"
		set +a
		cd /
		umask "$(of UMask)"
		setpriv --reuid "$user" --regid "$user" --init-groups --no-new-privs --inh-caps=-all $(of ExecStart) &
		echo $! >"$process"
		status=0
		wait $! || status=$?
		echo $status >"$process.end"
	) >>"$log" 2>&1 </dev/null &
	until [ -e "$process" ]; do sleep 0.05; done
}

stop() {
	active || return 0
	kill -TERM "$(<"$process")" || true
	until [ -s "$process.end" ]; do sleep 0.05; done
	rm "$process"
	[ "$(<"$process.end")" = 0 ] || {
		echo "$name ended with $(<"$process.end"): $(tail -n 5 "$log")" >&2
		exit 1
	}
}

mkdir -p $run
case $verb in
daemon-reload) rm -f $run/*.service ;;
enable)
	mkdir -p "${wanted%/*}"
	ln -sf "/usr/lib/systemd/system/$name.service" "$wanted"
	! $now || start
	;;
disable)
	rm -f "$wanted"
	! $now || stop
	;;
start) start ;;
stop) stop ;;
try-restart) ! active || { stop && start; } ;;
is-active) active ;;
*)
	echo "scripts/systemctl.sh: it cannot $verb" >&2
	exit 2
	;;
esac
