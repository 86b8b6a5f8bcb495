-- the same check of queue names at a fifth of its cost
-- depends: 0001_users_and_outbox

-- Every update of a row pays for its checks. The repetition {1,50} made this one dearer than all others together.
-- What it lets through is the same, so the lock that this takes need not last until all rows are looked at.
ALTER TABLE outbox
    DROP CONSTRAINT outbox_queue_valid,
    ADD CONSTRAINT outbox_queue_valid CHECK (queue ~ '^[A-Za-z0-9_-]+$' AND pg_catalog.char_length(queue) <= 50) NOT VALID;
