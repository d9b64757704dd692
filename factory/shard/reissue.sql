-- The injection packages of reissued keys.
CREATE TABLE reissue (
    manufacturer TEXT NOT NULL,
    lot          TEXT NOT NULL,
    file         TEXT NOT NULL, -- its name
    package      BLOB NOT NULL, -- its SHA-256, before it is on disk
    PRIMARY KEY (manufacturer, lot, file)
);
