-- Every statement that runs in production. One block per statement: its name, a line on its purpose, its text.
-- Parameters are psycopg's %(name)s; intervals are passed in seconds.
-- Functions are named with their schema, and operators get exactly the types that they are defined for. Otherwise another
-- role that may create functions in a schema of our search_path could define one that matches better, and it would run
-- with our rights. Type names cannot be shadowed, because pg_catalog is searched first. Neither can `unnest` of several
-- arrays, which the parser turns into calls of pg_catalog.unnest; with its schema it would be another function.


-- name: add_row
-- Adds an outbox row in the caller's transaction; returns no row if its unique key is taken.
INSERT INTO outbox (task, payload, queue, run_at, max_retries, timeout, unique_key, request_id)
VALUES (%(task)s, %(payload)s, %(queue)s, pg_catalog.now() + %(delay)s::float8 * interval '1 s',
        %(max_retries)s, %(timeout)s, %(unique_key)s, %(request_id)s)
ON CONFLICT (unique_key) WHERE status <> 'done' AND unique_key IS NOT NULL DO NOTHING
RETURNING id;


-- name: notify_relays
-- Sends the relays a hint, which may get lost, that there are rows to hand over. It is sent after the commit: a NOTIFY in
-- the writing transaction would make all writers commit one after the other.
SELECT pg_catalog.pg_notify('outbox', '');


-- name: listen
-- Subscribes a relay's connection to the hints.
LISTEN outbox;


-- name: pin_session
-- Sets the settings that our statements rely on, over those of the database, the role and the environment. Handlers'
-- sessions do not get them, because their statements are not ours. Settings that this Postgres lacks are left out.
-- If a client vanishes in a transaction, its locks must not stay until TCP notices, and others must not wait for them
-- without limit. No other limit may end a session of ours; statement_timeout is longer than we wait for an answer.
-- A claim must see what the transaction that it waited for has committed.
-- Times are read and shown in one format; a float has all its digits, and a null in an array is not text.
-- A cached plan, made for a table of a few pages, scans all of it for each id after a bulk insert until the next ANALYZE:
-- a batch of outcomes took 7 s. Compiling a plan takes longer than any of our statements.
-- A 201, a claim and an outcome must survive a crash of Postgres; whether a commit waits for replicas is not changed.
SELECT pg_catalog.set_config(name, value, false)
FROM (VALUES ('idle_in_transaction_session_timeout', '30s'),
             ('lock_timeout', '10s'),
             ('statement_timeout', '30s'),
             ('transaction_timeout', '0'),
             ('idle_session_timeout', '0'),
             ('default_transaction_isolation', 'read committed'),
             ('DateStyle', 'ISO'),
             ('TimeZone', 'UTC'),
             ('extra_float_digits', '1'),
             ('array_nulls', 'on'),
             ('plan_cache_mode', 'force_custom_plan'),
             ('jit', 'off'),
             ('exit_on_error', 'off'),
             ('synchronous_commit', pg_catalog.replace(pg_catalog.current_setting('synchronous_commit'), 'off', 'local'))
     ) AS wanted (name, value)
WHERE pg_catalog.current_setting(name, true) IS NOT NULL;


-- name: limit_handler_session
-- Limits a handler's session in a transaction: the first two settings of pin_session.
SELECT pg_catalog.set_config('idle_in_transaction_session_timeout', '30s', false),
       pg_catalog.set_config('lock_timeout', '10s', false);


-- name: is_read_only
-- Whether a session is read-only: on a standby, or because an operator has set default_transaction_read_only.
SELECT pg_catalog.current_setting('transaction_read_only')::boolean AS is_read_only;


-- name: limit_session_lock_wait
-- Shortens the wait for a lock in a session that claims or completes, because the whole worker waits with it. It is
-- not shorter, because a claim waits for a relay that is about to commit.
SELECT pg_catalog.set_config('lock_timeout', '1s', false);


-- name: backend_pid
-- The server's process id of this session.
SELECT pg_catalog.pg_backend_pid() AS session;


-- name: installation_id
-- Identifies this installation, to detect two that use the same Redis database: the server's system identifier, which its
-- standbys share and a dump restored elsewhere does not, the database, and the table, as each schema may have its own.
SELECT system_identifier::text || '/' || pg_catalog.current_database()::text || '/' || 'outbox'::regclass::oid::text AS id
FROM pg_catalog.pg_control_system();


-- name: missing_settings
-- Statements that give our role the settings that it lacks: behind a pooler no session is ours, so they must be the
-- role's. Settings that our transactions can do without there, such as the format of times, are not listed.
SELECT 'ALTER ROLE ' || pg_catalog.quote_ident(session_user) || ' SET ' || name || ' = ' || pg_catalog.quote_literal(value)
           AS statement
