"""RQ jobs of outbox rows: a job names one delivery of one row and holds nothing else."""

import re
from collections.abc import Collection
from typing import Any, NamedTuple, NoReturn, Protocol

from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.queue import Queue
from rq.serializers import JSONSerializer

from outbox.errors import OutboxError

_JOB_ID = re.compile(rb"([1-9][0-9]{0,18})-([1-9][0-9]{0,9})")

IS_JOB_ID = """
local function is_job_id(id)
    return #id <= 30 and string.match(id, '^[1-9]%d*%-[1-9]%d*$') ~= nil
end
"""
"""A Lua function for scripts that sort job ids in Redis: matches what `_JOB_ID` matches, and somewhat more.

Lua patterns cannot count digits, so only the total length is limited: 19 digits, a hyphen, 10 digits. Lua numbers are
doubles, which cannot compare an id with 2^63. The worker parses each id that it takes, and drops one that is no
delivery.
"""


class Delivery(NamedTuple):
    """One hand-over of one row: the fence that every later write names."""

    row_id: int
    number: int

    @property
    def job_id(self) -> str:
        """The id of the RQ job. RQ allows letters, digits, '_' and '-' in it."""
        return f"{self.row_id}-{self.number}"

    @classmethod
    def of(cls, row: "DeliveredRow") -> "Delivery":
        """Returns the delivery of a row as a statement has returned it."""
        return cls(row.id, row.delivery)

    @classmethod
    def parse(cls, job_id: bytes) -> "Delivery | None":
        """Parses a job id as Redis returns it; returns None for an id that no relay can have written."""
        if not (match := _JOB_ID.fullmatch(job_id)):
            return None
        row_id, number = int(match[1]), int(match[2])
        return cls(row_id, number) if row_id < 2**63 and number < 2**31 else None


class DeliveredRow(Protocol):
    """A row of a statement that returns `id` and `delivery`."""

    @property
    def id(self) -> int:
        """The row's id."""

    @property
    def delivery(self) -> int:
        """The number of its hand-over."""


def columns(deliveries: Collection[Delivery]) -> dict[str, list[int]]:
    """Returns deliveries as the two arrays that statements take: `ids` and `deliveries`."""
    return {
        "ids": [delivery.row_id for delivery in deliveries],
        "deliveries": [delivery.number for delivery in deliveries],
    }


class OutboxJob(Job):
    """An RQ job that is always serialized as JSON: rq-scheduler cannot pass a serializer."""

    def __init__(self, id: str | None = None, connection: Any = None, serializer: Any = None) -> None:  # noqa: A002, ARG002 - RQ's signature
        super().__init__(id=id, connection=connection, serializer=JSONSerializer)


def deliver(row: int, number: int) -> NoReturn:
    """The function that a job names. Our worker never calls it: it reads only the job's id.

    Raises:
        OutboxError: always. A stock `rq worker` on these queues fails here, and the sweep takes the row back.
    """
    raise OutboxError(f"row {row}, delivery {number} is for 'outbox worker': stop the plain RQ worker on this queue")


def queue_key(queue: str) -> str:
    """Returns the key of an RQ queue's list."""
    return f"{Queue.redis_queue_namespace_prefix}{queue}"


def intermediate_key(queue: str) -> str:
    """Returns the key of the list to which stock RQ workers move a queue's jobs while they pop them."""
    return IntermediateQueue.get_intermediate_queue_key(queue_key(queue))
