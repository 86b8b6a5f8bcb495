-- vacuum of the outbox after a number of dead rows, not after a share of its history
-- depends: 0002_cheaper_queue_check

-- In a transaction of its own, because it does not block readers and writers.
ALTER TABLE outbox VALIDATE CONSTRAINT outbox_queue_valid;

-- A row leaves three dead versions behind, and until they are vacuumed, every search for pending rows passes their index
-- entries. Postgres' default, a share of the table, is reached less often the longer the history is kept.
ALTER TABLE outbox SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 5000);
