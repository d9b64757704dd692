#!/usr/bin/env bash
# Shows the whole flow on SoftHSM, in var/demo: a manufacturer and an operator with a token each, devices, and refusals.
# make demo runs it. Its settings are DEVICES, BITS and DIRECTORY.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

devices=${DEVICES:-1000} bits=${BITS:-3072} directory=${DIRECTORY:-file}
case $directory in file | vault) ;; *) echo "DIRECTORY is file or vault, not $directory" >&2 && exit 2 ;; esac
case $devices in '' | *[!0-9]* | 0* | ???????*) devices=0 ;; esac
if [ "$devices" -lt 3 ] || [ "$devices" -gt 999999 ]; then # device 0 has serial number 1, and some are tampered with
	echo "DEVICES is a number from 3 to 999999" >&2
	exit 2
fi
case $bits in 2048 | 3072 | 4096) ;; *) echo "BITS is 2048, 3072 or 4096, not $bits" >&2 && exit 2 ;; esac

dir=var/demo
export PATH=$PWD/bin:$PATH
umask 077
rm -rf "$dir"
mkdir -p "$dir"

server='' vault=''
# What this script starts, it ends, whatever happens.
finish() {
	local status=$?
	for pid in $server $vault; do
		kill "$pid" 2>/dev/null || true
		wait "$pid" 2>/dev/null || true
	done
	[ $status -eq 0 ] || echo "the demo failed; what it left is in $dir, the service's log in $dir/keysvc.log" >&2
}
trap finish EXIT

step() { printf '\n== %s\n' "$*"; }
# run prints a command as one would type it, and runs it. Long values without secrets are in variables.
exec 3>&1 # where the demo prints, also from within $(run ...)
run() {
	local word line='$'
	for word; do
		case $word in *\ *) word="'$word'" ;; esac
		line+=" $word"
	done
	printf '%s\n' "$line" >&3
	"$@"
}

step "1. A token for each, by SoftHSM (a real HSM comes with its own)"
./softhsm-setup.sh --dir "$dir/softhsm" factory operator
# shellcheck source=/dev/null
. "$dir/softhsm/env"

# These are the line's folder and its directory, the operator's name for the directory, and the service's login.
state=(--state "$dir/factory") line=("${state[@]}" --directory "file:$dir/directory") where=file:$dir/directory login=
if [ "$directory" = vault ]; then
	step "1b. A Vault on Raft storage, with a mount, policies and AppRoles"
	if [ -z "${VAULT_ADDR:-}" ] || [ -z "${VAULT_TOKEN:-}" ]; then # else the server that they name is used
		# shellcheck source=scripts/start-vault.sh
		. scripts/start-vault.sh
	fi
	run factory vault setup --directory vault:kme
	as_admin() { curl -sSf -H "X-Vault-Token: $VAULT_TOKEN" "$@"; }
	run factory vault setup --directory vault:kme
	as_admin -X POST "$VAULT_ADDR/v1/sys/auth/approle" -d '{"type": "approle"}'
	# approle POLICY: makes a role, and writes its secret id to a file
	approle() {
		as_admin -X POST "$VAULT_ADDR/v1/auth/approle/role/$1" -d "{\"token_policies\": \"$1\", \"token_ttl\": \"1h\"}"
		as_admin -X POST "$VAULT_ADDR/v1/auth/approle/role/$1/secret-id" | jq -r .data.secret_id >"$dir/$1.secret-id"
		as_admin "$VAULT_ADDR/v1/auth/approle/role/$1/role-id" | jq -r .data.role_id
	}
	publisher=$(approle kme-factory-publisher)
	line=("${state[@]}" --directory vault:kme --vault-role-id "$publisher"
		--vault-secret-id-file "$dir/kme-factory-publisher.secret-id")
	where=vault:kme
fi

step "2. The manufacturer's keys, and the fixture that injects device keys"
export KMEHSM_TOKEN=$FACTORY_TOKEN
officer=file:$PWD/$dir/softhsm/factory.so-pin
made=$(run factory init "${state[@]}" --json)
echo "$made"
manufacturer=$(jq -r .manufacturer <<<"$made") # as the manufacturer reads it out
openssl genrsa -out "$dir/fixture.key" 3072 2>/dev/null
openssl rsa -in "$dir/fixture.key" -pubout -out "$dir/fixture.pem" 2>/dev/null
run factory fixture enroll f1 "${state[@]}" --fixture-key "$dir/fixture.pem" --so-pin-source "$officer" \
	--out "$dir/fixture-enrolment.json"

