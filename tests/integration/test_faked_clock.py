"""The clock that other tests set: what Postgres sees of it."""

import os
import time

import psycopg
import pytest

from tests.conftest import short_folder
from tests.support.faked_clock import ClockedPostgres
from tests.support.standby import standby
from tests.support.waiting import eventually


def ahead(connection: psycopg.Connection) -> float:
    """Returns the seconds by which the server's time is ahead of ours, by the quickest of a few answers."""
    looks: list[tuple[float, float]] = []
    for _ in range(5):
        begun = time.time()
        (now,) = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone() or (0,)
        looks.append((time.time() - begun, float(now) - begun))
    return min(looks)[1]


def ahead_of(url: str) -> float | None:
    """Returns the same by a session of its own; None while Postgres is away."""
    try:
        with psycopg.connect(url, autocommit=True) as connection:
            return ahead(connection)
    except psycopg.OperationalError:
        return None


@pytest.mark.parametrize("seconds", [3600.25, -0.75])
def test_a_jump_shows_at_once_in_every_session(clocked_postgres: ClockedPostgres, seconds: float) -> None:
    """In one that is open and in a new one, there and back."""
    with psycopg.connect(clocked_postgres.url, autocommit=True) as opened:
        assert ahead(opened) == pytest.approx(0, abs=0.1)
        clocked_postgres.clock.set_ahead(seconds)
        assert ahead(opened) == pytest.approx(seconds, abs=0.1)
        with psycopg.connect(clocked_postgres.url, autocommit=True) as another:
            assert ahead(another) == pytest.approx(seconds, abs=0.1)
        clocked_postgres.clock.set_ahead(0)
        assert ahead(opened) == pytest.approx(0, abs=0.1)


def test_a_lock_timeout_expires_in_time_while_the_clock_is_ahead(clocked_postgres: ClockedPostgres) -> None:
    """Postgres asks for the time in a signal handler, which must see the same clock."""
    with (
        psycopg.connect(clocked_postgres.url) as holder,
        psycopg.connect(clocked_postgres.url, autocommit=True) as waiting,
    ):
        clocked_postgres.clock.set_ahead(3600)
        holder.execute("LOCK TABLE outbox")
        waiting.execute("SET lock_timeout = '200ms'")
        begun = time.monotonic()
        with pytest.raises(psycopg.errors.LockNotAvailable):
            waiting.execute("SELECT FROM outbox")
        assert time.monotonic() - begun < 5


def test_a_restart_keeps_the_clock(clocked_postgres: ClockedPostgres) -> None:
    """It is the machine's, not the process'."""
    clocked_postgres.clock.set_ahead(60)
    clocked_postgres.server.process.terminate()
    clocked_postgres.server.process.wait(30)
    clocked_postgres.server.restart()
    assert eventually(lambda: ahead_of(clocked_postgres.url), 30, "Postgres answers") == pytest.approx(60, abs=0.1)


def test_a_standby_runs_by_the_same_clock(clocked_postgres: ClockedPostgres) -> None:
    """What it shows of its own is what the primary does."""
    environment = {**os.environ, **clocked_postgres.clock.environment}
    with (
        short_folder() as folder,
        standby(folder / "copy", clocked_postgres.url, settings=["fsync=off"], environment=environment) as copy,
    ):
        clocked_postgres.clock.set_ahead(60)
        assert ahead_of(copy.url) == pytest.approx(60, abs=0.1)
