"""Deletes users who have not verified their address in time, if `OUTBOX_UNVERIFIED_RETENTION` is set."""

from functools import partial
from typing import NamedTuple

from psycopg.rows import scalar_row

from outbox.queries import query
from outbox.row import named
from outbox.runtime import logs
from outbox.runtime.postgres import Connection
from outbox_relay.batches import Batches

BATCH = 200
"""Upper bound of users in one batch. Deleting them takes about 20 ms, in which the relay hands nothing over."""
PAUSE = 0.05
"""Seconds between two batches, for the relay's other work."""
INTERVAL = 60.0
"""Seconds between two rounds through all users who have not verified their address in time."""
SMALLER_PAUSE = 0.5
"""Seconds from a refused batch to the next, smaller one: each may wait for a lock."""
LEFT_OUT = 60.0
"""Seconds until the next try to delete a user who could not be deleted."""

INDEX = "CREATE INDEX CONCURRENTLY users_unverified ON users (created_at, username) WHERE NOT is_email_verified"
"""The index that finds them. No migration creates it: on a large table that would block sign-ups, and every
verification would cost more."""

_START = {"after": "-infinity", "after_username": ""}


class _Unverified(NamedTuple):
    """A row of the statement `unverified_users`."""

    username: str
    signed_up_at: str


class Expiry:
    """One relay's expiry of users.

    A round goes through all unverified users by age and looks at each once, so users who must stay, because their mail
    is not sent yet, do not block the others.
    """

    def __init__(self, retention: float) -> None:
        """Makes an expiry.

        Args:
            retention: seconds that users have to verify their address.
        """
        self._retention = retention
        self._batches = Batches[str](BATCH, "unverified users cannot be deleted", LEFT_OUT, field="users")
        self._place = _START
        """The last user that was looked at."""

    def step(self, connection: Connection) -> float | None:
        """Looks at one batch and deletes the users who have expired.

        Returns:
            The seconds until the next batch; None at the end of a round.

        Raises:
            psycopg.Error: Postgres is away, or refuses for a reason that is not in the users, such as a missing right.
        """
        has_index = connection.cursor(row_factory=scalar_row).execute(query("has_index_of_unverified")).fetchone()
        if not has_index:
            logs.get().error("unverified users cannot expire", why="there is no index users_unverified", run=INDEX)
            return None
        looked_at = self._batches.write(connection, partial(self._delete, connection))
        if looked_at is None:
            return SMALLER_PAUSE
        if looked_at:
            return PAUSE
        self._place = _START
        return None

    def _delete(self, connection: Connection, limit: int) -> int:
        """Locks users, then judges them, so that no worker opens a verification and no request uses one in between."""
        unverified = {**self._place, "retention": self._retention, "left_out": self._batches.left_out.rows()}
        with connection.transaction():
            connection.execute(query("limit_transaction_lock_wait"))
            users = (
                connection.cursor(row_factory=named(_Unverified))
                .execute(query("unverified_users"), {**unverified, "batch": limit})
                .fetchall()
            )
            if not users:
                return 0
            self._batches.tried = [user.username for user in users]
            # A statement of its own sees what was committed before the locks were granted.
            rows_of_deleted = (
                connection.cursor(row_factory=scalar_row)
                .execute(query("delete_expired_users"), {"usernames": self._batches.tried})
                .fetchall()
            )
            if row_ids := [row_id for rows in rows_of_deleted for row_id in rows]:
                connection.execute(query("delete_rows"), {"ids": row_ids})
        if rows_of_deleted:
            logs.get().info("unverified users deleted", users=len(rows_of_deleted))
        self._place = {"after": users[-1].signed_up_at, "after_username": users[-1].username}
        return len(users)