FROM (VALUES ('idle_in_transaction_session_timeout', '30s', '[1-9]'),
             ('lock_timeout', '10s', '[1-9]'),
             ('transaction_timeout', '0', '^0$'),
             ('default_transaction_isolation', 'read committed', '^read'),
             ('extra_float_digits', '1', '^[0-9]'),
             ('array_nulls', 'on', '^on$'),
             ('synchronous_commit', 'on', '^(on|local|remote_.*)$')
     ) AS wanted (name, value, good)
WHERE pg_catalog.current_setting(name, true) !~ good;


-- name: unlimit_transaction
-- Lifts all time limits, which the role may have, for a transaction that waits for another migration and then migrates.
-- transaction_timeout is new in Postgres 17.
SELECT pg_catalog.set_config(name, '0', true)
FROM (VALUES ('idle_in_transaction_session_timeout'), ('lock_timeout'), ('statement_timeout'), ('transaction_timeout'))
         AS limits (name)
WHERE pg_catalog.current_setting(name, true) IS NOT NULL;


-- name: limit_migration
-- Limits how long a migration waits for a lock: later sessions wait behind it, even to add a row.
SELECT pg_catalog.set_config('lock_timeout', %(lock_timeout)s::float8::text || 's', true);


-- name: applied_migrations
-- The migrations that `outbox migrate` has applied to this database.
SELECT migration_id FROM _yoyo_migration;


-- name: first_migration
-- Whether the tables of the first migration exist, each recognized by a constraint that hardly any other table has. The
-- columns of information_schema have types of their own, which Postgres' operators are not defined for.
SELECT pg_catalog.count(*) = 3 AS is_applied
FROM information_schema.table_constraints
WHERE table_schema::name = pg_catalog.current_schema()
  AND (table_name::name, constraint_name::name) IN (('users', 'users_username_valid'),
                                                    ('verify_emails', 'verify_emails_outbox_id_key'),
                                                    ('outbox', 'outbox_running_is_leased'));


-- name: record_migration
-- Records a migration in its own transaction, under the hash by which earlier versions find it.
INSERT INTO _yoyo_migration (migration_hash, migration_id, applied_at_utc)
VALUES (pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(%(migration)s, 'UTF8')), 'hex'), %(migration)s,
        pg_catalog.now() AT TIME ZONE 'UTC');


-- name: right_to_create
-- Whether our role may create tables in the current schema, and the statement that grants it. Without a schema it may not.
SELECT current_user AS role, coalesce(pg_catalog.has_schema_privilege(pg_catalog.current_schema(), 'CREATE'), false) AS has,
       'GRANT CREATE ON SCHEMA ' || pg_catalog.quote_ident(pg_catalog.current_schema()) || ' TO '
           || pg_catalog.quote_ident(current_user) AS statement;


-- name: foreign_tables
-- Relations that our statements would find under our tables' names but that an untrusted role owns: a role that may create
-- in our schema can plant a table there before the first migration, and its triggers would run with our rights. A
-- superuser is a member of every role, so membership proves nothing there.
-- users_pkey is the constraint by which the service recognizes a taken username: if the name is in use, Postgres chooses
-- another. In later schemas of search_path such a table may be another application's: if we may create in the first one,
-- our tables are there.
SELECT found.relname::text AS name, owner.rolname::text AS owner
FROM (VALUES ('users'), ('verify_emails'), ('outbox'), ('_yoyo_migration'), ('_yoyo_log'), ('_yoyo_version'),
             ('users_pkey'), ('idempotency_keys')) AS ours (name)
JOIN pg_catalog.pg_class AS found ON found.oid = pg_catalog.to_regclass(ours.name)::oid
JOIN pg_catalog.pg_namespace AS schema ON schema.oid = found.relnamespace
JOIN pg_catalog.pg_database AS database ON database.datname = pg_catalog.current_database()
JOIN pg_catalog.pg_roles AS owner ON owner.oid = found.relowner
JOIN pg_catalog.pg_roles AS own ON own.rolname = current_user
WHERE (schema.nspname = pg_catalog.current_schema()
       OR NOT pg_catalog.has_schema_privilege(pg_catalog.current_schema(), 'CREATE'))
  AND NOT owner.rolsuper
  AND owner.oid <> own.oid AND owner.oid <> schema.nspowner AND owner.oid <> database.datdba
  AND (own.rolsuper OR NOT pg_catalog.pg_has_role(own.oid, owner.oid, 'MEMBER'));


-- name: foreign_schema
-- The schema that "$user" in our search_path leads to, if an untrusted role owns it: a role that may create schemas
-- in this database can create one with the name of our role, and tables with our names in it.
SELECT schema.nspname::text AS name, owner.rolname::text AS owner,
       'ALTER ROLE ' || pg_catalog.quote_ident(current_user) || ' IN DATABASE '
           || pg_catalog.quote_ident(pg_catalog.current_database()) || ' SET search_path = public' AS statement
