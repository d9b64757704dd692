#!/usr/bin/env bash
# usage: scripts/packages-test.sh [DIR]
# Tests the packages. It takes those of the last commit from bin/packages, or builds them, and makes later ones, with
# another schema, unit and sample configuration; or it takes both from DIR/1 and DIR/2. lintian checks them. The rest
# happens in a copy of this machine's files, which is thrown away: the script does what "In five minutes" of
# docs/install.md says, upgrades, serves stations, removes, installs again and purges, with dpkg and with rpm. It needs
# root and the right to mount.
# shellcheck disable=SC1090,SC1091,SC2013,SC2016,SC2046,SC2317
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
	printf 'scripts/packages-test.sh: %s\n' "$1" >&2
	exit 1
}

# has PATH MODE OWNER
has() {
	[ "$(stat -c '%a %U:%G' "$1")" = "$2 $3" ] || die "$1 is $(stat -c '%a %U:%G' "$1"), not $2 $3"
}

bound() { operator keysvc binding list --json | jq -e ".bindings | length == $1" >/dev/null; }

ready() { # within a minute
	operator curl --fail -sS --retry 60 --retry-all-errors --retry-delay 1 --unix-socket /run/kmehsm/keysvc.sock \
		http://keysvc/readyz
}

# files: lists all files where packages put some, without our services' state and dpkg's own files
files() {
	find /etc /usr /var/lib -xdev \( -path /var/lib/dpkg -o -path '/var/lib/kmehsm*' \) -prune -o -print | LC_ALL=C sort
}

# upgrade PACKAGE...: upgrades, as an administrator who keeps the files in /etc
upgrade() { dpkg --force-confold -i "$@"; }

schema() { sqlite3 /var/lib/kmehsm/keysvc.db 'PRAGMA user_version'; }

