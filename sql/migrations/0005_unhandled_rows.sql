-- since when a row has met no worker that can handle it
-- depends: 0004_detached_verifications

-- Without a default, so that the table is not rewritten.
ALTER TABLE outbox ADD COLUMN IF NOT EXISTS unhandled_since timestamptz;

COMMENT ON COLUMN outbox.unhandled_since IS
    'Since when workers give the row back because its task is unknown to them or its payload does not fit its model; null once one has handled it.';
