-- Times are milliseconds since 1970. Digits (IMSI, IMEI) are text: they may begin with zeros. On SQLite a table WITHOUT
-- ROWID is its primary key's index, which suits short rows: there are fewer trees, and with them fewer pages, in each
-- commit.
--
-- mac is a row's MAC: HMAC-SHA-256-128 over the table's name and the row's other columns, under a key that the HSM
-- derives. seq is that of the last entry of the ledger about the row, which has made it what it is: an older row
-- that was put back has another.

CREATE TABLE manufacturers (
  key_id      TEXT PRIMARY KEY,            -- RFC 7638 thumbprint of its signing key
  pem         TEXT NOT NULL,
  operator    TEXT NOT NULL,
  directory   TEXT NOT NULL,
  tacs        TEXT NOT NULL,               -- that its lots may have, with a space between; empty: any that is nobody's
  enrolled_at BIGINT NOT NULL,
  -- The last decision about it, whose: 1 if none of its lots is served any more.
  withdrawn       INTEGER NOT NULL,
  decided_by      TEXT NOT NULL,
  decided_because TEXT NOT NULL,
  decided_at      BIGINT NOT NULL,
  seq         BIGINT NOT NULL,
  mac         BLOB NOT NULL
);

CREATE TABLE lots (
  manufacturer TEXT NOT NULL REFERENCES manufacturers (key_id),
  lot          TEXT NOT NULL,
  manifest     TEXT NOT NULL,              -- the signed manifest, a compact JWS
  imported_at  BIGINT NOT NULL,
  -- As in manufacturers: 1 if the lot is not served any more.
  withdrawn       INTEGER NOT NULL,
  decided_by      TEXT NOT NULL,
  decided_because TEXT NOT NULL,
  decided_at      BIGINT NOT NULL,
  seq          BIGINT NOT NULL,
  mac          BLOB NOT NULL,
  PRIMARY KEY (manufacturer, lot)
);

-- Those that an administrator has opened, and those of origins within them. An attempt of an IMSI that is not bound has
-- no row: its id is a MAC.
CREATE TABLE attempts (
  imsi       TEXT NOT NULL,
  id         TEXT NOT NULL,
  origin     TEXT NOT NULL,                -- who may use it: an Origin-Host; empty for the only peer of a caller
  expires_at BIGINT NOT NULL,
  seq        BIGINT NOT NULL,
  mac        BLOB NOT NULL,
  PRIMARY KEY (imsi, id)
) WITHOUT ROWID;
CREATE INDEX attempts_by_expiry ON attempts (expires_at);

-- What left in clear is never accepted for a pre-processed vector: nothing is ever removed from here.
CREATE TABLE spent_rands (
  imsi TEXT NOT NULL,
  rand BLOB NOT NULL,
  mac  BLOB NOT NULL,
  PRIMARY KEY (imsi, rand)
) WITHOUT ROWID;

-- Everything that was decided, and by whom, in several chains: nothing is ever changed or removed here. mac is over the
-- entry and the mac of the one before it. A KME is accepted once per IMEI for ever. It also finds the bindings of a
-- device: a device has had as many KMEs as subscriptions, at least.
CREATE TABLE ledger (
  chain   INTEGER NOT NULL,                -- which one, is told by the subject
  seq     BIGINT NOT NULL,                 -- counts up from 1 in each chain
  at      BIGINT NOT NULL,
  event   TEXT NOT NULL,
  subject TEXT NOT NULL,                   -- an IMSI, or what else it is about
  imei    TEXT NOT NULL,                   -- of a KME that was accepted; else empty
  tag     BLOB,                            -- of that KME, its HMAC under the token's ledger key
  actor   BLOB NOT NULL,                   -- who did it
  detail  TEXT NOT NULL,
  mac     BLOB NOT NULL,
  PRIMARY KEY (chain, seq)
) WITHOUT ROWID;
CREATE UNIQUE INDEX ledger_by_kme ON ledger (imei, tag) WHERE tag IS NOT NULL;
CREATE INDEX ledger_by_subject ON ledger (subject, event, seq);

CREATE TABLE actors (
  actor BLOB PRIMARY KEY,                  -- the MAC of what follows
  json  TEXT NOT NULL
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
  seq            BIGINT NOT NULL,
  mac            BLOB NOT NULL,
  PRIMARY KEY (imsi, state)
);

-- The operator's own list of devices. An entry is about all IMEIs that begin with its prefix, but for those that a
-- longer one is about. One that was removed stays, without a status: the ledger would miss it.
CREATE TABLE equipment (
  prefix    TEXT PRIMARY KEY,
  status    TEXT NOT NULL,
  reason    TEXT NOT NULL,
  listed_at BIGINT NOT NULL,
  change    BIGINT NOT NULL,                -- counts the changes of the list
  seq       BIGINT NOT NULL,
  mac       BLOB NOT NULL
);
CREATE INDEX equipment_by_change ON equipment (change);

-- With which devices a subscription was seen: a device that was named, ASSERTED, or one that has shown its KME, PROVEN.
CREATE TABLE sightings (
  imsi     TEXT NOT NULL,
  imei     TEXT NOT NULL,
  evidence TEXT NOT NULL,
  first_at BIGINT NOT NULL,
  last_at  BIGINT NOT NULL,                 -- not always the last: see sightings.History
  mac      BLOB NOT NULL,
  PRIMARY KEY (imsi, imei, evidence)
) WITHOUT ROWID;
CREATE INDEX sightings_by_device ON sightings (imei);
CREATE INDEX sightings_by_time ON sightings (last_at);
