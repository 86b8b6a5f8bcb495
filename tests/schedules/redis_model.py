"""Models Redis in memory: its jobs may be lost, repeated, moved or delayed."""

from random import Random

import redis

from outbox.rq_jobs import Delivery
from outbox_relay.publish import Published
from outbox_relay.sweep import Held
from tests.schedules.actor import Actor, Order

QUEUES = ("critical", "default")


class RedisModel:
    """The queues and rq-scheduler's set."""

    def __init__(self, repeat_rate: float) -> None:
        """Starts empty.

        Args:
            repeat_rate: share of hand-overs that are written twice, as by a client that repeats an unanswered command.
        """
        self._repeat_rate = repeat_rate
        self.queues: dict[str, list[Delivery]] = {name: [] for name in QUEUES}
        self.scheduled: dict[Delivery, tuple[str, float]] = {}
        """Queue and time of jobs that are not due yet."""
        self._all_written: list[tuple[str, Delivery]] = []

    def put(self, rows: list[Published], draw: Random) -> None:
        """Writes the jobs of rows that are handed over."""
        for row in rows * (2 if draw.random() < self._repeat_rate else 1):
            delivery = Delivery(row.id, row.delivery)
            self._all_written.append((row.queue, delivery))
            if row.scheduled:
                self.scheduled[delivery] = (row.queue, row.run_at)
            else:
                self.queues[row.queue].append(delivery)

    def take(self, count: int, draw: Random) -> list[Delivery]:
        """Pops up to `count` jobs for a worker."""
        taken: list[Delivery] = []
        for name in draw.sample(QUEUES, len(QUEUES)):
            while self.queues[name] and len(taken) < count:
                taken.append(self.queues[name].pop(0))
        return taken

    @property
    def is_empty(self) -> bool:
        """Whether all queues are empty."""
        return not any(self.queues.values())

    def move_due(self, draw: Random | None) -> None:
        """Moves some scheduled jobs to their queues, or all without `draw`; the claim checks whether they are due."""
        for delivery, (queue, _) in list(self.scheduled.items()):
            if draw is None or draw.random() < 0.6:
                del self.scheduled[delivery]
                self.queues[queue].append(delivery)

    def reschedule(self, delivery: Delivery, run_at: float) -> None:
        """Updates the time of a scheduled job, after the tester changed that of its row."""
        if delivery in self.scheduled:
            self.scheduled[delivery] = (self.scheduled[delivery][0], run_at)

    def inject_fault(self, draw: Random) -> str:
        """Injects a random fault, and returns its name."""
        faults = [self._flush, self._lose, self._lose, self._repeat, self._repeat, self._shuffle, self._misplace]
        faults += [self._bring_back, self._bring_back, self._invent, self._put_off]
        fault = draw.choice(faults)
        fault(draw)
        return fault.__name__.strip("_").replace("_", " ")

    def _flush(self, _: Random) -> None:
        for jobs in self.queues.values():
            jobs.clear()
        self.scheduled.clear()

    def _choose_job(self, draw: Random) -> tuple[list[Delivery], int] | None:
        """Returns a queue and a position in it, or None if all queues are empty."""
        full = [jobs for jobs in self.queues.values() if jobs]
        if not full:
            return None
        jobs = draw.choice(full)
        return jobs, draw.randrange(len(jobs))

    def _lose(self, draw: Random) -> None:
        if chosen := self._choose_job(draw):
            jobs, position = chosen
            del jobs[position]
        elif self.scheduled:
            del self.scheduled[draw.choice(list(self.scheduled))]

    def _repeat(self, draw: Random) -> None:
        if chosen := self._choose_job(draw):
            jobs, position = chosen
            jobs.insert(draw.randint(0, len(jobs)), jobs[position])

    def _shuffle(self, draw: Random) -> None:
        for jobs in self.queues.values():
            draw.shuffle(jobs)

    def _misplace(self, draw: Random) -> None:
        if chosen := self._choose_job(draw):
            jobs, position = chosen
            self.queues[draw.choice(QUEUES)].append(jobs.pop(position))

    def _bring_back(self, draw: Random) -> None:
        for queue, delivery in draw.choices(self._all_written, k=draw.randint(1, 3)) if self._all_written else ():
            self.queues[queue].insert(0, delivery)

    def _invent(self, draw: Random) -> None:
        self.queues[draw.choice(QUEUES)].append(Delivery(draw.randint(1, 15), draw.randint(1, 4)))

    def _put_off(self, _: Random) -> None:
        self.scheduled = {delivery: (queue, at + 1e6) for delivery, (queue, at) in self.scheduled.items()}


class RedisModelClient:
    """One actor's access to the model. Replaces the Redis client in the product's functions."""

    def __init__(self, redis_model: RedisModel, actor: Actor, draw: Random) -> None:
        self._redis = redis_model
        self._draw = draw
        self._actor = actor

    def write_jobs(self, rows: list[Published]) -> None:
        """Replaces `outbox_relay.publish.write_jobs`: writes all of the jobs or none."""
        order = self._actor.stop_before("write jobs")
        if order is not Order.CUT:
            self._redis.put(rows, self._draw)
        self._check(order)

    def held(self) -> Held:
        """Replaces `outbox_relay.sweep.held_deliveries`."""
        self._check(self._actor.stop_before("read Redis"))
        return Held(
            {name: set(jobs) for name, jobs in self._redis.queues.items()},
            {name: set() for name in QUEUES},
            {delivery: at for delivery, (_, at) in self._redis.scheduled.items()},
        )

    @staticmethod
    def _check(order: Order) -> None:
        if order is not Order.GO:
            raise redis.ConnectionError("cut by the tester")
