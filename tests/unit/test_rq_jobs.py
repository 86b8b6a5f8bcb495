"""What a row is called in Redis."""

import json

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from outbox.errors import OutboxError
from outbox.rq_jobs import Delivery, OutboxJob, deliver


@given(st.integers(1, 2**63 - 1), st.integers(1, 2**31 - 1))
def test_a_job_id_names_its_delivery(row: int, number: int) -> None:
    """Every delivery that Postgres can hold is read back from its job's id."""
    delivery = Delivery(row, number)
    assert Delivery.parse(delivery.job_id.encode()) == delivery


@given(st.binary(max_size=40))
def test_what_is_read_is_what_was_written(job_id: bytes) -> None:
    """No two ids name one delivery, so that a stranger's spelling of an id cannot stand for ours."""
    delivery = Delivery.parse(job_id)
    assert delivery is None or delivery.job_id.encode() == job_id


@pytest.mark.parametrize(
    "job_id",
    [
        *(b"", b"12", b"12-", b"-3", b"0-1", b"1-0", b"01-1", b"1-01", b"1-1\n", b" 1-1", b"+1-1", b"1-1-1"),
        *("१-१".encode(), b"\xff\xfe", b"9223372036854775808-1", b"1-2147483648", b"9" * 10_000_000),
    ],
)
def test_other_ids_name_nothing(job_id: bytes) -> None:
    """What no relay has written is not a delivery, and no number that Postgres could choke on gets through."""
    assert Delivery.parse(job_id) is None


def test_a_stock_worker_fails_with_a_sentence() -> None:
    """A plain 'rq worker' on our queues does nothing but say who should run instead."""
    with pytest.raises(OutboxError, match=r"row 12, delivery 3 .* stop the plain RQ worker"):
        deliver(12, 3)


def test_a_job_is_json_whatever_its_caller_says() -> None:
    """rq-scheduler has no serializer argument; its jobs are JSON all the same."""
    job = OutboxJob.create(deliver, args=(12, 3), connection=redis.Redis(), serializer=None)
    assert json.loads(job.data) == ["outbox.rq_jobs.deliver", None, [12, 3], {}]
