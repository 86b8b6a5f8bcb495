"""The relay's duties, each as an actor of its own: relays hand over, sweep and rescue side by side."""

from random import Random
from typing import Any

import redis

from outbox.runtime.postgres import AWAY, Connection
from outbox_relay import publish, rescue, retention, sweep
from outbox_relay.look import find_work
from tests.schedules.bag import QUEUES, Client
from tests.schedules.setting import Setting
from tests.schedules.stepping import END_OF_TRANSACTION, TURN, Actor

LEASE = 30.0
"""Seconds."""


class Duty(Actor):
    """A duty of a relay, with a connection of its own that is opened anew when it is lost."""

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting.arrived, setting.note)
        self.setting = setting
        self.draw = Random(f"{setting.seed} {name}")

    def work(self) -> None:
        """Does its duty again and again."""
        self.begin()
        while True:
            connection = self.setting.stage.connect(self)
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
                self.away()

    def begin(self) -> None:
        """Is where the process starts."""

    def turn(self, connection: Connection) -> None:
        """Does it once."""
        raise NotImplementedError

    def away(self) -> None:
        """Is called when the connection is lost."""

    @property
    def client(self) -> Any:
        """Redis, as the product's functions take it."""
        return Client(self.setting.bag, self, self.draw)


class Relay(Duty):
    """Hands rows over."""

    def turn(self, connection: Connection) -> None:
        """Does it once."""
        for queue in QUEUES if self.setting.is_fair else [self.draw.choice(self.setting.queues)]:
            publish.publish(connection, self.client, queue, self.setting.relay_settings)


class Sweep(Duty):
    """Takes back what Redis has lost."""

    def begin(self) -> None:
        """Is where the process starts."""
        self._sweep = sweep.Sweep(self.client, self.setting.relay_settings)

    def turn(self, connection: Connection) -> None:
        """Does it once."""
        if not self._sweep._missing:
            self._sweep.look(connection)
            self.setting.books.looked_for.setdefault(self.name, set()).update(self._sweep._missing)
        else:
            self._sweep.take_back(connection)

    def away(self) -> None:
        """Is called when the connection is lost."""
        self.begin()


class Rescue(Duty):
    """Takes rows from workers that died; looks first, as the relay's loop does."""

    passes = Duty.passes | {"find_work"}

    def begin(self) -> None:
        """Is where the process starts."""
        if self not in self.setting.rescues:
            self.setting.rescues.append(self)
        self._rescue = rescue.Rescue(LEASE)

    def turn(self, connection: Connection) -> None:
        """Does it once."""
        self._let_time_pass()
        work = find_work(connection, self.setting.relay_settings)
        now = self.setting.clock.monotonic()
        self._rescue.follow(connection, now, now, is_expired=work.expired)

    def _let_time_pass(self) -> None:
        """Lets about the time pass between two looks, as the relay's loop does; mostly not in others' transactions."""
        if self.setting.is_fair:
            return
        others = [duty for duty in self.setting.rescues if duty is not self]
        if all(duty.gate == TURN for duty in others) or self.draw.random() < 0.1:
            self.setting.clock.now += self.draw.choice([0.0, 1.1, 2.1, 2.1, 4.0])

    def away(self) -> None:
        """Is called when the connection is lost."""
        self._rescue.pause()


class Retention(Duty):
    """Deletes old rows that are done."""

    passes = Duty.passes | {"delete_rows", END_OF_TRANSACTION}  # it has all rows locked by then

    def begin(self) -> None:
        """Is where the process starts."""
        self._retention = retention.Retention(self.setting.relay_settings)

    def turn(self, connection: Connection) -> None:
        """Does it once."""
        self._retention.delete(connection)
