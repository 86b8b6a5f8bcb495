"""Taking back rows that Redis has lost: one mechanism for every way in which Redis may forget."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import redis

from outbox.queries import query
from outbox.row import named
from outbox.rq_jobs import Delivery, intermediate_key, queue_key
from outbox.runtime import logs
from outbox.runtime.batch_size import BatchSize
from outbox.runtime.halving import write_by_halves
from outbox.runtime.postgres import Connection
from outbox.runtime.redis_connection import TooLongError
from outbox.runtime.settings import RelaySettings
from outbox_relay.batches import LeftOut
from outbox_relay.repair import CANARY, drop_long_ids
from outbox_relay.schedule import SCHEDULED_JOBS

POPPING_LIMIT = 300.0
"""Seconds after its hand-over for which a job may be on a stock RQ worker's intermediate list; then that one died."""

LATENESS = 1.0
"""Seconds that a job may be scheduled after its row's time; another client may have put it off for ever."""

MOVING_LIMIT = 60.0
"""Seconds after its row's time, and its hand-over, for which a job may be scheduled: a relay that serves its queue has
moved it by then, unless another client has changed its queue."""

CLOCK_ERROR = 60.0
"""Seconds ahead at which no row can have been handed over: the server's clock was set back since."""

CLAIM_TIME = 0.25
"""Seconds between the two steps of a sweep: in that time a worker claims what it has popped."""

MAX_SWEPT = 10_000
"""Rows that are taken back in one statement."""

LEFT_OUT = 60.0
"""Seconds until a row is tried again that Postgres refuses to take back."""


class Candidate(NamedTuple):
    """A row of the statement `sweep_candidates`: handed over a while ago, and claimed by no worker."""

    id: int
    delivery: int
    queue: str
    run_at: float
    """Seconds since the epoch."""
    overdue: float
    """Seconds since `run_at`."""
    age: float
    """Seconds since it was handed over."""

    @property
    def key(self) -> Delivery:
        """Which hand-over this is of which row."""
        return Delivery(self.id, self.delivery)


class Swept(NamedTuple):
    """A row of the statement `sweep`: taken back."""

    id: int
    delivery: int
    task: str
    queue: str
    request_id: str | None


@dataclass
class Held:
    """What Redis held at one moment."""

    queued: dict[str, set[Delivery]] = field(default_factory=dict)
    """By queue: in another than its own, a job may have no worker."""
    popping: dict[str, set[Delivery]] = field(default_factory=dict)
    """On the intermediate lists."""
    scheduled: dict[Delivery, float] = field(default_factory=dict)
    """When each comes due, in seconds since the epoch."""

    def keeps(self, row: Candidate) -> bool:
        """Whether the row will be offered to a worker without our doing, as far as Redis knows."""
        if row.key in self.queued[row.queue]:
            return True
        if row.key in self.popping[row.queue] and row.age < POPPING_LIMIT:
            return True
        is_scheduled = row.key in self.scheduled and self.scheduled[row.key] <= row.run_at + LATENESS
        return is_scheduled and min(row.age, row.overdue) < MOVING_LIMIT


class Sweep:
    """One relay's sweep, in two steps: a look at what Redis holds, and a moment later the taking back.

    A job that a worker had popped at the look is claimed by the time of the second step, and left alone. Were it taken
    back all the same, the fence would settle that: the row's next delivery wins.
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
            psycopg.Error: Postgres is away, or refuses for what is no row's fault; the next look finds the rows again.
        """
        if self._missing:
            self.take_back(connection)
            return 0.0 if self._missing else None
        return CLAIM_TIME if self.look(connection) else None

    def forget(self) -> None:
        """Begins anew with a look: what the last one found was long ago."""
        self._missing = []

    def look(self, connection: Connection) -> int:
        """Finds `enqueued` rows whose job is nowhere in Redis, and returns how many there are.

        Postgres is read first and Redis after: a job that is missing then was popped, lost, or never written. Relays
        need no lock to sweep side by side: `take_back` names the delivery that was looked for, so one of them takes a
        row back and the others find it changed. Any role that may connect could hold an advisory lock for ever.
        """
        left_out = set(self._left_out.rows())
        ages = {"grace": self._settings.sweep_grace, "clock_error": CLOCK_ERROR}
        cursor = connection.cursor(row_factory=named(Candidate))
        candidates = cursor.execute(query("unclaimed_rows"), ages).fetchall()
        if not candidates:
            return 0
        # The rows' queues, not this relay's: during a deploy another may serve one that this does not know.
        queues = {row.queue for row in candidates}
        try:
            held = held_deliveries(self._client, queues)
        except TooLongError:
            drop_long_ids(self._client, _keys(queues))
            return 0
        self._missing = [row.key for row in candidates if row.id not in left_out and not held.keeps(row)]
        return len(self._missing)

    def take_back(self, connection: Connection) -> int:
        """Returns a batch of what was missing to `pending`, unless it moved since, and how many rows those were."""
        missing, self._missing = self._missing, []
        swept: list[Swept] = []
        cursor = connection.cursor(row_factory=named(Swept))

        def sweep(some: Sequence[Delivery]) -> None:
            ids, deliveries = [delivery.row_id for delivery in some], [delivery.number for delivery in some]
            swept.extend(cursor.execute(query("sweep"), {"ids": ids, "deliveries": deliveries}).fetchall())

        with self._size.trial(len(missing)) as most:
            refused = write_by_halves(missing[:most], sweep)
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
    """Returns every delivery that Redis holds, in one snapshot.

    The write that goes along makes a Redis that is read-only or out of memory fail here, as it would for a relay.

    Raises:
        TooLongError: there is an id that is too long to be read.
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
    """Returns where jobs of these queues are."""
    return [SCHEDULED_JOBS, *(key(name) for name in queues for key in (queue_key, intermediate_key))]


def _deliveries(job_ids: list[bytes]) -> set[Delivery]:
    return {delivery for job_id in job_ids if (delivery := Delivery.parse(job_id))}
