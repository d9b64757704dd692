-- Fewer trees, and with them fewer pages, in each commit. On SQLite a table WITHOUT ROWID is its primary key's index, which is for short rows:
-- those of bindings are too long for it.

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
