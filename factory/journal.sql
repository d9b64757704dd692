-- What the line knows of each shard's way. A shard without a row was never begun.
CREATE TABLE shard (
    manufacturer TEXT    NOT NULL,
    lot          TEXT    NOT NULL,
    number       INTEGER NOT NULL,
    state        INTEGER NOT NULL, -- 0 planned, 1 generated, 2 published, 3 acknowledged
    keys         BLOB,             -- SHA-256 of what is published of it, from generated on
    jws          BLOB,             -- it, signed, until it is acknowledged
    PRIMARY KEY (manufacturer, lot, number)
);
