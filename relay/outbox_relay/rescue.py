"""Takes rows back from dead workers, but not from live ones that could not write for a while."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import psycopg

from outbox.backoff import retry_delay
from outbox.errors import OutboxError
from outbox.queries import query
from outbox.row import Status, named
from outbox.rq_jobs import Delivery
from outbox.runtime import logs, postgres
from outbox.runtime.batches import write_bisecting
from outbox.runtime.postgres import Connection
from outbox.runtime.redaction import one_line
from outbox.runtime.settings import LONGEST_LEASE
from outbox_relay.batches import LeftOut

BATCH = 1000
"""Upper bound of rows in one step."""
RESCUE_INTERVAL = 1.0
"""Upper bound of the seconds between two looks. A dead worker's row is offered again this much later than its lease and
the settling time end."""
SETTLING_TIME = 2.0
"""Upper bound of the seconds between the two steps that take a row. A worker that could not write until the first of
them tries again every second."""
SETTLING_PART = 0.25
"""The same for short leases, as a part of the lease."""
LATE = 1.0
"""Upper bound of the seconds that a step's transaction may take. If it takes longer, Postgres has stalled, and renewals
have stalled too."""
IMPOSSIBLE_LEASE = LONGEST_LEASE + 60.0
"""Seconds ahead at which no lease can end with any setting: if one does, the server's clock was set back."""

LEFT_OUT = 60.0
"""Seconds until the next try to rescue a row that Postgres has refused."""

_MARGIN = 0.05
"""Seconds that are added to the settling time, so that the second step is not early."""

_SERVER_FAILS = ("53", "58")
"""The prefixes of SQLSTATEs by which no session can write: no resources, such as disk, and errors of the system."""


class Expired(NamedTuple):
    """A row of the statement `expired_leases`."""

    id: int
    delivery: int
    task: str
    queue: str
    worker: str
    attempts: int
    max_retries: int
    request_id: str | None


class Rescued(NamedTuple):
    """An expired row, and its next status."""

    row: Expired
    status: Status
    delay: float
    """Seconds until the next attempt."""


class LateError(OutboxError):
    """The transaction of a step took too long and is rolled back."""