step "3. The operator's keys, and a KEK between the two tokens"
KMEHSM_TOKEN=$OPERATOR_TOKEN run keysvc init --state "$dir/keysvc"
KMEHSM_TOKEN=$OPERATOR_TOKEN run keysvc transport new --state "$dir/keysvc"
thumbprint=$(jq -r .key.kid "$dir/keysvc/transport.json") # as the operator reads it out
run factory operator enroll acme "${state[@]}" --transport-key "$dir/keysvc/transport.json" \
	--thumbprint "$thumbprint" --so-pin-source "$officer" --out "$dir/enrolment.jws"
KMEHSM_TOKEN=$OPERATOR_TOKEN run keysvc enroll "$dir/enrolment.jws" --state "$dir/keysvc" \
	--manufacturer "$dir/factory/manufacturer.pem" --thumbprint "$manufacturer" --directory "$where"

step "4. A lot: its P and Q are made in the factory's token, and so is every device key"
run factory lot create L1 "${line[@]}" --tac 35209900 --first 1 --count "$devices" --bits "$bits"
provisioned=$(run factory lot provision L1 "${line[@]}" --out "$dir/injection" --json)
echo "$provisioned"
run factory lot grant L1 "${line[@]}" --operator acme --out "$dir/grant.jws"
KMEHSM_TOKEN=$OPERATOR_TOKEN run keysvc lot import "$dir/grant.jws" --state "$dir/keysvc"
run factory lot seal L1 --yes "${line[@]}"

if [ "$directory" = vault ]; then
	step "4b. The operator may read the lot that it was granted, and no other"
	printf '$ factory operator policy acme --directory vault:kme | vault policy write kme-operator-acme -\n'
	policy=$(factory operator policy acme --directory vault:kme "${state[@]}")
	as_admin -X PUT "$VAULT_ADDR/v1/sys/policies/acl/kme-operator-acme" -d "$(jq -n --arg policy "$policy" '{$policy}')"
	role=$(approle kme-operator-acme)
	login="vault: {role_id: '$role', secret_id_file: kme-operator-acme.secret-id}"
	run factory lot create L2 "${line[@]}" --tac 35209901 --first 1 --count 1 --bits "$bits"
	credentials=$(jq -n --arg r "$role" --rawfile s "$dir/kme-operator-acme.secret-id" \
		'{role_id: $r, secret_id: ($s | rtrimstr("\n"))}')
	token=$(curl -sSf -X POST "$VAULT_ADDR/v1/auth/approle/login" -d "$credentials" | jq -r .auth.client_token)
	# may LOT: prints the HTTP status that the operator gets for the lot's manifest
	may() {
		curl -s -o /dev/null -w '%{http_code}' -H "X-Vault-Token: $token" "$VAULT_ADDR/v1/kme/data/lots/$1/manifest"
	}
	for lot in L1 L2; do
		printf '%-14s %s\n' "$lot" "$(may "$lot")"
	done
	[ "$(may L2)" = 403 ]
	unset VAULT_TOKEN # from here on nobody but the AppRoles
fi

step "5. The operator's service, with mutual TLS"
# shellcheck source=scripts/certificates.sh
. scripts/certificates.sh
certificate keysvc IP:127.0.0.1 serverAuth
certificate hss DNS:hss.demo clientAuth

cat >"$dir/keysvc.yaml" <<EOF
token: '$OPERATOR_TOKEN'
state: keysvc
listen: 127.0.0.1:0
tls: {certificate: tls/keysvc.pem, key: tls/keysvc.key, client_ca: tls/ca.pem}
socket: keysvc.sock
clients:
  - {name: hss, san: hss.demo, roles: [hss], plmns: [all]}
  - {name: operator, uid: $(id -u), roles: [hss, admin, monitor, metrics], plmns: [all]}
