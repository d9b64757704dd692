-- Fewer pages in each commit.

-- The ledger also says to whom: it finds the bindings of a device, without an index of theirs. A device has had as many KMEs as subscriptions, at
-- least; of those before now it does not matter which names which.
CREATE TABLE ledger3 (
  imei TEXT NOT NULL,
  tag  BLOB NOT NULL,                      -- HMAC(KME) under the token's ledger key
  imsi TEXT NOT NULL,                      -- that the KME was bound to; empty if not known
  PRIMARY KEY (imei, tag)
) WITHOUT ROWID;
INSERT INTO ledger3 SELECT l.imei, l.tag, COALESCE(b.imsi, '')
  FROM (SELECT imei, tag, ROW_NUMBER() OVER (PARTITION BY imei ORDER BY tag) AS n FROM ledger) AS l
  LEFT JOIN (SELECT imei, imsi, ROW_NUMBER() OVER (PARTITION BY imei ORDER BY imsi) AS n FROM (SELECT DISTINCT imei, imsi FROM bindings) AS d) AS b
  ON b.imei = l.imei AND b.n = l.n;
DROP TABLE ledger;
ALTER TABLE ledger3 RENAME TO ledger;

-- For IN with more than two constants, SQLite makes a table each time. And a table WITHOUT ROWID, which is its primary key's index, is for short rows.
CREATE TABLE bindings3 (
  imsi           TEXT NOT NULL,
  state          TEXT NOT NULL CHECK (state = 'PENDING' OR state = 'ACTIVE' OR state = 'REVOKED'),
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
);
INSERT INTO bindings3 SELECT * FROM bindings;
DROP TABLE bindings;
ALTER TABLE bindings3 RENAME TO bindings;
