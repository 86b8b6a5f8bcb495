"""Taking rows from workers that died, and never from one that lives and only could not write for a while."""

import math
import time
from typing import Any

import psycopg

from outbox import logs
from outbox.backoff import retry_delay
from outbox.jobs import Delivery
from outbox.outage import one_line
from outbox.postgres import AWAY, Connection
from outbox.queries import query

BATCH = 1000
SETTLING_TIME = 2.0
"""Seconds between two looks at a row whose lease has passed, at most: a worker that was kept from writing until the
first of them tries again every second."""
SETTLING_PART = 0.25
"""The same where leases are short, as a part of one."""
LATE = 1.0
"""Seconds that a rescue's transaction may take. Where it takes longer, Postgres has stalled, and renewals with it."""
SHORTEST_IMPOSSIBLE_LEASE = 300.0
"""Seconds ahead at which no lease can end, however long leases are: the server's clock was set back since."""

_MARGIN = 0.05
"""Seconds by which the second look may come early."""


class LateError(Exception):
    """The transaction of a rescue took too long; it is rolled back."""


class Rescue:
    """One relay's rescue, in two steps: a look at whose lease has passed, and a moment later the taking.

    The first step writes the rows as they are. So a row is taken only if writing was possible for the time between,
    in which a worker that lives renews its lease. Any sign that leases could not be written, or that Postgres' clock
    has jumped, puts off all taking for the time of a lease.
    """

    def __init__(self, lease: float) -> None:
        """Takes the seconds of a lease. Nothing is taken at first: this relay does not know what was before it."""
        self._lease = lease
        self.settling = min(SETTLING_TIME, SETTLING_PART * lease)
        self._seen_at: dict[Delivery, float] = {}
        self._from = -math.inf
        self._looked_at = -math.inf
        self._clock_offset = 0.0

    @property
    def longest_lease(self) -> float:
        """Seconds ahead at which no lease can end."""
        return max(SHORTEST_IMPOSSIBLE_LEASE, 10 * self._lease)

    def looked(self, postgres_time: float, interval: float) -> None:
        """Takes note of a look at Postgres, and pauses where something was wrong since the one before.

        A look that is late: Postgres was away, or stalled, or this process was paused, and workers may not have been
        able to renew. They renew every third of a lease: what is shorter than another third has cost none of them its
        lease. The same goes for a clock that jumped.

        Args:
            postgres_time: what it said, in seconds since the epoch.
            interval: seconds between two looks.
        """
        now, tolerance = time.monotonic(), self._lease / 3
        offset = postgres_time - now
        is_late = now - self._looked_at > interval + tolerance
        has_jumped = self._looked_at > -math.inf and abs(offset - self._clock_offset) > tolerance
        if has_jumped:
            logs.get().warning("Postgres' clock jumped", seconds=round(offset - self._clock_offset, 1))
        self._looked_at, self._clock_offset = now, offset
        if is_late or has_jumped:
            self.pause()

    def pause(self) -> None:
        """Takes nothing for the time of a lease: leases may not have been renewed though their workers live."""
        self._from = time.monotonic() + self._lease
        self._seen_at.clear()

    def forget(self) -> None:
        """Forgets what was seen: no lease has passed any more."""
        self._seen_at.clear()

    def step(self, connection: Connection) -> float:
        """Returns rows that were seen before to `pending`, or to `dead`, and returns the seconds until the next step.

        That is infinite where no lease has passed.

        Args:
            connection: in autocommit mode.

        Raises:
            psycopg.OperationalError: Postgres is away.
        """
        now = time.monotonic()
        try:
            with connection.transaction():
                connection.execute(query("limit_rescue"))
                if now < self._from:
                    expired, taken = self._expired(connection, 1), []
                    _touch(connection, expired)
                else:
                    expired = self._expired(connection, BATCH)
                    taken = self._take_settled(connection, expired, now)
                _check_in_time(now)
        except (psycopg.errors.LockNotAvailable, LateError):
            self.pause()
            return self._lease
        if taken:
            connection.execute(query("notify_relays"))
        for row in taken:
            del self._seen_at[_delivery(row)]
            _tell(row)
        if len(taken) == BATCH:
            return 0  # a busy worker has left more
        return self.settling + _MARGIN if expired else math.inf

    def _expired(self, connection: Connection, batch: int) -> list[dict[str, Any]]:
        limits = {"batch": batch, "longest_lease": self.longest_lease}
        return connection.execute(query("expired"), limits).fetchall()

    def _take_settled(self, connection: Connection, expired: list[dict[str, Any]], now: float) -> list[dict[str, Any]]:
        self._seen_at = {_delivery(row): self._seen_at.get(_delivery(row), now) for row in expired}
        settled: list[dict[str, Any]] = []
        unsettled: list[dict[str, Any]] = []
        for row in expired:
            is_settled = now - self._seen_at[_delivery(row)] >= self.settling
            (settled if is_settled else unsettled).append(row)
        _touch(connection, unsettled)
        return _give_back(connection, settled) if settled else []


def _check_in_time(begun: float) -> None:
    if time.monotonic() - begun > LATE:
        raise LateError


def _touch(connection: Connection, rows: list[dict[str, Any]]) -> None:
    """Writes rows as they are, to see whether their workers could have."""
    if not rows:
        return
    try:
        with connection.transaction():
            connection.execute(query("touch_leases"), {"ids": [row["id"] for row in rows]})
    except AWAY:
        raise
    except psycopg.Error as error:  # a trigger that refuses a row, say: taking it will tell which
        logs.get().debug("expired rows cannot be touched", error=one_line(error))


def _delivery(row: dict[str, Any]) -> Delivery:
    return Delivery(row["id"], row["delivery"])


def _give_back(connection: Connection, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes rows, and returns those that could be written: one that cannot must not keep the others from it."""
    for row in rows:
        row["status"] = "dead" if row["attempts"] > row["max_retries"] else "pending"
        row["delay"] = _delay(row["attempts"])
    try:
        with connection.transaction():
            connection.execute(
                query("rescue"),
                {
                    "ids": [row["id"] for row in rows],
                    "statuses": [row["status"] for row in rows],
                    "delays": [row["delay"] for row in rows],
                    "errors": [
                        f"the worker {row['worker']} vanished: it did not renew its lease in time" for row in rows
                    ],
                },
            )
    except AWAY:
        raise
    except psycopg.Error as error:  # a trigger that refuses a row, say
        if len(rows) > 1:
            middle = len(rows) // 2
            return _give_back(connection, rows[:middle]) + _give_back(connection, rows[middle:])
        logs.get().error("row cannot be rescued", row=rows[0]["id"], error=one_line(error))
        return []
    return rows


def _delay(attempts: int) -> float:
    """Returns the seconds until the next attempt: none at first, as the row did no harm that anybody knows of.

    The row may be what kills its workers, and then all that run beside it go down with it: from the second time on it
    waits as after a failure, so that it and the others part company.
    """
    return retry_delay(attempts - 1) if attempts > 1 else 0.0


def _tell(row: dict[str, Any]) -> None:
    logs.get().warning(
        "rescued row",
        type=row["task"],
        queue=row["queue"],
        row=row["id"],
        delivery=row["delivery"],
        attempt=row["attempts"],
        status=row["status"],
        next_try=round(row["delay"], 1) if row["status"] == "pending" else None,
        request_id=row["request_id"],
    )