revocation_ttl: 1s
drain_delay: 0s
$login
EOF
printf '$ keysvc serve --config %s\n' "$dir/keysvc.yaml"
env -u KMEHSM_TOKEN keysvc serve --config "$dir/keysvc.yaml" 2>"$dir/keysvc.log" &
server=$!
as_hss=(--cacert "$dir/tls/ca.pem" --cert "$dir/tls/hss.pem" --key "$dir/tls/hss.key")
url=
for _ in {1..600}; do
	address=$(jq -r 'select(.msg == "serving") | .addresses[0]' "$dir/keysvc.log" 2>/dev/null || true)
	url=https://$address
	[ -n "$address" ] && curl -sf "${as_hss[@]}" "$url/readyz" >/dev/null && break
	kill -0 "$server" 2>/dev/null || { cat "$dir/keysvc.log" >&2 && exit 1; }
	sleep 0.1
done
curl -sSf "${as_hss[@]}" "$url/readyz"

step "6. Every device attaches: NW_SIG compared, the next RAND decrypted under KME"
simulate() {
	mesim attach --injection "$dir/injection" --fixture-key "$dir/fixture.key" \
		--fixture-enrolment "$dir/fixture-enrolment.json" --server "$url" --ca "$dir/tls/ca.pem" \
		--cert "$dir/tls/hss.pem" --key "$dir/tls/hss.key" "$@"
}
begin=$(date +%s.%N)
attached=$(simulate)
attach_seconds=$(jq -n "$(date +%s.%N) - $begin")
echo "$attached"

step "7. Refusals: what is tampered with gets one answer, whatever was"
refusals='{}'
# It adds the refusals that a run of mesim has printed.
add() {
	refusals=$(jq -c --argjson r "$(jq -c .rejected <<<"$1")" \
		'reduce ($r | to_entries[]) as $e (.; .[$e.key] += $e.value)' <<<"$refusals")
}
for kind in kme signature payload other-device other-lot replay; do
	result=$(simulate --count 3 --tamper "$kind")
	printf '%-14s %s\n' "$kind" "$(jq -c .rejected <<<"$result")"
	add "$result"
done
last=$(printf '35209900%06d' "$devices")
run factory lot revoke L1 --yes "$last" "${line[@]}" --reason "stolen on the line"
revoked=$(date +%s.%N)
for _ in {1..600}; do # until the service has read the list again
	asked=$(date +%s.%N)
	age=$(curl -sSf --unix-socket "$dir/keysvc.sock" http://keysvc/metrics |
		sed -n 's/^kme_revocations_age_seconds{.*} //p')
	jq -ne "$age < $asked - $revoked" >/dev/null 2>&1 && break
	sleep 0.1
done
result=$(simulate --first $((devices - 1)) --first-imsi 001019000000000 2>/dev/null || true)
printf '%-14s %s\n' revoked "$(jq -c .rejected <<<"$result")"
add "$result"
KMEHSM_TOKEN=$FACTORY_TOKEN factory lot grant L1 "${line[@]}" --operator acme --out "$dir/late.jws" \
	2>"$dir/late.txt" && exit 1
printf '%-14s %s\n' "late grant" "$(cat "$dir/late.txt")"

jq -n --argjson p "$(jq -c . <<<"$provisioned")" --argjson a "$attached" --argjson rejected "$refusals" \
	--argjson devices "$devices" --argjson bits "$bits" --argjson seconds "$attach_seconds" '
	{devices: $devices, lot_bits: $bits, provision_seconds: $p.seconds, attach_seconds: $seconds,
	 attached: $a.attached, rejected: $rejected, ok: ($a.attached == $devices and $p.made == $devices
	 and $rejected == {KME_REJECTED: 18, REVOKED_DEVICE: 1})}' >"$dir/summary.json"

step "Summary"
jq -r '"lot            L1, \(.lot_bits) bits; P and Q never left the tokens
devices made   \(.devices) in \(.provision_seconds * 10 | round / 10) s, \(
	.devices / .provision_seconds | round) a second
attached       \(.attached) in \(.attach_seconds * 10 | round / 10) s, \(.attached / .attach_seconds | round) a second
refused        \(.rejected | to_entries | map("\(.value) \(.key)") | join(", "))
result         \(if .ok then "everything as it should be" else "NOT as it should be" end)"' "$dir/summary.json"
echo "               $dir/summary.json"
jq -e .ok "$dir/summary.json" >/dev/null
