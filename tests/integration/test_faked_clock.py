"""Postgres runs by a clock that tests can set."""

import os
import time

import psycopg
import pytest

from tests.conftest import short_folder
from tests.support.faked_clock import ClockedPostgres
from tests.support.standby import standby
from tests.support.waiting import eventually


def ahead(connection: psycopg.Connection) -> float:
    """Returns the seconds by which the server's time is ahead of ours, by the fastest of five answers."""
    answers: list[tuple[float, float]] = []
    for _ in range(5):
        begun = time.time()
        (now,) = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone() or (0,)
        answers.append((time.time() - begun, float(now) - begun))
    return min(answers)[1]


def ahead_of(url: str) -> float | None:
    """Returns the same in a new session; None while Postgres is away."""
    try:
        with psycopg.connect(url, autocommit=True) as connection:
            return ahead(connection)
    except psycopg.OperationalError:
        return None


@pytest.mark.parametrize("seconds", [3600.25, -0.75])
def test_a_jump_shows_at_once_in_every_session(clocked_postgres: ClockedPostgres, seconds: float) -> None:
    """Open and new sessions see a jump of the clock, and its return."""
    with psycopg.connect(clocked_postgres.url, autocommit=True) as opened:
        assert ahead(opened) == pytest.approx(0, abs=0.1)
        clocked_postgres.clock.set_ahead(seconds)
        assert ahead(opened) == pytest.approx(seconds, abs=0.1)
        with psycopg.connect(clocked_postgres.url, autocommit=True) as another:
            assert ahead(another) == pytest.approx(seconds, abs=0.1)
        clocked_postgres.clock.set_ahead(0)
        assert ahead(opened) == pytest.approx(0, abs=0.1)


def test_a_lock_timeout_expires_in_time_while_the_clock_is_ahead(clocked_postgres: ClockedPostgres) -> None:
    """Postgres reads the time in a signal handler, which must see the same clock."""
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
    """A restarted server keeps the faked time."""
    clocked_postgres.clock.set_ahead(60)
    clocked_postgres.server.process.terminate()
    clocked_postgres.server.process.wait(30)
    clocked_postgres.server.restart()
    assert eventually(lambda: ahead_of(clocked_postgres.url), 30, "Postgres answers") == pytest.approx(60, abs=0.1)


def test_a_standby_runs_by_the_same_clock(clocked_postgres: ClockedPostgres) -> None:
    """A standby with the clock's environment shows the faked time."""
    environment = {**os.environ, **clocked_postgres.clock.environment}
    with (
        short_folder() as folder,
        standby(folder / "copy", clocked_postgres.url, settings=["fsync=off"], environment=environment) as copy,
    ):
        clocked_postgres.clock.set_ahead(60)
        assert ahead_of(copy.url) == pytest.approx(60, abs=0.1)
