"""How many rows one statement takes, after some that took too long."""

import psycopg
import pytest

from outbox.runtime.batch_size import SUCCESSES, BatchSize
from outbox.runtime.postgres import NoAnswerError


def fail(size: BatchSize, error: Exception, wanted: int | None = None) -> None:
    """Makes a trial that ends with an error."""
    with pytest.raises(type(error)), size.trial(wanted):
        raise error


def succeed(size: BatchSize, wanted: int | None = None) -> None:
    """Makes a trial that ends well."""
    with size.trial(wanted):
        pass


@pytest.mark.parametrize("error", [psycopg.errors.QueryCanceled("too long"), NoAnswerError("no answer in time")])
def test_half_as_many_after_a_statement_that_took_too_long(error: Exception) -> None:
    """It would take as long again. Twice as many are tried after some that did not."""
    size = BatchSize(1000)
    fail(size, error)
    assert size.rows == 500
    for _ in range(SUCCESSES - 1):
        succeed(size)
    assert size.rows == 500
    succeed(size)
    assert size.rows == 1000


@pytest.mark.parametrize("error", [psycopg.OperationalError("lost"), psycopg.errors.LockNotAvailable("locked")])
def test_what_fails_for_another_reason_says_nothing_of_the_size(error: Exception) -> None:
    """One row that was to be written when the connection broke must not make the next renewal a thousand statements."""
    size = BatchSize(1000)
    fail(size, error, wanted=1)
    assert size.rows == 1000


def test_small_statements_prove_nothing_of_larger_ones() -> None:
    """However many of them there are."""
    size = BatchSize(1000)
    fail(size, NoAnswerError("no answer in time"))
    for _ in range(100):
        succeed(size, wanted=1)
    assert size.rows == 500
