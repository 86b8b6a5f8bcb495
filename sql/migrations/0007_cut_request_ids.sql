-- the ids of requests in earlier rows, cut to the limit
-- depends: 0006_limited_request_ids

-- An update of a longer one is refused from the migration before on, and it can be neither handed over nor marked. In a
-- transaction of its own, because it lets everybody read and write meanwhile.
UPDATE outbox SET request_id = pg_catalog.left(request_id, 200) WHERE pg_catalog.char_length(request_id) > 200;
ALTER TABLE outbox VALIDATE CONSTRAINT outbox_request_id_valid;
