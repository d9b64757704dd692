-- Times are milliseconds since 1970. Digits (IMSI, IMEI) are text: they may begin with zeros.

CREATE TABLE manufacturers (
  key_id      TEXT PRIMARY KEY,            -- RFC 7638 thumbprint of its signing key
  pem         TEXT NOT NULL,
  operator    TEXT NOT NULL,
  directory   TEXT NOT NULL,
  enrolled_at BIGINT NOT NULL
);

CREATE TABLE lots (
  manufacturer TEXT NOT NULL REFERENCES manufacturers (key_id),
  lot          TEXT NOT NULL,
  manifest     TEXT NOT NULL,              -- the signed manifest, a compact JWS
  imported_at  BIGINT NOT NULL,
  PRIMARY KEY (manufacturer, lot)
);

CREATE TABLE attempts (
  id         TEXT PRIMARY KEY,
  imsi       TEXT NOT NULL,
  expires_at BIGINT NOT NULL
);
CREATE INDEX attempts_by_imsi ON attempts (imsi, expires_at);
CREATE INDEX attempts_by_expiry ON attempts (expires_at);

-- A KME is accepted once per IMEI for ever: nothing is ever removed from here.
CREATE TABLE ledger (
  imei TEXT NOT NULL,
  tag  BLOB NOT NULL,                      -- HMAC(KME) under the token's ledger key
  PRIMARY KEY (imei, tag)
);

CREATE TABLE bindings (
  imsi           TEXT NOT NULL,
  state          TEXT NOT NULL CHECK (state IN ('PENDING', 'ACTIVE')),
  imei           TEXT NOT NULL,
  manufacturer   TEXT NOT NULL,
  lot            TEXT NOT NULL,
  sealed         BLOB NOT NULL,            -- the KME under the token's storage key, AES key wrap
  nw_sig         BLOB NOT NULL,
  attempt_id     TEXT NOT NULL,
  payload_sha256 BLOB NOT NULL,
  established_at BIGINT NOT NULL,
  activated_at   BIGINT NOT NULL,          -- 0 while pending
  PRIMARY KEY (imsi, state)
);
