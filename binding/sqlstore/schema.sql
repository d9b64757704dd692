-- Times are milliseconds since 1970. Digits (IMSI, IMEI) are text: they may begin with zeros. On SQLite a table WITHOUT
-- ROWID is its primary key's index, which suits short rows: there are fewer trees, and with them fewer pages, in each
-- commit.

CREATE TABLE manufacturers (
  key_id      TEXT PRIMARY KEY,            -- RFC 7638 thumbprint of its signing key
  pem         TEXT NOT NULL,
  operator    TEXT NOT NULL,
  directory   TEXT NOT NULL,
  enrolled_at BIGINT NOT NULL,
  -- The last decision about it, whose: 1 if none of its lots is served any more.
  withdrawn       INTEGER NOT NULL DEFAULT 0,
  decided_by      TEXT NOT NULL DEFAULT '',
  decided_because TEXT NOT NULL DEFAULT '',
  decided_at      BIGINT NOT NULL DEFAULT 0
);

CREATE TABLE lots (
  manufacturer TEXT NOT NULL REFERENCES manufacturers (key_id),
  lot          TEXT NOT NULL,
  manifest     TEXT NOT NULL,              -- the signed manifest, a compact JWS
  imported_at  BIGINT NOT NULL,
  -- As in manufacturers: 1 if the lot is not served any more.
  withdrawn       INTEGER NOT NULL DEFAULT 0,
  decided_by      TEXT NOT NULL DEFAULT '',
  decided_because TEXT NOT NULL DEFAULT '',
  decided_at      BIGINT NOT NULL DEFAULT 0,
  PRIMARY KEY (manufacturer, lot)
);

CREATE TABLE attempts (
  imsi       TEXT NOT NULL,
  id         TEXT NOT NULL,
  origin     TEXT NOT NULL,                -- who may use it: an Origin-Host; empty for the only peer of a caller
  expires_at BIGINT NOT NULL,
  opened     INTEGER NOT NULL,             -- 1 if by an administrator: it allows a bound IMSI another device
  PRIMARY KEY (imsi, id)
) WITHOUT ROWID;
CREATE INDEX attempts_by_expiry ON attempts (expires_at);

-- What left in clear is never accepted for a pre-processed vector: nothing is ever removed from here.
CREATE TABLE spent_rands (
  imsi TEXT NOT NULL,
  rand BLOB NOT NULL,
  PRIMARY KEY (imsi, rand)
) WITHOUT ROWID;

-- A KME is accepted once per IMEI for ever: nothing is ever removed from here. It also finds the bindings of a device:
-- a device has had as many KMEs as subscriptions, at least.
CREATE TABLE ledger (
  imei TEXT NOT NULL,
  tag  BLOB NOT NULL,                      -- HMAC(KME) under the token's ledger key
  imsi TEXT NOT NULL,                      -- that the KME was bound to
  PRIMARY KEY (imei, tag)
) WITHOUT ROWID;

-- For IN with more than two constants, SQLite makes a table each time.
CREATE TABLE bindings (
  imsi           TEXT NOT NULL,
  state          TEXT NOT NULL CHECK (state = 'PENDING' OR state = 'ACTIVE' OR state = 'REVOKED'),
  imei           TEXT NOT NULL,
  manufacturer   TEXT NOT NULL,
  lot            TEXT NOT NULL,
  device_key     INTEGER NOT NULL,         -- how many keys the device had been issued in the place of its first
  sealed         BLOB NOT NULL,            -- the KME under the token's storage key, AES key wrap; empty when revoked
  nw_sig         BLOB NOT NULL,
  attempt_id     TEXT NOT NULL,
  payload_sha256 BLOB NOT NULL,
  established_at BIGINT NOT NULL,
  activated_at   BIGINT NOT NULL,          -- 0 if it was never active
  revoked_at     BIGINT NOT NULL,          -- 0 if it was not
  origin         TEXT NOT NULL,            -- from where it was established
  expires_at     BIGINT NOT NULL,          -- of a pending one; else 0
  -- sent, of a pending one: origins that were sent vectors under it, a line each; else empty
  sent           TEXT NOT NULL,
  PRIMARY KEY (imsi, state)
);
