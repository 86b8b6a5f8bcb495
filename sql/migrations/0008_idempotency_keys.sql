-- answers that are repeated for a request with the same Idempotency-Key
-- depends: 0007_cut_request_ids

CREATE TABLE IF NOT EXISTS idempotency_keys (
    key         text        PRIMARY KEY,
    fingerprint bytea       NOT NULL,
    status_code integer,
    body        text,
    created_at  timestamptz NOT NULL DEFAULT pg_catalog.now(),

    CONSTRAINT idempotency_keys_key_valid CHECK (pg_catalog.char_length(key) BETWEEN 1 AND 255)
);

COMMENT ON TABLE idempotency_keys IS
    'The answers to requests with an Idempotency-Key, each written in the transaction of what it reports.';
COMMENT ON COLUMN idempotency_keys.fingerprint IS
    'An HMAC of the request under SECRET_KEY: another request with the same key is refused.';
COMMENT ON COLUMN idempotency_keys.status_code IS 'The status of the answer; null only inside its transaction.';
COMMENT ON COLUMN idempotency_keys.body IS 'The body of the answer, byte for byte; null only inside its transaction.';
COMMENT ON COLUMN idempotency_keys.created_at IS 'When the answer was written; retention counts from here.';

CREATE INDEX IF NOT EXISTS idempotency_keys_created_at ON idempotency_keys (created_at);