FROM pg_catalog.pg_namespace AS schema
JOIN pg_catalog.pg_database AS database ON database.datname = pg_catalog.current_database()
JOIN pg_catalog.pg_roles AS owner ON owner.oid = schema.nspowner
JOIN pg_catalog.pg_roles AS own ON own.rolname = current_user
WHERE schema.nspname = own.rolname AND schema.nspname = ANY (pg_catalog.current_schemas(false))
  AND pg_catalog.strpos(pg_catalog.current_setting('search_path'), '$user') > 0
  AND NOT owner.rolsuper
  AND owner.oid <> own.oid AND owner.oid <> database.datdba
  AND (own.rolsuper OR NOT pg_catalog.pg_has_role(own.oid, owner.oid, 'MEMBER'));


-- name: record_version
-- Records for yoyo that its tables have its second version.
INSERT INTO _yoyo_version
SELECT 2, pg_catalog.now() AT TIME ZONE 'UTC' WHERE NOT EXISTS (SELECT FROM _yoyo_version);


-- name: lock_migrations
-- Lets one `outbox migrate` run at a time; the end of the transaction releases the lock. Only a role that may write to the
-- table can take a lock that blocks this one. Readers, such as the processes, are not blocked.
LOCK TABLE _yoyo_migration IN SHARE UPDATE EXCLUSIVE MODE;


-- name: add_user
-- Creates a user; a taken username or email is a unique violation.
INSERT INTO users (username, hashed_password, full_name, email)
VALUES (%(username)s, %(hashed_password)s, %(full_name)s, %(email)s)
RETURNING username, full_name, email, is_email_verified, password_changed_at, created_at;


-- name: limit_key_wait
-- Limits how long a transaction waits for another one that has written the same idempotency key.
SELECT pg_catalog.set_config('lock_timeout', '5s', true);


-- name: add_user_once
-- Creates a user as add_user does, unless the idempotency key is taken; then it returns no row. The key is written first:
-- of two requests with the same key, the second waits for the transaction of the first and then finds the key, before it
-- could find the username taken.
WITH written AS (
    INSERT INTO idempotency_keys (key, fingerprint)
    VALUES (%(key)s, %(fingerprint)s)
    ON CONFLICT (key) DO NOTHING
    RETURNING key
)
INSERT INTO users (username, hashed_password, full_name, email)
SELECT %(username)s::text, %(hashed_password)s::text, %(full_name)s::text, %(email)s::text
FROM written
RETURNING username, full_name, email, is_email_verified, password_changed_at, created_at;


-- name: store_answer
-- Stores the answer under the key that this transaction has written.
UPDATE idempotency_keys SET status_code = %(status_code)s, body = %(body)s WHERE key = %(key)s;


-- name: find_answer
-- Finds the answer that is stored under a key.
SELECT fingerprint, status_code, body FROM idempotency_keys WHERE key = %(key)s;


-- name: delete_old_answers
-- Deletes a batch of stored answers whose retention is over; returns one row for each.
DELETE FROM idempotency_keys
WHERE key = ANY (ARRAY(
    SELECT key
    FROM idempotency_keys
    WHERE created_at < pg_catalog.now() - %(retention)s::float8 * interval '1 s'
    ORDER BY created_at
    LIMIT %(batch)s
    FOR UPDATE SKIP LOCKED
))
RETURNING key;


-- name: window_room
-- How many more rows of a queue fit into its window.
SELECT greatest(0, %(window)s - pg_catalog.count(*)) AS rows
FROM outbox WHERE status = 'enqueued' AND queue = %(queue)s;