class Rescue:
    """One relay's rescue. It takes a row in two steps, `settling` seconds apart.

    The first step writes the row unchanged. So a row is taken only if writing was possible in the time between, in
    which a live worker renews its lease. Any sign that workers could not write, or that Postgres' clock has jumped,
    pauses the rescue for the time of a lease.
    """

    def __init__(self, lease: float) -> None:
        """Makes a rescue that takes nothing at first: whether leases could be renewed before the start is unknown.

        Args:
            lease: seconds of a lease.
        """
        self._lease = lease
        self.settling = min(SETTLING_TIME, SETTLING_PART * lease)
        self._seen_at: dict[Delivery, float] = {}
        """When each expired row was first seen."""
        self._paused_until = -math.inf
        self._looked_at = -math.inf
        self._clock_offset = (0.0, 0.0)
        """Lower and upper bound of Postgres' clock minus the monotonic clock."""
        self._batch = BATCH
        self._left_out = LeftOut[int]("rows cannot be rescued", LEFT_OUT)

    def follow(self, connection: Connection, postgres_time: float, began: float, *, is_expired: bool) -> float:
        """Follows a look: notes it, does one step if it found an expired lease, and returns the seconds until the next.

        Infinite if no lease has expired.

        Args:
            connection: in autocommit mode.
            postgres_time: the time in the look's answer, in seconds since the epoch.
            began: when the look began, by the monotonic clock.
            is_expired: whether it found an expired lease.

        Raises:
            psycopg.OperationalError: Postgres is away.
        """
        self.note_look(postgres_time, began)
        if is_expired:
            return self.step(connection)
        self.forget()
        return math.inf

    def note_look(self, postgres_time: float, began: float, interval: float = RESCUE_INTERVAL) -> None:
        """Notes a look, and pauses if it was late or Postgres' clock has jumped since the one before.

        If a look is late, then Postgres was away or stalled, or this process was paused, and workers may not have been
        able to renew. They renew every third of a lease, so a gap of less than another third expires no lease. The same
        holds for a jump of the clock.

        Args:
            postgres_time: the time in the look's answer, in seconds since the epoch.
            began: when the look began, by the monotonic clock.
            interval: seconds between two looks.
        """
        now, tolerance = time.monotonic(), self._lease / 3
        is_late = now - self._looked_at > interval + tolerance
        # Postgres read its clock at some time between the question and the answer.
        offset = (postgres_time - now, postgres_time - began)
        jump = 0.0
        if self._looked_at > -math.inf:
            before = self._clock_offset
            jump = max(0.0, offset[0] - before[1]) - max(0.0, before[0] - offset[1])
        self._looked_at, self._clock_offset = now, offset
        if abs(jump) > tolerance:
            logs.get().warning("Postgres' clock jumped", seconds=round(jump, 1))
        if is_late or abs(jump) > tolerance:
            self.pause()

    def note_refusal(self, error: psycopg.Error) -> None:
        """Pauses if Postgres has refused any duty for a reason that keeps workers from writing too, as a full disk."""
        if (error.sqlstate or "").startswith(_SERVER_FAILS):
            self.pause()

    def pause(self) -> None:
        """Takes nothing for the time of a lease: live workers may not have been able to renew theirs."""
        self._paused_until = time.monotonic() + self._lease
        self._seen_at.clear()

    def forget(self) -> None:
        """Forgets all expired rows: one that expires later is seen for the first time again."""
        self._seen_at.clear()

    def step(self, connection: Connection) -> float:
        """Returns rows that an earlier step has seen to `pending` or `dead`; returns the seconds until the next step.

        Infinite if no lease has expired.

        Args:
            connection: in autocommit mode.

        Raises:
            psycopg.OperationalError: Postgres is away.
        """
        now = time.monotonic()
        is_paused = now < self._paused_until
        batch = 1 if is_paused else self._batch
        expired: list[Expired] = []
        try:
            with connection.transaction():
                connection.execute(query("limit_transaction_lock_wait"))
                expired = self._expired(connection, batch)
                taken = [] if is_paused else self._take_settled(connection, expired, now)
                if is_paused:
                    self._touch(connection, expired)
                _check_in_time(now)
        except (psycopg.Error, LateError) as error:
            if postgres.loses_connection(error, connection):
                raise
            if not is_paused:
                logs.get().warning("rescue paused", why=one_line(error), seconds=self._lease)
                self._batch = max(1, len(expired) // 2)  # there may have been too many rows for one transaction
            self.pause()
            return self._lease
        if taken:
            self._batch = min(BATCH, 2 * self._batch)
            connection.execute(query("notify_relays"))
        for rescued in taken:
            del self._seen_at[Delivery.of(rescued.row)]
            _log(rescued)
        if len(taken) == batch:
            return 0.0  # there may be more
        return self.settling + _MARGIN if expired else math.inf

    def _expired(self, connection: Connection, batch: int) -> list[Expired]:
        """Returns and locks expired rows, except those that Postgres has refused recently."""
        asked = {"batch": batch, "impossible_lease": IMPOSSIBLE_LEASE, "refused": self._left_out.rows()}
        return connection.cursor(row_factory=named(Expired)).execute(query("expired_leases"), asked).fetchall()

    def _take_settled(self, connection: Connection, expired: list[Expired], now: float) -> list[Rescued]:
        seen = [(row, self._seen_at.get(Delivery.of(row), now)) for row in expired]
        self._seen_at = {Delivery.of(row): at for row, at in seen}
        settled = [row for row, at in seen if now - at >= self.settling]
        self._touch(connection, [row for row, at in seen if now - at < self.settling])
        taken: list[Rescued] = []

        def take(some: Sequence[Rescued]) -> None:
            with connection.transaction():
                connection.execute(
                    query("rescue"),
                    {
                        "ids": [row.id for row, _, _ in some],
                        "statuses": [status for _, status, _ in some],
                        "delays": [delay for _, _, delay in some],
                        "errors": [
                            f"the worker {row.worker} vanished: it did not renew its lease in time"
                            for row, _, _ in some
                        ],
                    },
                )
            taken.extend(some)

        refused = write_bisecting([_decide(row) for row in settled], take)
        self._refuse([(rescued.row, error) for rescued, error in refused])
        return taken

    def _touch(self, connection: Connection, rows: list[Expired]) -> None:
        """Writes rows unchanged: if that fails, their workers could not have renewed them."""

        def touch(some: Sequence[Expired]) -> None:
            with connection.transaction():
                connection.execute(query("touch_leases"), {"ids": [row.id for row in some]})

        self._refuse(write_bisecting(rows, touch))

    def _refuse(self, refused: list[tuple[Expired, Exception]]) -> None:
        if refused:
            self._left_out.add([row.id for row, _ in refused], refused[0][1])


def _check_in_time(begun: float) -> None:
    if time.monotonic() - begun > LATE:
        raise LateError(f"it took longer than {LATE:.0f} s")


def _decide(row: Expired) -> Rescued:
    status = Status.DEAD if row.attempts > row.max_retries else Status.PENDING
    return Rescued(row, status, _delay(row.attempts))


def _delay(attempts: int) -> float:
    """Returns the seconds until the next attempt: 0 after the first one.

    From the second attempt on the row waits as after a failure. It may be the row that kills its workers, and the rows
    beside it should run without it.
    """
    return retry_delay(attempts - 1) if attempts > 1 else 0.0


def _log(rescued: Rescued) -> None:
    row = rescued.row
    logs.get().warning(
        "rescued row",
        type=row.task,
        queue=row.queue,
        row=row.id,
        delivery=row.delivery,
        attempt=row.attempts,
        status=rescued.status.value,
        next_try=round(rescued.delay, 1) if rescued.status is Status.PENDING else None,
        request_id=row.request_id,
    )
