-- The tables in which `outbox migrate` records applied migrations, in yoyo's format, which earlier versions read.

CREATE TABLE IF NOT EXISTS _yoyo_migration (
    migration_hash varchar(64) PRIMARY KEY,
    migration_id   varchar(255),
    applied_at_utc timestamp
);
CREATE TABLE IF NOT EXISTS _yoyo_log (
    id             varchar(36) PRIMARY KEY,
    migration_hash varchar(64),
    migration_id   varchar(255),
    operation      varchar(10),
    username       varchar(255),
    hostname       varchar(255),
    comment        varchar(255),
    created_at_utc timestamp
);
CREATE TABLE IF NOT EXISTS _yoyo_version (
    version          integer PRIMARY KEY,
    installed_at_utc timestamp
);
