"""The RQ jobs of outbox rows."""

import json

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from outbox.errors import OutboxError
from outbox.rq_jobs import IS_JOB_ID, Delivery, OutboxJob, deliver

OTHER_IDS = [
    *(b"", b"12", b"12-", b"-3", b"0-1", b"1-0", b"01-1", b"1-01", b"1-1\n", b" 1-1", b"+1-1", b"1-1-1"),
    *("१-१".encode(), b"\xff\xfe", b"9" * 10_000_000),
]
LARGE_NUMBERS = [b"9223372036854775808-1", b"1-2147483648"]


@given(st.integers(1, 2**63 - 1), st.integers(1, 2**31 - 1))
def test_a_job_id_names_its_delivery(row_id: int, number: int) -> None:
    """Every delivery that Postgres can hold is parsed from its job id."""
    delivery = Delivery(row_id, number)
    assert Delivery.parse(delivery.job_id.encode()) == delivery


@given(st.binary(max_size=40))
def test_a_delivery_has_one_job_id(job_id: bytes) -> None:
    """A foreign spelling of an id cannot stand for ours."""
    delivery = Delivery.parse(job_id)
    assert delivery is None or delivery.job_id.encode() == job_id


@pytest.mark.parametrize("job_id", [*OTHER_IDS, *LARGE_NUMBERS])
def test_other_ids_are_no_delivery(job_id: bytes) -> None:
    """An id that no relay can have written is refused, as is a number that Postgres cannot hold."""
    assert Delivery.parse(job_id) is None


def test_redis_recognizes_the_same_ids(redis_client: redis.Redis) -> None:
    """The scripts accept every job id and refuse the same other ids; only numbers that are too large pass."""
    longest = Delivery(2**63 - 1, 2**31 - 1).job_id.encode()

    def is_job_id(job_id: bytes) -> bool:
        return bool(redis_client.eval(IS_JOB_ID + "return is_job_id(ARGV[1])", 0, job_id))

    assert all(map(is_job_id, [b"1-1", b"20-300", longest, *LARGE_NUMBERS]))
    assert not any(map(is_job_id, OTHER_IDS))


def test_a_stock_worker_fails_with_a_sentence() -> None:
    """A plain 'rq worker' on our queues runs nothing and names the command to use instead."""
    with pytest.raises(OutboxError, match=r"row 12, delivery 3 .* stop the plain RQ worker"):
        deliver(12, 3)


def test_a_job_is_always_json() -> None:
    """rq-scheduler cannot pass a serializer; its jobs are JSON anyway."""
    job = OutboxJob.create(deliver, args=(12, 3), connection=redis.Redis(), serializer=None)
    assert json.loads(job.data) == ["outbox.rq_jobs.deliver", None, [12, 3], {}]
