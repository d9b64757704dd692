# To be sourced, with dir set: makes a CA in dir/tls, and defines certificate, which makes more.
# shellcheck shell=bash
: "${dir:?}"
mkdir -p "$dir/tls"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$dir/tls/ca.key" \
	-out "$dir/tls/ca.pem" -days 2 -subj "/CN=kmehsm test CA" 2>/dev/null
# certificate NAME SUBJECTALTNAME USAGE: makes dir/tls/NAME.pem and NAME.key
certificate() {
	openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$dir/tls/$1.key" \
		-subj "/CN=$1" 2>/dev/null |
		openssl x509 -req -CA "$dir/tls/ca.pem" -CAkey "$dir/tls/ca.key" -CAcreateserial -days 2 \
			-out "$dir/tls/$1.pem" -extfile <(printf 'subjectAltName=%s\nextendedKeyUsage=%s\n' "$2" "$3") 2>/dev/null
}
