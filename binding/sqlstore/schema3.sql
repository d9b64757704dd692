-- Fewer trees, and with them fewer pages, in each commit. On SQLite a table WITHOUT ROWID is its primary key's index.

CREATE TABLE attempts2 (
  imsi       TEXT NOT NULL,
  id         TEXT NOT NULL,
  expires_at BIGINT NOT NULL,
  opened     INTEGER NOT NULL,             -- 1 if by an administrator
  PRIMARY KEY (imsi, id)
) WITHOUT ROWID;
INSERT INTO attempts2 SELECT imsi, id, expires_at, opened FROM attempts;
DROP TABLE attempts;
ALTER TABLE attempts2 RENAME TO attempts;
CREATE INDEX attempts_by_expiry ON attempts (expires_at);

CREATE TABLE ledger2 (
  imei TEXT NOT NULL,
  tag  BLOB NOT NULL,                      -- HMAC(KME) under the token's ledger key
  PRIMARY KEY (imei, tag)
) WITHOUT ROWID;
INSERT INTO ledger2 SELECT imei, tag FROM ledger;
DROP TABLE ledger;
ALTER TABLE ledger2 RENAME TO ledger;

CREATE TABLE bindings2 (
  imsi           TEXT NOT NULL,
  state          TEXT NOT NULL CHECK (state IN ('PENDING', 'ACTIVE', 'REVOKED')),
  imei           TEXT NOT NULL,
  manufacturer   TEXT NOT NULL,
  lot            TEXT NOT NULL,
  sealed         BLOB NOT NULL,            -- the KME under the token's storage key, AES key wrap; empty when revoked
  nw_sig         BLOB NOT NULL,
  attempt_id     TEXT NOT NULL,
  payload_sha256 BLOB NOT NULL,
  established_at BIGINT NOT NULL,
  activated_at   BIGINT NOT NULL,          -- 0 if it was never active
  revoked_at     BIGINT NOT NULL,          -- 0 if it was not
  PRIMARY KEY (imsi, state)
) WITHOUT ROWID;
INSERT INTO bindings2 SELECT imsi, state, imei, manufacturer, lot, sealed, nw_sig, attempt_id, payload_sha256, established_at, activated_at, revoked_at FROM bindings;
DROP TABLE bindings;
ALTER TABLE bindings2 RENAME TO bindings;
CREATE INDEX bindings_by_imei ON bindings (imei, imsi);