-- name: publish
-- Marks due (or soon due) rows of one queue enqueued, as far as its window has room.
-- Rows that are not yet due get at most about half of the window, so that they do not keep due rows waiting.
-- The transaction commits only after Redis has the jobs. Concurrent relays skip each other's rows.
-- It returns the part of a payload that is logged, and of a large one only its size: to cut it, Postgres would read and
-- print all of it. A payload stored in few bytes may be longer when printed, but its length is bounded.
-- Counting is slow if Redis holds many rows, so the caller may pass a room that it counted shortly before.
-- The ids go into an array because a join would scan the table if the backlog is long. `scheduled` compares with the
-- clock, because the time of a row that was added after this transaction began is later than its now().
WITH room AS (
    SELECT coalesce(
        %(room)s::bigint,
        greatest(0, %(window)s - (SELECT pg_catalog.count(*) FROM outbox WHERE status = 'enqueued' AND queue = %(queue)s))
    ) AS rows
), claimed AS (
    SELECT id
    FROM outbox
    WHERE status = 'pending' AND queue = %(queue)s
      AND id <> ALL (%(left_out)s::bigint[])
      AND run_at <= pg_catalog.now() + (SELECT CASE WHEN rows * 2 > %(window)s THEN 1::float8 ELSE 0::float8 END FROM room)
                            * %(horizon)s::float8 * interval '1 s'
    ORDER BY run_at, id
    LIMIT (SELECT least(%(batch)s, rows) FROM room)
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE outbox
SET status = 'enqueued', delivery = delivery + 1, enqueued_at = pg_catalog.now()
WHERE id = ANY (ARRAY(SELECT id FROM claimed))
RETURNING id, delivery, task, queue, max_retries, timeout, request_id,
          CASE
              WHEN %(payload_limit)s::integer = 0 THEN ''
              WHEN pg_catalog.pg_column_size(payload) <= %(payload_limit)s::integer
                  THEN pg_catalog.left(payload::text, %(payload_limit)s::integer)
              ELSE '(' || pg_catalog.pg_column_size(payload)::text || ' bytes)'
          END AS payload,
          run_at > pg_catalog.clock_timestamp() AS scheduled, extract(epoch FROM run_at)::float8 AS run_at;


-- name: first_pending
-- Locks and returns the row that a batch of one takes, so that it can be left out if it is refused.
SELECT id
FROM outbox
WHERE status = 'pending' AND queue = %(queue)s
  AND id <> ALL (%(left_out)s::bigint[])
  AND run_at <= pg_catalog.now() + %(horizon)s::float8 * interval '1 s'
ORDER BY run_at, id
LIMIT 1
FOR NO KEY UPDATE SKIP LOCKED;


-- name: find_work
-- The work that there is for a relay, so that an idle relay runs a single statement: queues with rows to hand over, whether
-- Redis should hold any job, whether a job is unclaimed after the grace, and whether a lease has passed. It counts nothing
-- and stops at the first row of each. Also Postgres' time, which all processes use.
-- A time further ahead than any process writes was written before the server's clock was set back.
SELECT extract(epoch FROM pg_catalog.now())::float8 AS now,
       ARRAY(
           SELECT name
           FROM pg_catalog.unnest(%(queues)s::text[]) AS name,
                LATERAL (SELECT FROM outbox
                         WHERE status = 'pending' AND queue = name
                           AND run_at <= pg_catalog.now() + %(horizon)s::float8 * interval '1 s'
                         ORDER BY run_at
                         LIMIT 1) AS row
       ) AS pending,
       EXISTS (SELECT FROM outbox WHERE status = 'enqueued') AS enqueued,
       EXISTS (SELECT FROM outbox
               WHERE status = 'enqueued'
                 AND (enqueued_at < pg_catalog.now() - %(grace)s::float8 * interval '1 s'
                      OR enqueued_at > pg_catalog.now() + %(clock_error)s::float8 * interval '1 s')) AS unclaimed,
       EXISTS (SELECT FROM outbox WHERE status = 'running' AND lease_until < pg_catalog.now())
       OR EXISTS (SELECT FROM outbox
                  WHERE status = 'running'
                    AND lease_until > pg_catalog.now() + %(impossible_lease)s::float8 * interval '1 s') AS expired;


-- name: unclaimed_rows
-- Rows that were handed over longer than the grace ago and that no worker has claimed, and those handed over in the
-- future: the server's clock was set back since.
SELECT id, delivery, queue, extract(epoch FROM run_at)::float8 AS run_at,
       extract(epoch FROM pg_catalog.now() - run_at)::float8 AS overdue,
       extract(epoch FROM pg_catalog.now() - enqueued_at)::float8 AS age
FROM outbox
WHERE status = 'enqueued'
  AND (enqueued_at < pg_catalog.now() - %(grace)s::float8 * interval '1 s'
       OR enqueued_at > pg_catalog.now() + %(clock_error)s::float8 * interval '1 s');


-- name: sweep
-- Takes back rows whose job Redis no longer holds. The delivery is the one that the sweep looked for in Redis: a row that
-- has been claimed or handed over since is left alone.
WITH locked AS MATERIALIZED (
    SELECT id, delivery, status FROM outbox WHERE id = ANY (%(ids)s) FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE outbox SET status = 'pending'
WHERE id = ANY (ARRAY(
    SELECT id
    FROM locked
    JOIN unnest(%(ids)s::bigint[], %(deliveries)s::integer[]) AS job (id, delivery) USING (id, delivery)
    WHERE status = 'enqueued'
))
RETURNING id, delivery, task, queue, request_id;


-- name: limit_transaction_lock_wait
-- Limits how long the transaction of a rescue or a deletion waits for a lock: while a rescue waits, so do the workers'
-- renewals, and all other duties of the relay wait for both.
SELECT pg_catalog.set_config('lock_timeout', '100ms', true);


-- name: expired_leases
-- Locks rows whose lease has passed until the end of the rescue's transaction. It skips rows that another session has
-- locked, for example to renew or complete them, and rows that Postgres has refused recently.
SELECT id, delivery, task, queue, worker, attempts, max_retries, request_id
FROM outbox
WHERE status = 'running'
  AND (lease_until < pg_catalog.now() OR lease_until > pg_catalog.now() + %(impossible_lease)s::float8 * interval '1 s')
  AND id <> ALL (%(refused)s::bigint[])
ORDER BY lease_until
LIMIT %(batch)s
FOR NO KEY UPDATE SKIP LOCKED;


-- name: touch_leases
-- Writes expired rows unchanged: if this fails, a worker could not have renewed their leases either.
UPDATE outbox SET lease_until = lease_until WHERE id = ANY (%(ids)s);


-- name: rescue
-- Takes expired rows, which this transaction has locked, from their workers.
UPDATE outbox
SET status = rescued.status,
    lease_until = NULL,
    run_at = CASE WHEN rescued.status = 'pending' THEN pg_catalog.now() + rescued.delay * interval '1 s' ELSE run_at END,
    last_error = rescued.error
FROM unnest(%(ids)s::bigint[], %(statuses)s::text[], %(delays)s::float8[], %(errors)s::text[])
         AS rescued (id, status, delay, error)
WHERE outbox.id = rescued.id AND outbox.id = ANY (%(ids)s);


-- name: rows_past_retention
-- Locks done rows whose retention is over, so that they can be deleted.
SELECT id
FROM outbox
WHERE status = 'done' AND done_at < pg_catalog.now() - %(retention)s::float8 * interval '1 s'
  AND id <> ALL (%(left_out)s::bigint[])
ORDER BY done_at
LIMIT %(batch)s
FOR UPDATE SKIP LOCKED;


-- name: delete_rows
-- Deletes rows, and what foreign keys of other tables cascade to.
DELETE FROM outbox WHERE id = ANY (%(ids)s);


-- name: has_index_of_unverified
-- Whether the index exists without which the next statement would read all users.
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_index WHERE indexrelid = pg_catalog.to_regclass('users_unverified')::oid AND indisvalid
) AS has;


-- name: unverified_users
-- Locks the next users, oldest first, whose time to verify their address is over. A user that another session has locked,
-- to verify the address or send a mail for example, is skipped until the next round.
SELECT username, created_at::text AS signed_up_at
FROM users
WHERE NOT is_email_verified
  AND created_at < pg_catalog.now() - %(retention)s::float8 * interval '1 s'
  AND (created_at, username) > (%(after)s::timestamptz, %(after_username)s::text)
  AND username <> ALL (%(left_out)s::text[])
ORDER BY created_at, username
LIMIT %(batch)s
FOR UPDATE SKIP LOCKED;


-- name: delete_expired_users
-- Deletes those of these locked users whose mail was sent and whose links have expired, and what foreign keys cascade to;
-- returns the rows of their mails. A mail was sent if a verification was opened for it and its row is done or no longer
-- exists, as an operator may have discarded it. If ids repeat, a verification may have the id of another user's row, which
-- does not count.
-- OFFSET 0 makes the planner look up verifications and rows one by one.
WITH verification AS MATERIALIZED (
    SELECT name.username, verification.expired_at, mail.id, mail.status
    FROM pg_catalog.unnest(%(usernames)s::text[]) AS name (username),
         LATERAL (SELECT outbox_id, expired_at FROM verify_emails WHERE verify_emails.username = name.username
                  OFFSET 0) AS verification
         LEFT JOIN LATERAL (SELECT id, status FROM outbox
                            WHERE outbox.id = verification.outbox_id AND task = 'send_verify_email'
                              AND payload ->> 'username'::text = name.username
                            OFFSET 0) AS mail ON true
), expired AS MATERIALIZED (
    SELECT username, pg_catalog.array_remove(pg_catalog.array_agg(id), NULL::bigint) AS rows
    FROM verification
    GROUP BY username
    HAVING pg_catalog.bool_and(expired_at <= pg_catalog.now() AND coalesce(status, 'done') = 'done')
), deleted AS (
    DELETE FROM users WHERE username = ANY (ARRAY(SELECT username FROM expired)) RETURNING username
)
SELECT rows FROM deleted JOIN expired USING (username);


-- name: unserved_queues
-- Queues with work that the settings do not name: no relay hands over their pending rows, and no worker takes the jobs of
-- their enqueued ones. For each status it finds the queues one by one, with an index lookup that starts after the previous
-- queue, and counts rows up to a limit, so that its cost does not grow with the backlog.
WITH RECURSIVE pending (queue) AS (
    (SELECT queue FROM outbox WHERE status = 'pending' ORDER BY queue LIMIT 1)
    UNION ALL
    SELECT (SELECT queue FROM outbox WHERE status = 'pending' AND queue > pending.queue ORDER BY queue LIMIT 1)
    FROM pending
    WHERE pending.queue IS NOT NULL
), enqueued (queue) AS (
    (SELECT queue FROM outbox WHERE status = 'enqueued' ORDER BY queue LIMIT 1)
    UNION ALL
    SELECT (SELECT queue FROM outbox WHERE status = 'enqueued' AND queue > enqueued.queue ORDER BY queue LIMIT 1)
    FROM enqueued
    WHERE enqueued.queue IS NOT NULL
)
SELECT queue, pg_catalog.sum(rows)::bigint AS rows
FROM (
    SELECT queue, (SELECT pg_catalog.count(*) FROM (SELECT FROM outbox
                                         WHERE status = 'pending' AND queue = pending.queue
                                         LIMIT %(most)s) AS row) AS rows
    FROM pending
    UNION ALL
    SELECT queue, (SELECT pg_catalog.count(*) FROM (SELECT FROM outbox
                                         WHERE status = 'enqueued' AND queue = enqueued.queue
                                         LIMIT %(most)s) AS row)
    FROM enqueued
) AS waiting
WHERE queue <> ALL (%(queues)s)
GROUP BY queue;


-- name: claim
-- The worker's claim: locks first and judges after, in one statement. The lock waits for a relay that has published but
-- not yet committed, and then sees the newest version of the row; an UPDATE … WHERE status = 'enqueued' would not see it
-- and lose the job. The lease counts from the update, because the statement may have waited for a lock since its now().
-- A row that already runs under this worker's name was claimed by an earlier try whose answer was lost: it is claimed
-- again, without counting another attempt. The worker does not ask for rows that it knows it holds.
-- No lock of these statements conflicts with those of a foreign key to the outbox.
-- It waits for a lock for one second. The limit is set before the first lock and for this transaction, because behind a
-- pooler the session's limit is the role's, and the whole worker waits with a claim.
-- It claims rows until their stored payloads exceed a number of bytes; the others wait for another claim.
WITH locked AS MATERIALIZED (
    SELECT id, delivery, task, payload, queue, status, max_retries, timeout, request_id, unhandled_since,
           status = 'enqueued' AND run_at <= pg_catalog.now() OR status = 'running' AND worker = %(worker)s AS free
    FROM outbox
    WHERE id = ANY (%(ids)s)
      AND (SELECT pg_catalog.set_config('lock_timeout', '1s', true)) IS NOT NULL
    ORDER BY id
    FOR NO KEY UPDATE
), claimed AS (
    UPDATE outbox
    SET status = 'running', attempts = attempts + CASE status WHEN 'enqueued' THEN 1 ELSE 0 END,
        worker = %(worker)s, started_at = pg_catalog.now(),
        lease_until = pg_catalog.clock_timestamp() + %(lease)s::float8 * interval '1 s'
    WHERE id = ANY (ARRAY(
        SELECT id
        FROM (
            SELECT id, delivery, pg_catalog.pg_column_size(payload) AS own_bytes,
                   pg_catalog.sum(pg_catalog.pg_column_size(payload)) OVER (ROWS UNBOUNDED PRECEDING) AS bytes
            FROM locked
            WHERE free
        ) AS counted
        JOIN unnest(%(ids)s::bigint[], %(deliveries)s::integer[]) AS job (id, delivery) USING (id, delivery)
        WHERE bytes - own_bytes < %(bytes)s
    ))
    RETURNING id, attempts AS attempt
)
SELECT id, delivery, task, CASE WHEN claimed.id IS NOT NULL THEN payload::text END AS payload, queue, attempt, max_retries,
       timeout, request_id, extract(epoch FROM pg_catalog.now() - unhandled_since)::float8 AS unhandled_for, status,
       claimed.id IS NOT NULL AS is_claimed, free AS is_free
FROM locked LEFT JOIN claimed USING (id);


-- name: lock_available_rows
-- Locks the rows that no other session has locked, until the end of the transaction: a refused claim is repeated with
-- these.
SELECT id FROM outbox WHERE id = ANY (%(ids)s) ORDER BY id FOR NO KEY UPDATE SKIP LOCKED;


-- name: renew_leases
-- Renews the leases of all rows that a worker runs. As in every statement that gets ids, rows are found by id alone and
-- judged once they are locked: a planner that expects hardly any running rows would otherwise read all of them for each
-- id. A row that another session has locked is left to the next renewal and does not hold up the others.
-- The delivery alone does not identify an attempt: after a restore of the table it repeats, in another worker.
WITH locked AS MATERIALIZED (
    SELECT id, delivery, status, worker FROM outbox WHERE id = ANY (%(ids)s) ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE outbox SET lease_until = pg_catalog.clock_timestamp() + %(lease)s::float8 * interval '1 s'
WHERE id = ANY (ARRAY(
    SELECT id
    FROM locked
    JOIN unnest(%(ids)s::bigint[], %(deliveries)s::integer[]) AS job (id, delivery) USING (id, delivery)
    WHERE status = 'running' AND worker = %(worker)s
))
RETURNING id AS row_id, delivery AS number;


-- name: complete
-- Writes the outcomes of a batch of attempts; returns the rows that this worker still held under this delivery and that no
-- other session had locked.
WITH locked AS MATERIALIZED (
    SELECT id, delivery, status AS before, worker
    FROM outbox
    WHERE id = ANY (%(ids)s)
    ORDER BY id
    FOR NO KEY UPDATE SKIP LOCKED
), outcome AS MATERIALIZED (
    SELECT job.*
    FROM unnest(%(ids)s::bigint[], %(deliveries)s::integer[], %(statuses)s::text[],
                %(delays)s::float8[], %(attempts)s::integer[], %(errors)s::text[])
        AS job (id, delivery, status, delay, attempts, error)
    JOIN locked USING (id, delivery)
    WHERE before = 'running' AND worker = %(worker)s
)
UPDATE outbox
SET status = outcome.status,
    lease_until = NULL,
    attempts = coalesce(outcome.attempts, outbox.attempts - 1),
    run_at = CASE WHEN outcome.status = 'done' THEN run_at ELSE pg_catalog.now() + outcome.delay * interval '1 s' END,
    done_at = CASE WHEN outcome.status = 'done' THEN pg_catalog.now() END,
    last_error = coalesce(outcome.error, last_error),
    unhandled_since = CASE WHEN outbox.id = ANY (%(unhandled)s::bigint[])
                               THEN coalesce(unhandled_since, pg_catalog.now()) END
FROM outcome
WHERE outbox.id = outcome.id
RETURNING outbox.id AS row_id, outbox.delivery AS number;


-- name: not_completed
-- The status of rows that `complete` did not write and that this worker was the last to claim: `running` if another
-- session has locked them, or the outcome itself if an earlier statement wrote it and its answer was lost.
WITH found AS MATERIALIZED (
    SELECT id, delivery, status, worker FROM outbox WHERE id = ANY (%(ids)s)
)
SELECT id, delivery, status
FROM found JOIN unnest(%(ids)s::bigint[], %(deliveries)s::integer[]) AS job (id, delivery) USING (id, delivery)
WHERE worker = %(worker)s;


-- name: count_dead
-- How many rows are dead, of one task or of all.
SELECT pg_catalog.count(*) AS rows
FROM outbox
WHERE status = 'dead' AND (%(task)s::text IS NULL OR task = %(task)s);


-- name: list_dead
-- The newest dead rows for an operator's table, with the beginning of their payloads.
SELECT id, task, attempts, max_retries, extract(epoch FROM pg_catalog.now() - started_at)::float8 AS age, last_error,
       pg_catalog.left(payload::text, %(payload_limit)s::integer) AS payload
FROM outbox
WHERE status = 'dead' AND (%(task)s::text IS NULL OR task = %(task)s)
ORDER BY id DESC
LIMIT %(limit)s;


-- name: list_dead_json
-- The same rows in full, for programs. Postgres writes the JSON, so that no number in a payload is rounded.
SELECT pg_catalog.to_json(outbox)::text AS document
FROM outbox
WHERE status = 'dead' AND (%(task)s::text IS NULL OR task = %(task)s)
ORDER BY id DESC
LIMIT %(limit)s;


-- name: show_utc
-- Makes the rest of a transaction show times in UTC and ISO 8601.
SELECT pg_catalog.set_config('TimeZone', 'UTC', true), pg_catalog.set_config('DateStyle', 'ISO', true);


-- name: show_row
-- One row in full, for an operator and for programs.
SELECT status, task, queue, attempts, max_retries, last_error, worker, unique_key, request_id,
       pg_catalog.date_trunc('second', created_at)::text AS created_at,
       pg_catalog.date_trunc('second', started_at)::text AS started_at,
       pg_catalog.jsonb_pretty(payload) AS payload, pg_catalog.to_json(outbox)::text AS document
FROM outbox
WHERE id = %(id)s;


-- name: dead_ids
-- The ids of all dead rows, of one task or of all: a command that takes all of them works through these in batches.
SELECT coalesce(pg_catalog.array_agg(id ORDER BY id), '{}') AS ids
FROM outbox
WHERE status = 'dead' AND (%(task)s::text IS NULL OR task = %(task)s);


-- name: retry_dead
-- Gives dead rows all their attempts again, from now on, or from the time when their worker has exited, some seconds after
-- the row died, if it could not end the handler. Their delivery keeps counting, because it is the fence.
-- If two operators retry a row at the same moment, the second one waits and then finds it no longer dead.
WITH dead AS (
    SELECT id FROM outbox WHERE id = ANY (%(ids)s) AND status = 'dead' ORDER BY id FOR NO KEY UPDATE
)
UPDATE outbox
SET status = 'pending', attempts = 0,
    run_at = least(greatest(pg_catalog.now(), run_at), pg_catalog.now() + interval '1 minute'),
    lease_until = NULL, worker = NULL, unhandled_since = NULL
WHERE id = ANY (ARRAY(SELECT id FROM dead))
RETURNING id;


-- name: discard_dead
-- Deletes dead rows.
WITH dead AS (
    SELECT id FROM outbox WHERE id = ANY (%(ids)s) AND status = 'dead' ORDER BY id FOR UPDATE
)
DELETE FROM outbox WHERE id = ANY (ARRAY(SELECT id FROM dead)) RETURNING id;


-- name: unhandled_ids
-- The ids of all rows that workers give back because they cannot handle them, of one task or of all.
SELECT coalesce(pg_catalog.array_agg(id ORDER BY id), '{}') AS ids
FROM (
    SELECT id, task FROM outbox WHERE status = 'pending' AND unhandled_since IS NOT NULL
    UNION ALL
    SELECT id, task FROM outbox WHERE status = 'enqueued' AND unhandled_since IS NOT NULL
) AS unhandled
WHERE %(task)s::text IS NULL OR task = %(task)s;


-- name: give_up_unhandled
-- Makes such rows dead, except those that a worker holds now.
WITH unhandled AS (
    SELECT id
    FROM outbox
    WHERE id = ANY (%(ids)s) AND status IN ('pending', 'enqueued') AND unhandled_since IS NOT NULL
    ORDER BY id
    FOR NO KEY UPDATE
)
UPDATE outbox SET status = 'dead', unhandled_since = NULL WHERE id = ANY (ARRAY(SELECT id FROM unhandled)) RETURNING id;


-- name: row_statuses
-- The status of rows, for an operator who took them for dead.
SELECT id, status FROM outbox WHERE id = ANY (%(ids)s);


-- name: open_verifications
-- The recipients of verification mails, and each row's verification, unless its user no longer needs one: the same one at
-- every attempt, valid for its full time from the latest. Also Postgres' time, which the mails carry.
-- Ids of outbox rows repeat, for example after a restore: a verification found under an id is used only if it is this
-- user's, for the user's current address, and not used. Otherwise the row gets none here.
-- OFFSET 0 makes the planner look up each user by name: for a few hundred names it would read all users.
-- A user that another transaction has locked is returned without an email and put off: the foreign key's check would wait
-- for this lock, and all other mails with it. The wait for any other lock is limited to a quarter of a second.
WITH recipient AS MATERIALIZED (
    SELECT outbox_id, username, full_name, email, is_email_verified
    FROM unnest(%(outbox_ids)s::bigint[], %(usernames)s::text[]) AS row (outbox_id, username)
    LEFT JOIN LATERAL (
        SELECT full_name, email, is_email_verified FROM users WHERE users.username = row.username
        OFFSET 0
        FOR KEY SHARE SKIP LOCKED
    ) AS found ON true
    WHERE (SELECT pg_catalog.set_config('lock_timeout', '250ms', true)) IS NOT NULL
      AND (email IS NOT NULL OR (SELECT true FROM users WHERE users.username = row.username))
), opened AS (
    INSERT INTO verify_emails (outbox_id, username, email, expired_at)
    SELECT outbox_id, username, email, pg_catalog.now() + %(lifetime)s::float8 * interval '1 s'
    FROM recipient
    WHERE NOT is_email_verified
    ORDER BY outbox_id
    ON CONFLICT (outbox_id) DO UPDATE SET expired_at = EXCLUDED.expired_at
    WHERE verify_emails.username = EXCLUDED.username AND verify_emails.email = EXCLUDED.email
      AND NOT verify_emails.is_used
    RETURNING outbox_id, id
)
SELECT outbox_id, full_name, email, is_email_verified, opened.id, extract(epoch FROM pg_catalog.now())::float8 AS now
FROM recipient LEFT JOIN opened USING (outbox_id);


-- name: detach_verifications
-- Detaches verifications that do not belong to these rows: another user's, for another address, or used. Their links stay
-- as they are.
WITH stale AS (
    SELECT verification.id
    FROM unnest(%(outbox_ids)s::bigint[], %(usernames)s::text[]) AS row (outbox_id, username)
    JOIN users USING (username)
    JOIN verify_emails AS verification USING (outbox_id)
    WHERE verification.username <> users.username OR verification.email <> users.email OR verification.is_used
    ORDER BY verification.id
    FOR NO KEY UPDATE OF verification
)
UPDATE verify_emails SET outbox_id = NULL WHERE id = ANY (ARRAY(SELECT id FROM stale));


-- name: find_verification
-- The verification of an opened link, and whether it is for its user's current address. It locks nothing, because any
-- client may ask for any id.
SELECT verification.id, username, verification.email, is_used, expired_at <= pg_catalog.now() AS is_expired,
       verification.email = users.email AS is_current
FROM verify_emails AS verification JOIN users USING (username)
WHERE verification.id = %(id)s;


-- name: verify_user
-- Marks an address as verified if it is still its user's. It runs before the link is marked as used, so that both tables
-- are locked in the order in which the deletion of a user locks them.
UPDATE users SET is_email_verified = true WHERE username = %(username)s AND email = %(email)s;


-- name: use_verification
-- Marks the link that verified an address as used, unless it has been used or has expired since.
UPDATE verify_emails SET is_used = true WHERE id = %(id)s AND NOT is_used AND expired_at > pg_catalog.now();
