"""Defines the relay's duties as separate actors: hand-over, sweep, rescue and retention run side by side."""

from random import Random
from typing import Any

import redis

from outbox.runtime.postgres import AWAY, Connection
from outbox_relay import publish, rescue, retention, sweep
from outbox_relay.look import find_work
from tests.schedules.actor import END_OF_TRANSACTION, TURN, Actor
from tests.schedules.redis_model import QUEUES, RedisModelClient
from tests.schedules.shared_state import SharedState

LEASE = 30.0
"""Seconds."""


class Duty(Actor):
    """An actor with one connection, which it reopens when it is lost."""

    def __init__(self, name: str, state: SharedState) -> None:
        super().__init__(name, state.arrived, state.note)
        self.state = state
        self.draw = Random(f"{state.seed} {name}")

    def work(self) -> None:
        """Takes turns on one connection after another."""
        self.begin()
        while True:
            connection = self.state.database.connect(self)
            try:
                while not connection.closed:
                    self._carried = None
                    self.stop_before(TURN)
                    try:
                        self.turn(connection)
                    except redis.RedisError:
                        self.note(self.name, "  Redis is away")
            except AWAY as error:
                self.note(self.name, f"  {type(error).__name__}: {error}")
                self.on_connection_lost()

    def begin(self) -> None:
        """Called when the process starts."""

    def turn(self, connection: Connection) -> None:
        """Performs the duty once."""
        raise NotImplementedError

    def on_connection_lost(self) -> None:
        """Called when the connection is lost."""

    @property
    def client(self) -> Any:
        """A client of the modelled Redis for the product's functions."""
        return RedisModelClient(self.state.redis, self, self.draw)


class Relay(Duty):
    """Hands rows over."""

    def turn(self, connection: Connection) -> None:
        """Hands over one batch, in the fair phase one per queue."""
        for queue in QUEUES if self.state.is_fair else [self.draw.choice(self.state.queues)]:
            publish.publish(connection, self.client, queue, self.state.relay_settings)


class Sweep(Duty):
    """Takes back what Redis has lost."""

    def begin(self) -> None:
        """Starts a new sweep."""
        self._sweep = sweep.Sweep(self.client, self.state.relay_settings)

    def turn(self, connection: Connection) -> None:
        """Looks for lost jobs, or takes back what the last look missed."""
        if not self._sweep._missing:
            self._sweep.look(connection)
            self.state.records.found_missing.setdefault(self.name, set()).update(self._sweep._missing)
        else:
            self._sweep.take_back(connection)

    def on_connection_lost(self) -> None:
        """Starts a new sweep, as after a crash."""
        self.begin()


class Rescue(Duty):
    """Takes back rows of workers that died; looks first, as the relay's loop does."""

    ungated = Duty.ungated | {"find_work"}

    def begin(self) -> None:
        """Starts a new rescue."""
        if self not in self.state.rescues:
            self.state.rescues.append(self)
        self._rescue = rescue.Rescue(LEASE)

    def turn(self, connection: Connection) -> None:
        """Looks for expired leases, and takes one step if there are any."""
        self._let_time_pass()
        work = find_work(connection, self.state.relay_settings)
        now = self.state.clock.monotonic()
        self._rescue.follow(connection, now, now, is_expired=work.expired)

    def _let_time_pass(self) -> None:
        """Advances the clock as between two looks of the relay's loop, rarely during another rescue's transaction."""
        if self.state.is_fair:
            return
        others = [duty for duty in self.state.rescues if duty is not self]
        if all(duty.gate == TURN for duty in others) or self.draw.random() < 0.1:
            self.state.clock.now += self.draw.choice([0.0, 1.1, 2.1, 2.1, 4.0])

    def on_connection_lost(self) -> None:
        """Pauses the rescue, as the relay does."""
        self._rescue.pause()


class Retention(Duty):
    """Deletes old done rows."""

    ungated = Duty.ungated | {"delete_rows", END_OF_TRANSACTION}  # by then it has locked all rows

    def begin(self) -> None:
        """Starts a new retention."""
        self._retention = retention.Retention(self.state.relay_settings)

    def turn(self, connection: Connection) -> None:
        """Deletes one batch."""
        self._retention.delete(connection)
