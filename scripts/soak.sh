#!/usr/bin/env bash
# Simulates a year in an hour on a store. make soak runs it. Its settings are STORE=sqlite or postgres,
# BINDINGS=10000000, DURATION=1h and SEED=n. It writes its results to var/soak/STORE.json, and as a table to STORE.md.
# It keeps the database, and the next run continues with it: in var/soak, and for PostgreSQL in
# /var/tmp/kmehsm-soak-postgres or KMEHSM_SOAK_POSTGRES, a folder that PostgreSQL's user may enter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export KMEHSM_SOAK_BINDINGS=${BINDINGS:-10000000} KMEHSM_SOAK_DURATION=${DURATION:-1h} KMEHSM_SOAK_KEEP=$PWD/var/soak
[ -z "${SEED:-}" ] || export KMEHSM_SOAK_SEED=$SEED
case ${STORE:-} in
sqlite) tests=SQLite ;;
postgres) tests=Postgres ;;
'') tests='(SQLite|Postgres)' ;;
*) echo 'STORE is sqlite or postgres; without it, both are tried' >&2 && exit 2 ;;
esac
umask 077
mkdir -p var/soak
go test -count=1 -timeout 0 -v -run "^TestSoak${tests}Vault\$" ./internal/proof
