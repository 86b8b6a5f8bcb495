"""Batch sizes that adapt to time-outs."""

import psycopg
import pytest

from outbox.runtime.batches import SUCCESSES, BatchSize
from outbox.runtime.postgres import NoAnswerError


def fail(size: BatchSize, error: Exception, available: int | None = None) -> None:
    """Makes a trial that raises an error."""
    with pytest.raises(type(error)), size.trial(available):
        raise error


def succeed(size: BatchSize, available: int | None = None) -> None:
    """Makes a trial that succeeds."""
    with size.trial(available):
        pass


@pytest.mark.parametrize("error", [psycopg.errors.QueryCanceled("too long"), NoAnswerError("no answer in time")])
def test_a_time_out_halves_the_size(error: Exception) -> None:
    """The same size would time out again. `SUCCESSES` full batches double it."""
    size = BatchSize(1000)
    fail(size, error)
    assert size.rows == 500
    for _ in range(SUCCESSES - 1):
        succeed(size)
    assert size.rows == 500
    succeed(size)
    assert size.rows == 1000


@pytest.mark.parametrize("error", [psycopg.OperationalError("lost"), psycopg.errors.LockNotAvailable("locked")])
def test_other_failures_keep_the_size(error: Exception) -> None:
    """A batch of one that met a broken connection must not split the next renewal into a thousand statements."""
    size = BatchSize(1000)
    fail(size, error, available=1)
    assert size.rows == 1000


def test_small_batches_do_not_restore_the_size() -> None:
    """They prove nothing about larger ones, however many succeed."""
    size = BatchSize(1000)
    fail(size, NoAnswerError("no answer in time"))
    for _ in range(100):
        succeed(size, available=1)
    assert size.rows == 500
