"""Jobs of another application in our Redis database: what becomes of them, and what the log says."""

from outbox.runtime import logs

KEPT = 100_000
"""Foreign jobs that are kept aside per key at most: at 36 bytes of an id, some 10 MB."""

REMEDY = (
    "let no other application use this Redis database: give this service one of its own (REDIS_URL);"
    " docs/deploy.md, under 'Redis', says how to give the jobs back"
)


def aside_key(key: str) -> str:
    """Returns where the foreign jobs are kept that were found under one of RQ's keys."""
    return f"outbox:foreign:{key}"


class ForeignJobs:
    """Logs foreign jobs: once per process and key, with the remedy.

    A job is foreign if its id is not of our form and a hash of its own shows that it is a job of RQ's. An id without
    such a hash means nothing to RQ either, and is dropped.
    """

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def put_aside(self, job: bytes, key: str) -> None:
        """Tells that a job was taken out of `key` and is kept."""
        self._tell("foreign job put aside", job, key, kept_in=aside_key(key))

    def left_alone(self, job: bytes, key: str) -> None:
        """Tells that a job stays where it is."""
        self._tell("foreign job left alone", job, key)

    def _tell(self, event: str, job: bytes, key: str, **fields: str) -> None:
        if (event, key) not in self._told:
            self._told.add((event, key))
            logs.get().error(event, job=repr(job), key=key, **fields, remedy=REMEDY)

    @staticmethod
    def dropped(job: bytes, *, is_job: bool, key: str) -> None:
        """Tells that a job could not be kept, or an id was no job at all."""
        why = f"{aside_key(key)} is full" if is_job else "no job of ours has this id"
        logs.get().warning("dropped job", job=repr(job), why=why)
