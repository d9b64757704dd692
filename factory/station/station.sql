-- What the stations did. A device without a row was never handed out.
CREATE TABLE device (
    lot      TEXT    NOT NULL,
    position INTEGER NOT NULL,           -- in the lot
    issue    INTEGER NOT NULL,           -- which of its keys: 0 the first, then those of lot reissue
    again    INTEGER NOT NULL,           -- 1 if another issue of it has a row already
    state    TEXT    NOT NULL,
    station  TEXT    NOT NULL,           -- that has it, or had it last
    handed   INTEGER NOT NULL,           -- when, milliseconds since 1970
    reported INTEGER NOT NULL DEFAULT 0, -- when its state became what it is; 0 while it is out
    tries    INTEGER NOT NULL DEFAULT 1, -- how often it was handed out
    note     TEXT    NOT NULL DEFAULT '',
    PRIMARY KEY (lot, position, issue)
) WITHOUT ROWID;
CREATE UNIQUE INDEX holds ON device (station) WHERE state = 'out'; -- a station has one device at a time

-- Every step, for the plot of the last hour.
CREATE TABLE event (
    at       INTEGER NOT NULL,
    lot      TEXT    NOT NULL,
    position INTEGER NOT NULL,
    issue    INTEGER NOT NULL,
    station  TEXT    NOT NULL,
    state    TEXT    NOT NULL
);
CREATE INDEX event_at ON event (at);

-- Counted as it happens, so that a wall screen costs nothing: the devices that are in a state, and how often a station
-- brought one there.
CREATE TABLE now (
    lot   TEXT    NOT NULL,
    again INTEGER NOT NULL,
    state TEXT    NOT NULL,
    n     INTEGER NOT NULL,
    PRIMARY KEY (lot, again, state)
) WITHOUT ROWID;
CREATE TABLE work (
    station TEXT    NOT NULL,
    state   TEXT    NOT NULL,
    n       INTEGER NOT NULL,
    PRIMARY KEY (station, state)
) WITHOUT ROWID;

CREATE TRIGGER device_made AFTER INSERT ON device BEGIN
    INSERT INTO event VALUES (max(new.handed, new.reported), new.lot, new.position, new.issue, new.station, new.state);
    INSERT INTO now VALUES (new.lot, new.again, new.state, 1) ON CONFLICT DO UPDATE SET n = n + 1;
    INSERT INTO work VALUES (new.station, new.state, 1) ON CONFLICT DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER device_changed AFTER UPDATE OF state ON device BEGIN
    INSERT INTO event VALUES (max(new.handed, new.reported), new.lot, new.position, new.issue, new.station, new.state);
    UPDATE now SET n = n - 1 WHERE lot = old.lot AND again = old.again AND state = old.state;
    INSERT INTO now VALUES (new.lot, new.again, new.state, 1) ON CONFLICT DO UPDATE SET n = n + 1;
    INSERT INTO work VALUES (new.station, new.state, 1) ON CONFLICT DO UPDATE SET n = n + 1;
END;
