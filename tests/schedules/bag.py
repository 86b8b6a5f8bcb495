"""Redis as the tester models it: jobs that may get lost, come twice, change places, or be put off."""

from random import Random

import redis

from outbox.rq_jobs import Delivery
from outbox_relay.publish import Published
from outbox_relay.sweep import Held
from tests.schedules.stepping import Actor, Order

QUEUES = ("critical", "default")


class Bag:
    """What Redis holds."""

    def __init__(self, repeat_rate: float) -> None:
        """Holds nothing yet.

        Args:
            repeat_rate: of hand-overs that come twice, as when a client sends them again for want of an answer.
        """
        self._repeat_rate = repeat_rate
        self.queues: dict[str, list[Delivery]] = {name: [] for name in QUEUES}
        self.scheduled: dict[Delivery, tuple[str, float]] = {}
        """Queue and time of those that are not due yet."""
        self._ever: list[tuple[str, Delivery]] = []

    def put(self, rows: list[Published], draw: Random) -> None:
        """Takes the jobs of rows that are handed over."""
        for row in rows * (2 if draw.random() < self._repeat_rate else 1):
            delivery = Delivery(row.id, row.delivery)
            self._ever.append((row.queue, delivery))
            if row.scheduled:
                self.scheduled[delivery] = (row.queue, row.run_at)
            else:
                self.queues[row.queue].append(delivery)

    def take(self, count: int, draw: Random) -> list[Delivery]:
        """Gives up to `count` jobs to a worker."""
        taken: list[Delivery] = []
        for name in draw.sample(QUEUES, len(QUEUES)):
            while self.queues[name] and len(taken) < count:
                taken.append(self.queues[name].pop(0))
        return taken

    @property
    def is_empty(self) -> bool:
        """Whether a worker would find nothing."""
        return not any(self.queues.values())

    def move_due(self, draw: Random | None) -> None:
        """Moves scheduled jobs to their queues: some by chance, or all. Whether it is too early, the claim decides."""
        for delivery, (queue, _) in list(self.scheduled.items()):
            if draw is None or draw.random() < 0.6:
                del self.scheduled[delivery]
                self.queues[queue].append(delivery)

    def reschedule(self, delivery: Delivery, run_at: float) -> None:
        """Follows a row whose time the tester has moved."""
        if delivery in self.scheduled:
            self.scheduled[delivery] = (self.scheduled[delivery][0], run_at)

    def harm(self, draw: Random) -> str:
        """Does what an unreliable Redis may do, and says what it was."""
        harms = [self._flush, self._lose, self._lose, self._repeat, self._repeat, self._shuffle, self._misplace]
        harms += [self._bring_back, self._bring_back, self._invent, self._put_off]
        harm = draw.choice(harms)
        harm(draw)
        return harm.__name__.strip("_").replace("_", " ")

    def _flush(self, _: Random) -> None:
        for jobs in self.queues.values():
            jobs.clear()
        self.scheduled.clear()

    def _some(self, draw: Random) -> tuple[list[Delivery], int] | None:
        full = [jobs for jobs in self.queues.values() if jobs]
        if not full:
            return None
        jobs = draw.choice(full)
        return jobs, draw.randrange(len(jobs))

    def _lose(self, draw: Random) -> None:
        if found := self._some(draw):
            del found[0][found[1]]
        elif self.scheduled:
            del self.scheduled[draw.choice(list(self.scheduled))]

    def _repeat(self, draw: Random) -> None:
        if found := self._some(draw):
            found[0].insert(draw.randint(0, len(found[0])), found[0][found[1]])

    def _shuffle(self, draw: Random) -> None:
        for jobs in self.queues.values():
            draw.shuffle(jobs)

    def _misplace(self, draw: Random) -> None:
        if found := self._some(draw):
            self.queues[draw.choice(QUEUES)].append(found[0].pop(found[1]))

    def _bring_back(self, draw: Random) -> None:
        for queue, delivery in draw.choices(self._ever, k=draw.randint(1, 3)) if self._ever else ():
            self.queues[queue].insert(0, delivery)

    def _invent(self, draw: Random) -> None:
        self.queues[draw.choice(QUEUES)].append(Delivery(draw.randint(1, 15), draw.randint(1, 4)))

    def _put_off(self, _: Random) -> None:
        self.scheduled = {delivery: (queue, at + 1e6) for delivery, (queue, at) in self.scheduled.items()}


class Client:
    """The bag, as one actor reaches it. Takes the place of a Redis client in the product's functions."""

    def __init__(self, bag: Bag, actor: Actor, draw: Random) -> None:
        self._bag = bag
        self._draw = draw
        self._actor = actor

    def write_jobs(self, rows: list[Published]) -> None:
        """Stands in for `outbox_relay.publish.write_jobs`: in one transaction, so all of the jobs or none."""
        order = self._actor.stop_before("write jobs")
        if order is not Order.CUT:
            self._bag.put(rows, self._draw)
        self._check(order)

    def held(self) -> Held:
        """Stands in for `outbox_relay.sweep.held_deliveries`."""
        self._check(self._actor.stop_before("read Redis"))
        return Held(
            {name: set(jobs) for name, jobs in self._bag.queues.items()},
            {name: set() for name in QUEUES},
            {delivery: at for delivery, (_, at) in self._bag.scheduled.items()},
        )

    @staticmethod
    def _check(order: Order) -> None:
        if order is not Order.GO:
            raise redis.ConnectionError("cut by the tester")
