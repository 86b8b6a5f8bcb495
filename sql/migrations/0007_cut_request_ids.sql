-- request ids of earlier rows, cut to the limit
-- depends: 0006_limited_request_ids

-- Since the previous migration, an update of a row with a longer id is refused, so it can be neither handed over nor
-- completed. In a transaction of its own, because it does not block readers and writers.
UPDATE outbox SET request_id = pg_catalog.left(request_id, 200) WHERE pg_catalog.char_length(request_id) > 200;
ALTER TABLE outbox VALIDATE CONSTRAINT outbox_request_id_valid;
