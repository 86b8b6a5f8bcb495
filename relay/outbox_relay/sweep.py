"""Takes back rows whose job Redis has lost, in whatever way it was lost."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import redis

from outbox.queries import query
from outbox.row import named
from outbox.rq_jobs import Delivery, columns, intermediate_key, queue_key
from outbox.runtime import logs
from outbox.runtime.batches import BatchSize, write_bisecting
from outbox.runtime.postgres import Connection
from outbox.runtime.redis_connection import TooLongError
from outbox.runtime.settings import RelaySettings
from outbox_relay.batches import LeftOut
from outbox_relay.repair import CANARY, drop_long_ids
from outbox_relay.schedule import SCHEDULED_JOBS

POPPING_LIMIT = 300.0
"""Seconds after the hand-over in which a job may be on a stock RQ worker's intermediate list; later, it died."""

LATENESS = 1.0
"""Seconds after its row's `run_at` that a job may be scheduled for: another client may have postponed it for years."""

MOVING_LIMIT = 60.0
"""Seconds after the row's `run_at`, and after its hand-over, in which a job may still be scheduled. A relay that serves
its queue has moved it by then, unless another client has changed its queue."""

CLOCK_ERROR = 60.0
"""Seconds ahead at which no row can have been handed over: if one was, the server's clock was set back."""

CLAIM_TIME = 0.25
"""Seconds between the two steps of a sweep, in which a worker claims the jobs that it has popped."""

MAX_SWEPT = 10_000
"""Upper bound of rows that one statement takes back."""

LEFT_OUT = 60.0
"""Seconds until the next try to take back a row that Postgres has refused."""


class Unclaimed(NamedTuple):
    """A row of the statement `unclaimed_rows`."""

    id: int
    delivery: int
    queue: str
    run_at: float
    """Seconds since the epoch."""
    overdue: float
    """Seconds since `run_at`."""
    age: float
    """Seconds since it was handed over."""


class Swept(NamedTuple):
    """A row of the statement `sweep`."""

    id: int
    delivery: int
    task: str
    queue: str
    request_id: str | None


@dataclass
class Held:
    """A snapshot of the jobs that Redis holds."""

    queued: dict[str, set[Delivery]] = field(default_factory=dict)
    """By queue: a job in another queue than its row's may have no worker."""
    popping: dict[str, set[Delivery]] = field(default_factory=dict)
    """On the intermediate lists, by queue."""
    scheduled: dict[Delivery, float] = field(default_factory=dict)
    """When each is due, in seconds since the epoch."""

    def keeps(self, row: Unclaimed) -> bool:
        """Returns whether Redis will offer the row to a worker."""
        delivery = Delivery.of(row)
        if delivery in self.queued[row.queue]:
            return True
        if delivery in self.popping[row.queue] and row.age < POPPING_LIMIT:
            return True
        is_scheduled = delivery in self.scheduled and self.scheduled[delivery] <= row.run_at + LATENESS
        return is_scheduled and min(row.age, row.overdue) < MOVING_LIMIT


class Sweep:
    """One relay's sweep, in two steps: it finds rows whose job is missing, and `CLAIM_TIME` later takes them back.

    A job that a worker had popped before the first step is claimed by the second, and the row is left alone. If it were
    taken back, the fence would decide: the row's next delivery wins.
    """

    def __init__(self, client: redis.Redis, settings: RelaySettings) -> None:
        self._client = client
        self._settings = settings
        self._missing: list[Delivery] = []
        self._size = BatchSize(MAX_SWEPT)
        self._left_out = LeftOut[int]("rows cannot be swept", LEFT_OUT)

    def step(self, connection: Connection) -> float | None:
        """Does one of the two steps; returns the seconds until the next, or None if both are done.

        Raises:
            redis.RedisError: Redis could not be read completely, or takes no writes; nothing is swept.
            psycopg.Error: Postgres is away, or refuses for a reason that is not in the rows; the next sweep finds them.
        """
        if self._missing:
            self.take_back(connection)
            return 0.0 if self._missing else None
        return CLAIM_TIME if self.look(connection) else None

    def forget(self) -> None:
        """Forgets what the first step found, because it was long ago."""
        self._missing = []

    def look(self, connection: Connection) -> int:
        """Finds `enqueued` rows whose job is nowhere in Redis, and returns their number.

        Postgres is read before Redis, so a missing job was popped, lost, or never written. Relays need no lock to sweep
        side by side: `take_back` names the delivery that was missing, so one of them takes the row back and the others
        find it changed. An advisory lock could be held by any role that may connect.
        """
        left_out = set(self._left_out.rows())
        ages = {"grace": self._settings.sweep_grace, "clock_error": CLOCK_ERROR}
        cursor = connection.cursor(row_factory=named(Unclaimed))
        candidates = cursor.execute(query("unclaimed_rows"), ages).fetchall()
        if not candidates:
            return 0
        # The rows' queues, not this relay's: during a deploy another relay may serve queues that are not ours.
        queues = {row.queue for row in candidates}
        try:
            held = held_deliveries(self._client, queues)
        except TooLongError:
            drop_long_ids(self._client, _keys(queues))
            return 0
        self._missing = [Delivery.of(row) for row in candidates if row.id not in left_out and not held.keeps(row)]
        return len(self._missing)

    def take_back(self, connection: Connection) -> int:
        """Returns a batch of missing rows to `pending`, except those that have changed since; returns their number."""
        missing, self._missing = self._missing, []
        swept: list[Swept] = []
        cursor = connection.cursor(row_factory=named(Swept))

        def sweep(some: Sequence[Delivery]) -> None:
            swept.extend(cursor.execute(query("sweep"), columns(some)).fetchall())

        with self._size.trial(len(missing)) as most:
            refused = write_bisecting(missing[:most], sweep)
        self._missing = missing[most:]
        if refused:
            self._left_out.add([delivery.row_id for delivery, _ in refused], refused[0][1])
        if swept:
            connection.execute(query("notify_relays"))
        log = logs.get()
        for row in swept:
            log.warning(
                "swept row",
                type=row.task,
                queue=row.queue,
                row=row.id,
                delivery=row.delivery,
                request_id=row.request_id,
            )
        return len(swept)


def held_deliveries(client: redis.Redis, queues: Collection[str]) -> Held:
    """Returns all deliveries that Redis holds, in one snapshot.

    It also writes the canary, so that a Redis that is read-only or out of memory fails here.

    Raises:
        TooLongError: an id is too long to be read.
        redis.RedisError: Redis is away, or could not be read completely.
    """
    scheduled_jobs, *lists_of_queues = _keys(queues)
    pipeline = client.pipeline(transaction=True)
    pipeline.set(CANARY, 1, ex=60)
    pipeline.zrange(scheduled_jobs, 0, -1, withscores=True)
    for key in lists_of_queues:
        pipeline.lrange(key, 0, -1)
    _, scheduled, *lists = pipeline.execute()
    held = Held(scheduled={delivery: score for job_id, score in scheduled if (delivery := Delivery.parse(job_id))})
    for name, queued, popping in zip(queues, lists[::2], lists[1::2], strict=True):
        held.queued[name] = _deliveries(queued)
        held.popping[name] = _deliveries(popping)
    return held


def _keys(queues: Collection[str]) -> list[str]:
    """Returns the keys under which jobs of these queues are."""
    return [SCHEDULED_JOBS, *(key(name) for name in queues for key in (queue_key, intermediate_key))]


def _deliveries(job_ids: list[bytes]) -> set[Delivery]:
    return {delivery for job_id in job_ids if (delivery := Delivery.parse(job_id))}
