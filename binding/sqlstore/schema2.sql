-- An attempt that an administrator has opened allows a bound IMSI another device.
ALTER TABLE attempts ADD COLUMN opened INTEGER NOT NULL DEFAULT 0;

-- A binding that was revoked stays, without its KME.
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
);
INSERT INTO bindings2 SELECT imsi, state, imei, manufacturer, lot, sealed, nw_sig, attempt_id, payload_sha256, established_at, activated_at, 0 FROM bindings;
DROP TABLE bindings;
ALTER TABLE bindings2 RENAME TO bindings;
CREATE INDEX bindings_by_imei ON bindings (imei, imsi);
