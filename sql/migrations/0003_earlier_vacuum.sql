-- vacuum of the outbox by what it can clean up, not by how long its history is
-- depends: 0002_cheaper_queue_check

-- In a transaction of its own, because it lets everybody read and write meanwhile.
ALTER TABLE outbox VALIDATE CONSTRAINT outbox_queue_valid;

-- A row leaves three dead versions behind, and until they are cleaned up, every look for pending rows goes past their
-- entries in the index. A share of the table, Postgres' default, is rarer the longer the history is kept.
ALTER TABLE outbox SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 5000);
