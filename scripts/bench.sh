#!/usr/bin/env bash
# Measures the figures of docs/performance.md, in var/bench: it sets up a manufacturer and an operator on SoftHSM, and a
# Vault on Raft storage, and starts bin/bench. make bench runs it. Its settings are PAIRS, SECONDS_EACH, BITS=2048,3072
# and ONLY=PART,PART. With ONLY, it measures these parts, and keeps the other parts of bench.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
devices=2000
dir=$PWD/var/bench
umask 077
last=
[ -z "${ONLY:-}" ] || last=$(cat var/bench/bench.json 2>/dev/null || true)
. scripts/line-on-vault.sh # new tokens, a Vault, and the line's keys

openssl genrsa -out "$dir/fixture.key" 3072 2>/dev/null
openssl rsa -in "$dir/fixture.key" -pubout -out "$dir/fixture.pem" 2>/dev/null
# quiet COMMAND...: runs it with its output in a log, and shows the log if it fails
quiet() {
	"$@" >>"$dir/setup.log" 2>&1 || { cat "$dir/setup.log" >&2 && exit 1; }
}
officer=file:$dir/softhsm/factory.so-pin
line=(--token "$FACTORY_TOKEN" --state "$dir/factory")
quiet factory fixture enroll bench "${line[@]}" --fixture-key "$dir/fixture.pem" --so-pin-source "$officer" \
	--out "$dir/fixture-enrolment.json"
manufacturer=$(factory init "${line[@]}" --json 2>>"$dir/setup.log" | jq -r .manufacturer)
line+=(--directory "file:$dir/directory")
for bits in 2048 3072; do
	quiet factory lot create "L$bits" "${line[@]}" --tac "3520${bits}" --first 1 --count "$devices" --bits "$bits"
	quiet factory lot provision "L$bits" "${line[@]}" --out "$dir/injection-$bits"
done

# operator NAME TOKEN: puts an operator's keys and all lots into a token, and its state into dir/NAME
operator() {
	local name=$1 state=(--state "$dir/$1") thumbprint
	export KMEHSM_TOKEN=$2
	quiet keysvc init "${state[@]}"
	thumbprint=$(keysvc transport new "${state[@]}" --json 2>>"$dir/setup.log" | jq -r .thumbprint)
	quiet factory operator enroll "$name" "${line[@]:0:4}" --transport-key "$dir/$name/transport.json" \
		--thumbprint "$thumbprint" --so-pin-source "$officer" --out "$dir/$name/enrolment.jws"
	quiet keysvc enroll "$dir/$name/enrolment.jws" "${state[@]}" --manufacturer "$dir/factory/manufacturer.pem" \
		--thumbprint "$manufacturer" --directory "file:$dir/directory"
	for bits in 2048 3072; do
		quiet factory lot grant "L$bits" "${line[@]}" --operator "$name" --out "$dir/$name/L$bits.jws"
		quiet keysvc lot import "$dir/$name/L$bits.jws" "${state[@]}"
	done
}
operator keysvc "$OPERATOR_TOKEN"
# shellcheck source=scripts/certificates.sh
. scripts/certificates.sh
certificate keysvc IP:127.0.0.1 serverAuth
certificate hss DNS:hss.bench clientAuth
# configuration NAME TOKEN: writes an instance's configuration, dir/NAME.yaml, which the caller may extend
configuration() {
	cat >"$dir/$1.yaml" <<EOC
token: '$2'
state: $1
listen: 127.0.0.1:0
socket: $1.sock
tls: {certificate: tls/keysvc.pem, key: tls/keysvc.key, client_ca: tls/ca.pem}
clients:
  - {name: hss, san: hss.bench, roles: [hss], plmns: [all]}
  - {name: hss-socket, uid: $(id -u), roles: [hss], plmns: [all]}
EOC
}
configuration keysvc "$OPERATOR_TOKEN"
if compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || command -v postgres psql >/dev/null; then
	trap 'kill "$vault"; ${postgres:+kill -QUIT "$postgres"}; wait || true; rm -rf "${pgdata:-}"' EXIT
	# shellcheck source=scripts/start-postgres.sh
	. scripts/start-postgres.sh
	echo "$postgres" >"$dir/postgres.pid"
	./softhsm-setup.sh --dir "$dir/softhsm" factory operator postgres >/dev/null
	# shellcheck source=/dev/null
	. "$dir/softhsm/env" # a token is of one store: it keeps the high-water mark of its ledger
	store="postgres://keysvc@/keysvc?host=$pgdata"
	quiet keysvc store upgrade --store "postgres://keysvc_owner@/keysvc?host=$pgdata" --role keysvc
	KMEHSM_STORE=$store operator keysvc-postgres "$POSTGRES_TOKEN"
	cp -r "$dir/keysvc-postgres" "$dir/keysvc-postgres-2"
	for name in keysvc-postgres keysvc-postgres-2; do
		configuration "$name" "$POSTGRES_TOKEN"
		echo "store: '$store'" >>"$dir/$name.yaml"
	done
fi
[ -z "$last" ] || printf '%s\n' "$last" >"$dir/bench.json"
bin/bench -dir "$dir" -pairs "${PAIRS:-6}" -seconds "${SECONDS_EACH:-2}" -bits "${BITS:-2048,3072}" -only "${ONLY:-}"
