-- the time since which no worker could handle a row
-- depends: 0004_detached_verifications

-- No default, so that the table is not rewritten.
ALTER TABLE outbox ADD COLUMN IF NOT EXISTS unhandled_since timestamptz;

COMMENT ON COLUMN outbox.unhandled_since IS
    'Since when workers give the row back because its task is unknown to them or its payload does not fit its model; null once one has handled it.';
