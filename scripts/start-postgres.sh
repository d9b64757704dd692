# To be sourced, with dir set: starts a PostgreSQL, as process $postgres, on a Unix socket in the new folder $pgdata. It
# makes the database keysvc, its owner keysvc_owner and the service's role keysvc, and logs to dir. The caller ends the
# process by SIGQUIT, and removes the folder. The folder is not below this tree: PostgreSQL does not run as root, and
# its user may not enter the tree.
# shellcheck shell=bash
: "${dir:?}"
pgbin=$(dirname "$(compgen -G '/usr/lib/postgresql/*/bin/psql' | tail -n 1 || command -v psql)")
pgdata=$(mktemp -d /var/tmp/kmehsm-postgres-XXXXXX)
as=()
if [ "$(id -u)" = 0 ]; then
	user=postgres
	id "$user" >/dev/null 2>&1 || user=nobody
	chown "$user" "$pgdata"
	as=(setpriv --reuid "$user" --regid "$(id -g "$user")" --clear-groups)
fi
as+=(env -C "$pgdata") # where that user may be
"${as[@]}" "$pgbin/initdb" -D "$pgdata/data" -U postgres -A trust -E UTF8 --locale=C >"$dir/postgres.log"
"${as[@]}" "$pgbin/postgres" -D "$pgdata/data" -k "$pgdata" -c listen_addresses= -c max_connections=200 \
	>>"$dir/postgres.log" 2>&1 &
postgres=$!
pg() { "$pgbin/psql" -q -v ON_ERROR_STOP=1 -h "$pgdata" -U postgres "$@"; }
for _ in {1..600}; do
	pg -c 'SELECT 1' >/dev/null 2>&1 && break
	kill -0 "$postgres" 2>/dev/null || { cat "$dir/postgres.log" >&2 && exit 1; }
	sleep 0.1
done
pg -c 'CREATE ROLE keysvc_owner LOGIN' -c 'CREATE ROLE keysvc LOGIN' -c 'CREATE DATABASE keysvc OWNER keysvc_owner'
