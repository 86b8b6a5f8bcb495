-- a limit for the ids of requests, which logs repeat
-- depends: 0005_unhandled_rows

-- worker and last_error stay without a limit: our processes alone write them, a name of 32 characters and a line of 500,
-- and a refusal would keep an outcome from being written.
-- Not valid yet, so that the lock that this takes need not last until all rows are looked at; no new row is longer.
ALTER TABLE outbox
    DROP CONSTRAINT IF EXISTS outbox_request_id_valid,
    ADD CONSTRAINT outbox_request_id_valid CHECK (pg_catalog.char_length(request_id) <= 200) NOT VALID;
