-- a length limit for request ids, which logs repeat
-- depends: 0005_unhandled_rows

-- worker and last_error get no limit: only our processes write them, a name of 32 characters and a line of 500, and a
-- refusal would prevent an outcome from being written.
-- Not valid yet, so that the lock need not last until all rows are validated; new rows are checked.
ALTER TABLE outbox
    DROP CONSTRAINT IF EXISTS outbox_request_id_valid,
    ADD CONSTRAINT outbox_request_id_valid CHECK (pg_catalog.char_length(request_id) <= 200) NOT VALID;
