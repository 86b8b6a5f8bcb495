"""Runs the Postgres of a run, and provides the actors' connections and the tester's own statements."""

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from outbox.devstack.embedded import embedded_postgres
from outbox.rq_jobs import Delivery
from outbox.runtime import postgres
from outbox.runtime.migrations import migrate
from tests.schedules.actor import Actor
from tests.schedules.stepped_connection import SteppedConnection, SteppedCursor

_SETTINGS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "autovacuum=off", "jit=off")
_DEADLOCK_TIMEOUT = "deadlock_timeout=20ms"

_RESET = "TRUNCATE outbox, transition RESTART IDENTITY"

_BLOCKED = "SELECT pid, pg_blocking_pids(pid) AS blockers FROM pg_locks WHERE NOT granted AND pid = ANY (%(pids)s)"

# Skips locked rows: their time passes later.
_PASS = {
    "run_at": """
        UPDATE outbox SET run_at = now() - interval '1 h'
        WHERE id = ANY (ARRAY(SELECT id FROM outbox
                              WHERE id = ANY (%(rows)s) AND status IN ('pending', 'enqueued') AND run_at > now()
                              FOR NO KEY UPDATE SKIP LOCKED))
        RETURNING id, delivery, extract(epoch FROM run_at)::float8 AS run_at
    """,
    "enqueued_at": """
        UPDATE outbox SET enqueued_at = now() - interval '1 h'
        WHERE id = ANY (ARRAY(SELECT id FROM outbox WHERE id = ANY (%(rows)s) AND status = 'enqueued'
                              FOR NO KEY UPDATE SKIP LOCKED))
    """,
    "lease_until": """
        UPDATE outbox SET lease_until = now() - interval '1 h'
        WHERE id = ANY (ARRAY(SELECT id FROM outbox
                              WHERE id = ANY (%(rows)s) AND status = 'running' AND lease_until > now()
                              FOR NO KEY UPDATE SKIP LOCKED))
    """,
    "done_at": """
        UPDATE outbox SET done_at = now() - interval '2 d'
        WHERE id = ANY (ARRAY(SELECT id FROM outbox WHERE id = ANY (%(rows)s) AND status = 'done'
                              FOR NO KEY UPDATE SKIP LOCKED))
    """,
}
_SET_CLOCK_BACK = """
    UPDATE outbox SET enqueued_at = enqueued_at + interval '1 d', lease_until = lease_until + interval '1 d'
    WHERE id = ANY (ARRAY(SELECT id FROM outbox WHERE id = ANY (%(rows)s) AND status IN ('enqueued', 'running')
                          FOR NO KEY UPDATE SKIP LOCKED))
"""

_RESTORE = (
    "SET LOCAL session_replication_role = replica",
    "DELETE FROM outbox",
    "INSERT INTO outbox OVERRIDING SYSTEM VALUE SELECT * FROM copy",
    "SELECT setval('outbox_id_seq', (SELECT coalesce(max(id), 0) + 1 FROM copy), false)",
    """
    INSERT INTO transition (actor, new)
    SELECT 'restore', coalesce(jsonb_object_agg(id, to_jsonb(copy)), '{}') FROM copy
    """,
)


class Database:
    """A database, and the actors' connections to it, which are kept from schedule to schedule."""

    def __init__(self, database_url: str) -> None:
        """Connects to a migrated database, and adds the trigger that records transitions."""
        self._database_url = database_url
        self._own = psycopg.connect(
            database_url,
            autocommit=True,
            row_factory=dict_row,
            options="-c schedules.actor=time -c lock_timeout=20s",
            prepare_threshold=1,
        )
        self._own.execute((Path(__file__).parent / "transitions.sql").read_bytes())
        self._kept: dict[str, SteppedConnection] = {}

    def close(self) -> None:
        """Closes all connections."""
        for connection in (self._own, *self._kept.values()):
            connection.close()

    def connect(self, actor: Actor) -> SteppedConnection:
        """Returns an actor's connection, with the product's connection options."""
        connection = self._kept.get(actor.name)
        if connection is None or connection.closed:
            # Every second session has other plans, so that rows without ORDER BY come in another order.
            plans = " -c enable_seqscan=off" if len(self._kept) % 2 else ""
            connection = SteppedConnection.connect(
                self._database_url,
                row_factory=dict_row,
                cursor_factory=SteppedCursor,
                options=f"-c schedules.actor={actor.name}{plans}",
                **postgres.options(actor.name, pooled=False),
            )
            self._kept[actor.name] = connection
        connection.actor = actor
        actor.pid = connection.info.backend_pid
        actor.connection = connection
        return connection

    def reset(self) -> None:
        """Empties the tables."""
        self._own.execute(_RESET)

    def blocked(self, actors: Collection[Actor]) -> dict[int, list[int]]:
        """Returns the sessions of these actors that wait for a lock, and the sessions that block each."""
        rows = self._own.execute(_BLOCKED, {"pids": [actor.pid for actor in actors]})
        return {row["pid"]: row["blockers"] for row in rows}

    def cancel(self, actor: Actor) -> None:
        """Ends an actor's wait for a lock."""
        self._own.execute("SELECT pg_cancel_backend(%s)", [actor.pid])

    def rows(self) -> list[dict[str, Any]]:
        """Returns all rows, ordered by id."""
        return self._own.execute("SELECT id, delivery, status, worker FROM outbox ORDER BY id").fetchall()

    def pass_time(self, column: str, rows: Collection[int]) -> list[tuple[Delivery, float]]:
        """Moves a time of these rows into the past; returns the deliveries with a changed `run_at`, and that time."""
        cursor = self._own.execute(_PASS[column], {"rows": list(rows)})
        if column != "run_at":
            return []
        return [(Delivery(row["id"], row["delivery"]), row["run_at"]) for row in cursor]

    def set_clock_back(self, rows: Collection[int]) -> None:
        """Moves times of these rows further into the future than any process writes them."""
        self._own.execute(_SET_CLOCK_BACK, {"rows": list(rows)})

    def dump(self) -> None:
        """Copies the committed rows of the table."""
        self._own.execute("TRUNCATE copy")
        self._own.execute("INSERT INTO copy SELECT * FROM outbox")

    def restore(self) -> None:
        """Replaces the rows by the copy; no actor may have an open transaction."""
        with self._own.transaction():
            for statement in _RESTORE:
                self._own.execute(statement)

    def transitions(self) -> list[dict[str, Any]]:
        """Returns all transitions committed since the reset."""
        return self._own.execute("SELECT * FROM transition ORDER BY seq").fetchall()


@contextmanager
def open_database() -> Iterator[Database]:
    """Runs a migrated Postgres for schedules."""
    with (
        tempfile.TemporaryDirectory(prefix="outbox-schedules-") as folder,
        embedded_postgres(Path(folder), settings=[*_SETTINGS, _DEADLOCK_TIMEOUT]) as server,
    ):
        migrate(server.url)
        opened = Database(server.url)
        try:
            yield opened
        finally:
            opened.close()
