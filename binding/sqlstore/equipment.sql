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