inside() {
	local unit version sum
	trap '[ $? = 0 ] || tail -n 20 /tmp/*.log >&2' EXIT
	export LC_ALL=C DEBIAN_FRONTEND=noninteractive
	cd "$1/1"
	# The packages' scripts speak to systemd where it runs.
	mkdir -p /run/systemd/system
	mount --bind "$2/scripts/systemctl.sh" "$(command -v systemctl)"
	# What containers have against starting services; and the index of man pages, which takes seconds each time.
	rm -f /usr/sbin/policy-rc.d /var/lib/man-db/auto-update
	files >/tmp/before
	# The page, word by word; the network is not there, and what apt-get would install is.
	apt-get() { dpkg -i kmehsm-*.deb; }
	sed -n '/^## In five minutes/,/^## The stations/s/^    //p' "$2/docs/install.md" >/tmp/page
	[ "$(wc -l </tmp/page)" -gt 40 ] || die 'the page has no commands'
	. /tmp/page
	has /etc/kmehsm/keysvc.yaml 640 root:kmehsm
	has /etc/kmehsm/factory.yaml 640 root:kmehsm-factory
	has /var/lib/kmehsm 700 kmehsm:kmehsm
	has /var/lib/kmehsm-factory 700 kmehsm-factory:kmehsm-factory
	bound 3
	for _ in {1..60}; do # the refusal is written down within seconds
		! operator keysvc binding explain 001010000000003 >/tmp/why || ! grep -q '(signature)' /tmp/why || break
		sleep 1
	done
	grep '(signature)' /tmp/why || die 'no reason of the refusal is known'
	# Root's commands would leave files that the service cannot use.
	for unit in 'keysvc store verify' 'keysvc init' 'factory init' 'factory doctor' 'keysvc serve'; do
		! (export $(cat /etc/kmehsm/"${unit%% *}".env) && cd / && $unit) 2>/tmp/root || die "root may run $unit"
		grep -q 'run this as that user (runuser -u kmehsm' /tmp/root || die "$unit: $(cat /tmp/root)"
	done
	for unit in keysvc factory-station; do
		systemd-analyze verify --man=no "/usr/lib/systemd/system/$unit.service"
		systemd-analyze security --offline=true --threshold=25 "/usr/lib/systemd/system/$unit.service" >/tmp/security ||
			die "$(tail -n 1 /tmp/security)"
	done
	for unit in keysvc factory mesim; do
		bash -n "/usr/share/bash-completion/completions/$unit"
	done
	echo 'installed, three devices bound and one refused, as the page says'

	# Upgraded, while it runs: the configuration that was changed and all state are as they were, and the service runs
	# again, as the later unit says.
	echo 'drain_delay: 0s' >>/etc/kmehsm/keysvc.yaml
	sum=$(cat /etc/kmehsm/*.yaml | sha256sum) version=$(schema)
	upgrade ../2/kmehsm-keysvc_*.deb # alone: what it leaves undone no other package does
	[ "$sum" = "$(cat /etc/kmehsm/*.yaml | sha256sum)" ] || die 'the upgrade changed a configuration'
	has /etc/kmehsm/keysvc.yaml 640 root:kmehsm
	systemctl is-active keysvc || die 'keysvc does not run after the upgrade'
	ready
	tr '\0' '\n' </proc/"$(</run/systemctl/keysvc.pid)"/environ | grep -x LATER=1 ||
		die 'keysvc runs with the earlier unit'
	[ "$(schema)" = $((version + 1)) ] || die "the schema was $version, and is $(schema)"
	bound 3
	operator keysvc store verify
	upgrade ../2/kmehsm-{factory,mesim,freediameter}_*.deb
	upgrade ./kmehsm-keysvc_*.deb >/dev/null # the earlier one again
	ready | grep 'a newer release has upgraded the store' # and it can work with what the later one has added
	bound 3
	systemctl stop keysvc
	upgrade ../2/kmehsm-keysvc_*.deb >/dev/null
	! systemctl is-active keysvc || die 'the upgrade started keysvc, which did not run'
	echo 'upgraded with its schema'

	# The stations.
	local dir=/etc/kmehsm address
	. "$2/scripts/certificates.sh"
	certificate station IP:127.0.0.1 serverAuth
	certificate station-1 DNS:station-1 clientAuth
	chgrp -R kmehsm-factory $dir/tls && chmod -R g+rX $dir/tls
	printf '%s\n' 'listen: 127.0.0.1:0' 'stations: [station-1]' \
		'tls: {certificate: tls/station.pem, key: tls/station.key, client_ca: tls/ca.pem}' >>/etc/kmehsm/factory.yaml
	install -d -o kmehsm-factory -g kmehsm-factory /var/lib/kmehsm-factory/station
	mkdir /tmp/station && mount --bind /var/lib/kmehsm-factory/station /tmp/station
	mount --bind /var/lib/kmehsm-factory /var/lib/kmehsm-factory # ProtectSystem=strict, but for its own folder
	mount -o remount,bind,ro /var/lib/kmehsm-factory
	mount --bind /tmp/station /var/lib/kmehsm-factory/station
	systemctl enable --now factory-station
	for _ in {1..600}; do
		address=$(sed -nE 's/.*"address":"(https:[^"]*)".*/\1/p' /tmp/factory-station.log)
		[ -z "$address" ] || break
		sleep 0.1
	done
	curl --fail -sS --cacert $dir/tls/ca.pem --cert $dir/tls/station-1.pem --key $dir/tls/station-1.key -X POST \
		"$address/v1/lots/L1/next" | jq -e '.imei == "35209900000001"'
	curl --fail -sS --cacert $dir/tls/ca.pem "$address/healthz"
	systemctl stop factory-station
	umount /var/lib/kmehsm-factory/station /var/lib/kmehsm-factory /tmp/station
	echo 'stations served'

	# Removed, installed again, purged, by dpkg.
	systemctl start keysvc
	ready
	dpkg -r kmehsm-keysvc kmehsm-factory kmehsm-mesim kmehsm-freediameter
	! systemctl is-active keysvc || die 'keysvc runs after it was removed'
	! [ -e /usr/bin/keysvc ] || die 'keysvc is left'
	has /etc/kmehsm/keysvc.yaml 640 root:kmehsm
	sum=$(state)
	upgrade ../2/kmehsm-*.deb
	[ "$(state)" = "$sum" ] || die 'state changed when the packages were removed and installed'
	bound 3
	sum=$(state) # a command opens the database anew
	dpkg -P kmehsm-keysvc kmehsm-factory kmehsm-mesim kmehsm-freediameter 2>&1 | tee /tmp/purge
	grep -q 'kmehsm-keysvc leaves /var/lib/kmehsm:' /tmp/purge
	grep -q 'rm -r /var/lib/kmehsm-factory; userdel kmehsm-factory' /tmp/purge
	# Of all files only those are left that the page and the certificates of the test are.
	files | LC_ALL=C comm -13 /tmp/before - |
		grep -vE '^/etc/kmehsm(|/(keysvc|factory)\.env|/tls(|/.*))$' >/tmp/left || true
	! [ -s /tmp/left ] || die "purge leaves $(cat /tmp/left)"
	[ "$(state)" = "$sum" ] || die 'purge changed state'
	echo 'removed, installed again and purged; state and keys are as they were'

	# By rpm.
	local rpm=(rpm --dbpath /tmp/rpmdb --nodeps)
	"${rpm[@]}" -i ./kmehsm-keysvc-*.rpm ./kmehsm-factory-*.rpm
	has /etc/kmehsm/keysvc.yaml 640 root:kmehsm
	echo '# mine' >>/etc/kmehsm/keysvc.yaml
	"${rpm[@]}" -U ../2/kmehsm-keysvc-*.rpm ../2/kmehsm-factory-*.rpm
	tail -n 1 /etc/kmehsm/keysvc.yaml | grep -qx '# mine' || die 'the upgrade changed the configuration'
	keysvc --version
	[ "$(state)" = "$sum" ] || die 'an upgrade by rpm changed state'
	"${rpm[@]}" -e kmehsm-keysvc kmehsm-factory | tee /tmp/purge
	grep -q 'kmehsm-keysvc leaves /var/lib/kmehsm:' /tmp/purge
	[ "$(state)" = "$sum" ] || die 'rpm -e changed state'
	! [ -e /usr/bin/keysvc ] || die 'keysvc is left'
	echo 'the same by rpm'

	# What nothing was written to goes.
	rm -r /var/lib/kmehsm
	upgrade ./kmehsm-keysvc_*.deb && dpkg -P kmehsm-keysvc 2>&1 | tee /tmp/purge
	! grep leaves /tmp/purge || die 'purge leaves an empty folder'
	! [ -e /var/lib/kmehsm ] || die 'purge leaves an empty folder'

	# The services could use all that was there.
	[ "$(grep -c '"msg":"serving"' /tmp/keysvc.log)" = 4 ] || die 'the log of keysvc does not say "serving" four times'
	! grep -i 'permission denied' /tmp/keysvc.log /tmp/factory-station.log || die 'a service lacks a permission'
}

# state: lists all files in the folders of both services
state() {
	find /var/lib/kmehsm /var/lib/kmehsm-factory /var/lib/kmehsm-directory -printf '%p %m %u %g\n' | sort | sha256sum
	find /var/lib/kmehsm /var/lib/kmehsm-factory /var/lib/kmehsm-directory -type f ! -name '*-shm' ! -name '*-wal' \
		-print0 | sort -z | xargs -0 sha256sum | sha256sum
}

if [ "${1:-}" = --inside ]; then
	inside "$2" "$3"
	exit
fi

[ "$(id -u)" -eq 0 ] || die 'it needs root: it mounts, and installs packages in a copy of this machine'
# Mounts, processes and folders are in namespaces of their own, and go with them: whatever ends the test ends all.
if [ "${1:-}" != --alone ]; then
	exec timeout --foreground --kill-after 5 60m setpriv --pdeathsig KILL \
		unshare --mount --propagation private --pid --fork --kill-child --mount-proc "$0" --alone "$@"
fi
mount -t tmpfs tmpfs /mnt
mkdir -m 755 /mnt/{built,upper,work,root}
mkdir -m 1777 /mnt/tmp
export TMPDIR=/mnt/tmp
built=${2:-/mnt/built}
if [ -z "${2:-}" ]; then
	mkdir "$built"/{1,2} /mnt/tmp/programs
	if [[ $(bin/packages/keysvc --version 2>/dev/null) == *"commit $(git rev-parse HEAD),"* ]] &&
		(cd bin/packages && sha256sum --check --quiet SHA256SUMS); then
		mount --bind bin/packages "$built/1"
	else
		scripts/release.sh "$built/1" --programs >/dev/null
	fi
	version=$(dpkg-deb --field "$built"/1/kmehsm-keysvc_*.deb Version)
	git clone -q . /mnt/tmp/later
	cd /mnt/tmp/later
	added='"CREATE TABLE later (x INTEGER)"'
	sed -i "s/sqlconn.First(schema)/sqlconn.Schema{Migrations: []string{schema, $added}, Least: 1}/" \
		binding/sqlstore/open.go
	sed -i 's/^ExecReload=/Environment=LATER=1\n&/' deploy/keysvc.service
	echo '# later' | tee -a deploy/keysvc.yaml >>deploy/factory.yaml
	cp "$built"/1/{factory,mesim,kme.fdx} /mnt/tmp/programs
	go build -trimpath -ldflags='-s -w' -o /mnt/tmp/programs/ ./cmd/keysvc
	scripts/packages.sh /mnt/tmp/programs "$built/2" "${version%-1}.later" >/dev/null
	cd "$OLDPWD"
fi
lintian --fail-on error,warning --suppress-tags initial-upload-closes-no-bugs "$built"/1/*.deb >/mnt/lintian 2>&1 &
lintian=$!
# A copy of the machine: an overlay, whose upper layer is in memory.
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
for dir in dev proc; do mount --rbind /$dir /mnt/root/$dir; done
mkdir /mnt/root/mnt/{packages,source}
mount --rbind "$built" /mnt/root/mnt/packages
mount --bind . /mnt/root/mnt/source
mount -t tmpfs -o mode=1777 tmpfs /mnt/root/tmp
unset TMPDIR
chroot /mnt/root /mnt/source/scripts/packages-test.sh --inside /mnt/packages /mnt/source
wait $lintian || die "lintian finds: $(cat /mnt/lintian)"
