"""Takes rows from dead workers, and not from live ones that could not write for a while."""

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
from outbox.runtime.halving import write_by_halves
from outbox.runtime.postgres import Connection
from outbox.runtime.redaction import one_line
from outbox.runtime.settings import LONGEST_LEASE

BATCH = 1000
SETTLING_TIME = 2.0
"""Seconds between two looks at a row whose lease has passed, at most: a worker that was kept from writing until the
first of them tries again every second."""
SETTLING_PART = 0.25
"""The same where leases are short, as a part of one."""
LATE = 1.0
"""Seconds that a rescue's transaction may take. Where it takes longer, Postgres has stalled, and renewals with it."""
IMPOSSIBLE_LEASE = LONGEST_LEASE + 60.0
"""Seconds ahead at which no lease can end, whatever a worker's setting: the server's clock was set back since."""

REFUSED_PAUSE = 60.0
"""Seconds until a row is tried again whose rescue Postgres has refused."""

_MARGIN = 0.05
"""Seconds by which the second look may come early."""


class Expired(NamedTuple):
    """A row of the statement `expired`: its lease has passed."""

    id: int
    delivery: int
    task: str
    queue: str
    worker: str
    attempts: int
    max_retries: int
    request_id: str | None

    @property
    def key(self) -> Delivery:
        """Which attempt this is of which row."""
        return Delivery(self.id, self.delivery)


class Rescued(NamedTuple):
    """An expired row, and what becomes of it."""

    row: Expired
    status: Status
    delay: float
    """Seconds until the next attempt."""


class LateError(OutboxError):
    """The transaction of a rescue took too long; it is rolled back."""


class Rescue:
    """One relay's rescue, in two steps: a look at whose lease has passed, and a moment later the taking.

    The first step writes the rows as they are. So a row is taken only if writing was possible for the time between,
    in which a worker that lives renews its lease. Any sign that leases could not be written, or that Postgres' clock
    has jumped, puts off all taking for the time of a lease.
    """

    def __init__(self, lease: float) -> None:
        """Takes the seconds of a lease. Nothing is taken at first: what was before the start is unknown."""
        self._lease = lease
        self.settling = min(SETTLING_TIME, SETTLING_PART * lease)
        self._seen_at: dict[Delivery, float] = {}
        self._from = -math.inf
        self._looked_at = -math.inf
        self._clock_offset = (0.0, 0.0)
        """At least and at most: Postgres' clock less the monotonic one."""
        self._batch = BATCH
        self._refused: dict[Delivery, float] = {}
        """Rows whose rescue Postgres has refused, as by a trigger, and when."""

    def looked(self, postgres_time: float, began: float, interval: float) -> None:
        """Records a look at Postgres, and pauses where something was wrong since the one before.

        A look that is late: Postgres was away, or stalled, or this process was paused, and workers may not have been
        able to renew. They renew every third of a lease, so a gap of less than another third expires no lease. The same
        goes for a clock that jumped.

        Args:
            postgres_time: what it answered, in seconds since the epoch.
            began: when it was asked, by the monotonic clock.
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
        is_paused = now < self._from
        batch = 1 if is_paused else self._batch
        expired: list[Expired] = []
        try:
            with connection.transaction():
                connection.execute(query("limit_transaction_lock_wait"))
                expired = self._expired(connection, batch, now)
                taken = [] if is_paused else self._take_settled(connection, expired, now)
                if is_paused:
                    self._touch(connection, expired)
                _check_in_time(now)
        except (psycopg.Error, LateError) as error:
            if postgres.is_outage(error) or connection.closed:
                raise
            if not is_paused:
                logs.get().warning("rescue paused", why=one_line(error), seconds=self._lease)
                self._batch = max(1, len(expired) // 2)  # it may have been late because there was so much of it
            self.pause()
            return self._lease
        if taken:
            self._batch = min(BATCH, 2 * self._batch)
            connection.execute(query("notify_relays"))
        for rescued in taken:
            del self._seen_at[rescued.row.key]
            _tell(rescued)
        if len(taken) == batch:
            return 0  # a busy worker has left more
        return self.settling + _MARGIN if expired else math.inf

    def _expired(self, connection: Connection, batch: int, now: float) -> list[Expired]:
        """Returns expired rows, but for those that Postgres has refused lately: they must not keep others from it."""
        self._refused = {delivery: at for delivery, at in self._refused.items() if now - at < REFUSED_PAUSE}
        found = {
            "batch": batch,
            "impossible_lease": IMPOSSIBLE_LEASE,
            "refused": [delivery.row_id for delivery in self._refused],
        }
        return connection.cursor(row_factory=named(Expired)).execute(query("expired_leases"), found).fetchall()

    def _take_settled(self, connection: Connection, expired: list[Expired], now: float) -> list[Rescued]:
        self._seen_at = {row.key: self._seen_at.get(row.key, now) for row in expired}
        settled = [row for row in expired if now - self._seen_at[row.key] >= self.settling]
        self._touch(connection, [row for row in expired if now - self._seen_at[row.key] < self.settling])
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

        refused = write_by_halves([_decide(row) for row in settled], take)
        self._refuse([(rescued.row, error) for rescued, error in refused])
        return taken

    def _touch(self, connection: Connection, rows: list[Expired]) -> None:
        """Writes rows as they are, to see whether their workers could have."""

        def touch(some: Sequence[Expired]) -> None:
            with connection.transaction():
                connection.execute(query("touch_leases"), {"ids": [row.id for row in some]})

        self._refuse(write_by_halves(rows, touch))

    def _refuse(self, refused: list[tuple[Expired, Exception]]) -> None:
        if not refused:
            return
        self._refused |= {row.key: time.monotonic() for row, _ in refused}
        rows, (_, error) = sorted(row.id for row, _ in refused), refused[0]
        logs.get().error("rows cannot be rescued", rows=rows, error=one_line(error))


def _check_in_time(begun: float) -> None:
    if time.monotonic() - begun > LATE:
        raise LateError(f"it took longer than {LATE:.0f} s")


def _decide(row: Expired) -> Rescued:
    status = Status.DEAD if row.attempts > row.max_retries else Status.PENDING
    return Rescued(row, status, _delay(row.attempts))


def _delay(attempts: int) -> float:
    """Returns the seconds until the next attempt: none at first, as the row did no harm that anybody knows of.

    The row may be what kills its workers, and then all that run beside it go down with it: from the second time on it
    waits as after a failure, so that it and the others part company.
    """
    return retry_delay(attempts - 1) if attempts > 1 else 0.0


def _tell(rescued: Rescued) -> None:
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
