#!/usr/bin/env bash
set -euo pipefail

usage() {
	cat <<'EOF'
usage: scripts/deps.sh build|demo|plugin|packages|bench|check|test|generate

Installs, with apt-get, what this machine lacks for a Make target, and nothing else:

    build       a C compiler and the C library's headers (cgo, for PKCS #11 and SQLite), CA certificates
    demo        build's, and SoftHSM, curl, jq, openssl
    plugin      build's, and make, the headers of freeDiameter and libcurl
    packages    demo's and plugin's, and dpkg-dev
    bench       demo's and plugin's, and freeDiameterd, PostgreSQL
    check       demo's, and shellcheck, groff, age, zsh, fish, SQLite's shell, OpenSC (pkcs11-tool and pkcs11-spy.so),
                openCryptoki, p11-kit, NSS softoken
    test        check's, bench's and packages', and lintian, rpm, clang with libFuzzer, tshark, promtool, spin,
                Chromium, ip
    generate    protoc

It does so as root or with sudo. With nothing missing it does nothing, on any system. First it lists what is missing,
and the tools that the target will have go fetch, as their modules: staticcheck for check; nfpm and cyclonedx-gomod for
packages; Vault for bench; grpcurl for test.
EOF
}

die() {
	printf 'scripts/deps.sh: %s\n' "$1" >&2
	exit 1
}

missing=() tools=()

# need PACKAGE TEST...: notes that a package is missing if the test for its content fails. The content may also come
# from elsewhere.
need() {
	local package=$1
	shift
	"$@" >/dev/null 2>&1 || missing+=("$package")
}

# fetches MODULE [SPELT]: notes that go will fetch a tool, if it has no version of it. The module cache may spell it in
# another way.
fetches() {
	compgen -G "$(go env GOMODCACHE)/${2:-$1}@*" >/dev/null || tools+=("$1")
}

has_headers() { has_header stdlib.h; }

has_header() {
	printf '#include <%s>\n' "$1" | $cc -E -
}

# Without these certificates, go fetches no modules.
has_certificates() {
	compgen -G '/etc/ssl/certs/*' || [ -e /etc/ssl/cert.pem ]
}

has_spy() {
	compgen -G '/usr/lib/*/pkcs11-spy.so' || compgen -G '/usr/lib*/pkcs11-spy.so'
}

has_p11_kit_client() {
	compgen -G '/usr/lib/*/pkcs11/p11-kit-client.so'
}

has_softoken() {
	[ -e "$($cc -print-file-name=libsoftokn3.so)" ]
}

has_postgres() {
	command -v postgres || compgen -G '/usr/lib/postgresql/*/bin/postgres'
}

has_fuzzer() {
	compgen -G '/usr/lib/llvm-*/lib/clang/*/lib/linux/libclang_rt.fuzzer-*.a'
}

for_build() {
	need gcc command -v "${cc%% *}"
	need libc6-dev has_headers
	need ca-certificates has_certificates
}

for_demo() {
	for_build
	need softhsm2 command -v softhsm2-util
	need curl command -v curl
	need jq command -v jq
	need openssl command -v openssl
}

for_plugin() {
	for_build
	need make command -v make
	need libfreediameter-dev has_header freeDiameter/extension.h
	need libcurl4-openssl-dev has_header curl/curl.h
}

for_packages() {
	for_demo
	for_plugin
	need dpkg-dev command -v dpkg-shlibdeps
	fetches github.com/goreleaser/nfpm/v2
	fetches github.com/CycloneDX/cyclonedx-gomod 'github.com/!cyclone!d!x/cyclonedx-gomod'
}

for_bench() {
	for_demo
	for_plugin
	need libssl-dev has_header openssl/evp.h
	need freediameterd command -v freeDiameterd
	need postgresql has_postgres
	fetches github.com/hashicorp/vault
}

for_check() {
	for_demo
	need shellcheck command -v shellcheck
	need groff-base groff --version
	need age command -v age
	need zsh command -v zsh
	need fish command -v fish
	need sqlite3 command -v sqlite3
	need opensc command -v pkcs11-tool
	need opensc-pkcs11 has_spy
	need opencryptoki command -v pkcsslotd
	need p11-kit command -v p11-kit
	need p11-kit-modules has_p11_kit_client
	need libnss3 has_softoken
	need libnss3-tools command -v certutil
	fetches honnef.co/go/tools
}

for_test() {
	for_check
	for_bench
	for_packages
	need lintian command -v lintian
	need rpm command -v rpm
	need clang command -v clang
	need libclang-rt-dev has_fuzzer
	need tshark command -v tshark
	need iproute2 command -v ip
	need prometheus command -v promtool
	need spin command -v spin
	need chromium command -v chromium
	fetches github.com/fullstorydev/grpcurl
}

for_generate() {
	need protobuf-compiler command -v protoc
	need libprotobuf-dev test -e /usr/include/google/protobuf/timestamp.proto
}

case ${1:-} in
build | demo | plugin | packages | bench | check | test | generate) ;;
-h | --help) usage && exit ;;
*)
	usage >&2
	exit 2
	;;
esac

command -v go >/dev/null || die 'go not found: install it as https://go.dev/doc/install tells; go.mod names the version'
cc=$(go env CC)
"for_$1"
[ ${#tools[@]} -eq 0 ] || printf 'go will fetch, with all that they depend on: %s\n' "${tools[*]}"
[ ${#missing[@]} -gt 0 ] || exit 0

command -v apt-get >/dev/null || die "missing: ${missing[*]} (as Debian calls them), and there is no apt-get here: \
install them with this system's package manager"
root=(env)
if [ "$(id -u)" -ne 0 ]; then
	command -v sudo >/dev/null || die "missing: ${missing[*]}: install them as root, or install sudo"
	root=(sudo env)
fi

apt() {
	"$(dirname "${BASH_SOURCE[0]}")/step.sh" -q "apt-get $1" "${root[@]}" DEBIAN_FRONTEND=noninteractive \
		apt-get -q -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 "$@" </dev/null
}

printf 'installing, with all that they depend on: %s\n' "${missing[*]}"
apt update
apt install --yes --no-install-recommends "${missing[@]}"
