#!/usr/bin/env bash
# The figures of docs/performance.md, in var/bench: a manufacturer and an operator on SoftHSM, a Vault on Raft storage,
# and bin/bench, which measures. make bench runs it. PAIRS, SECONDS_EACH, BITS=2048,3072 and
# ONLY=PART,PART are its settings; with ONLY, the other parts of bench.json stay as the last run has left them.
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
{
	officer=file:$dir/softhsm/factory.so-pin
	factory fixture enroll bench --state "$dir/factory" --fixture-key "$dir/fixture.pem" \
		--so-pin-source "$officer" --out "$dir/fixture-enrolment.json"
	export KMEHSM_TOKEN=$OPERATOR_TOKEN
	keysvc init --state "$dir/keysvc"
	thumbprint=$(keysvc transport new --state "$dir/keysvc" --json | jq -r .thumbprint)
	manufacturer=$(KMEHSM_TOKEN=$FACTORY_TOKEN factory init --state "$dir/factory" --json | jq -r .manufacturer)
	KMEHSM_TOKEN=$FACTORY_TOKEN factory operator enroll bench --state "$dir/factory" \
		--transport-key "$dir/keysvc/transport.json" --thumbprint "$thumbprint" \
		--so-pin-source "$officer" --out "$dir/enrolment.jws"
	keysvc enroll "$dir/enrolment.jws" --state "$dir/keysvc" --manufacturer "$dir/factory/manufacturer.pem" \
		--thumbprint "$manufacturer" --directory "file:$dir/directory"
	for bits in 2048 3072; do
		line=(--token "$FACTORY_TOKEN" --directory "file:$dir/directory" --state "$dir/factory")
		factory lot create "L$bits" "${line[@]}" --tac "3520${bits}" --first 1 --count "$devices" --bits "$bits"
		factory lot provision "L$bits" "${line[@]}" --out "$dir/injection-$bits"
		factory lot grant "L$bits" "${line[@]}" --operator bench --out "$dir/grant.jws"
		keysvc lot import "$dir/grant.jws" --state "$dir/keysvc"
	done
} >"$dir/setup.log" 2>&1 || { cat "$dir/setup.log" >&2 && exit 1; }
# shellcheck source=scripts/certificates.sh
. scripts/certificates.sh
certificate keysvc IP:127.0.0.1 serverAuth
certificate hss DNS:hss.bench clientAuth
cat >"$dir/keysvc.yaml" <<EOC
token: '$OPERATOR_TOKEN'
state: keysvc
listen: 127.0.0.1:0
socket: keysvc.sock
tls: {certificate: tls/keysvc.pem, key: tls/keysvc.key, client_ca: tls/ca.pem}
clients:
  - {name: hss, san: hss.bench, roles: [hss], plmns: [all]}
  - {name: hss-socket, uid: $(id -u), roles: [hss], plmns: [all]}
EOC
[ -z "$last" ] || printf '%s\n' "$last" >"$dir/bench.json"
bin/bench -dir "$dir" -pairs "${PAIRS:-5}" -seconds "${SECONDS_EACH:-3}" -bits "${BITS:-2048,3072}" -only "${ONLY:-}"
