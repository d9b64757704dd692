-- What the line knows of each shard's way. A shard without a row has no package of the line's.
CREATE TABLE shard (
    manufacturer TEXT    NOT NULL,
    lot          TEXT    NOT NULL,
    number       INTEGER NOT NULL,
    state        INTEGER NOT NULL, -- 0 planned, 1 generated, 2 published, 3 acknowledged
    package      BLOB,             -- SHA-256 of its injection package, before that is on disk
    jws          BLOB,             -- what is published of it, signed, until it is acknowledged
    PRIMARY KEY (manufacturer, lot, number)
);
