-- users, their e-mail verifications, and the outbox
-- depends:

CREATE TABLE users (
    username            text        PRIMARY KEY,
    hashed_password     text        NOT NULL,
    full_name           text        NOT NULL,
    email               text        NOT NULL,
    is_email_verified   boolean     NOT NULL DEFAULT false,
    password_changed_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
    created_at          timestamptz NOT NULL DEFAULT pg_catalog.now(),

    CONSTRAINT users_username_valid  CHECK (username ~ '^[a-z0-9_]{3,100}$'),
    CONSTRAINT users_full_name_valid CHECK (pg_catalog.char_length(full_name) BETWEEN 3 AND 100),
    CONSTRAINT users_email_valid     CHECK (pg_catalog.char_length(email) BETWEEN 3 AND 200)
);

-- One address, one user: Alice@example.com and alice@example.com reach the same person.
CREATE UNIQUE INDEX users_email_key ON users (pg_catalog.lower(email));

CREATE TABLE verify_emails (
    id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    outbox_id  bigint      NOT NULL,
    username   text        NOT NULL REFERENCES users ON DELETE CASCADE,
    email      text        NOT NULL,
    is_used    boolean     NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
    expired_at timestamptz NOT NULL,

    CONSTRAINT verify_emails_outbox_id_key UNIQUE (outbox_id)
);

COMMENT ON TABLE verify_emails IS
    'One row per verification mail. It holds no code: the code in the link is an HMAC of this row under SECRET_KEY.';
COMMENT ON COLUMN verify_emails.outbox_id IS
    'The outbox row that sends the mail, so that every attempt finds the same verification and sends the same link.';

CREATE INDEX verify_emails_username ON verify_emails (username);

CREATE TABLE outbox (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    task        text        NOT NULL,
    payload     jsonb       NOT NULL,
    queue       text        NOT NULL DEFAULT 'default',
    status      text        NOT NULL DEFAULT 'pending',
    run_at      timestamptz NOT NULL DEFAULT pg_catalog.now(),
    delivery    integer     NOT NULL DEFAULT 0,
    attempts    integer     NOT NULL DEFAULT 0,
    max_retries integer     NOT NULL DEFAULT 25,
    timeout     integer     NOT NULL DEFAULT 30,
    lease_until timestamptz,
    worker      text,
    unique_key  text,
    request_id  text,
    last_error  text,
    created_at  timestamptz NOT NULL DEFAULT pg_catalog.now(),
    enqueued_at timestamptz,
    started_at  timestamptz,
    done_at     timestamptz,

    CONSTRAINT outbox_task_valid        CHECK (pg_catalog.char_length(task) BETWEEN 1 AND 100),
    CONSTRAINT outbox_payload_object    CHECK (pg_catalog.jsonb_typeof(payload) = 'object'),
    CONSTRAINT outbox_queue_valid       CHECK (queue ~ '^[A-Za-z0-9_-]{1,50}$'),
    CONSTRAINT outbox_status_known      CHECK (status IN ('pending', 'enqueued', 'running', 'done', 'dead')),
    CONSTRAINT outbox_delivery_valid    CHECK (delivery >= 0),
    CONSTRAINT outbox_attempts_valid    CHECK (attempts >= 0),
    CONSTRAINT outbox_max_retries_valid CHECK (max_retries BETWEEN 0 AND 1000),
    CONSTRAINT outbox_timeout_valid     CHECK (timeout BETWEEN 1 AND 86400),
    CONSTRAINT outbox_unique_key_valid  CHECK (pg_catalog.char_length(unique_key) BETWEEN 1 AND 200),
    CONSTRAINT outbox_running_is_leased CHECK ((status = 'running') = (lease_until IS NOT NULL)),
    CONSTRAINT outbox_done_is_dated     CHECK ((status = 'done') = (done_at IS NOT NULL))
);

COMMENT ON TABLE outbox IS
    'Work that was committed together with the change it belongs to. Redis only ever holds ids of these rows.';
COMMENT ON COLUMN outbox.id          IS 'Names the row everywhere: in the RQ job id ({id}-{delivery}), in logs, on the command line.';
COMMENT ON COLUMN outbox.task        IS 'Which task: a name that the worker''s registry maps to a handler.';
COMMENT ON COLUMN outbox.payload     IS 'The task''s arguments, valid against its pydantic model when they were written.';
COMMENT ON COLUMN outbox.queue       IS 'The RQ queue that the relay hands the row to.';
COMMENT ON COLUMN outbox.status      IS 'pending (waits for the relay), enqueued (Redis has a job for it), running (a worker holds its lease), done, dead (waits for an operator).';
COMMENT ON COLUMN outbox.run_at      IS 'Not handled before this time, by Postgres'' clock; moved on by the backoff after a failure.';
COMMENT ON COLUMN outbox.delivery    IS 'The fence: one more for every hand-over to Redis. A job of an older delivery claims nothing.';
COMMENT ON COLUMN outbox.attempts    IS 'How many times a worker has claimed the row and begun.';
COMMENT ON COLUMN outbox.max_retries IS 'How many attempts may follow the first; after the last failure the row is dead.';
COMMENT ON COLUMN outbox.timeout     IS 'Seconds that one attempt may take.';
COMMENT ON COLUMN outbox.lease_until IS 'While running: when the row is taken from its worker unless the worker renews it.';
COMMENT ON COLUMN outbox.worker      IS 'The RQ name of the worker that claimed the row last.';
COMMENT ON COLUMN outbox.unique_key  IS 'At most one row that is not done may carry the same key; null for rows that may repeat.';
COMMENT ON COLUMN outbox.request_id  IS 'The HTTP request that wrote the row, so that its logs and the row''s can be read together.';
COMMENT ON COLUMN outbox.last_error  IS 'Why the last attempt failed, in a sentence; kept when a later attempt succeeds.';
COMMENT ON COLUMN outbox.created_at  IS 'When the row was written.';
COMMENT ON COLUMN outbox.enqueued_at IS 'When it was last handed over to Redis.';
COMMENT ON COLUMN outbox.started_at  IS 'When it was last claimed.';
COMMENT ON COLUMN outbox.done_at     IS 'When it was done; retention counts from here.';

-- One partial index per status that a statement looks for. Done rows are only in their own index, so that
-- no statement of the relay or the worker gets slower with history.
CREATE INDEX outbox_pending  ON outbox (queue, run_at, id)  WHERE status = 'pending';
CREATE INDEX outbox_enqueued ON outbox (queue, enqueued_at) WHERE status = 'enqueued';
CREATE INDEX outbox_running  ON outbox (lease_until)        WHERE status = 'running';
CREATE INDEX outbox_done     ON outbox (done_at)            WHERE status = 'done';
CREATE INDEX outbox_dead     ON outbox (id)                 WHERE status = 'dead';
CREATE UNIQUE INDEX outbox_unique_key ON outbox (unique_key) WHERE status <> 'done' AND unique_key IS NOT NULL;
