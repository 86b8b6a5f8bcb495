"""Jobs of another application in our Redis database: where they are kept, and how they are logged."""

from outbox.runtime import logs

MAX_KEPT = 100_000
"""Upper bound of foreign jobs kept aside per key: some 10 MB, at 36 bytes per id."""

REMEDY = (
    "let no other application use this Redis database: give this service one of its own (REDIS_URL);"
    " docs/deploy.md, under 'Redis', says how to give the jobs back"
)


def aside_key(key: str) -> str:
    """Returns the key that keeps foreign jobs found under one of RQ's keys."""
    return f"outbox:foreign:{key}"


class ForeignJobs:
    """Logs foreign jobs: once per process and key, with the remedy.

    A job is foreign if its id does not have our form and RQ has a hash for it. An id without a hash is no job for RQ
    either, and is dropped.
    """

    def __init__(self) -> None:
        self._logged: set[tuple[str, str]] = set()

    def log_put_aside(self, job: bytes, key: str) -> None:
        """Logs that a job was moved out of `key` and is kept."""
        self._log_once("foreign job put aside", job, key, kept_in=aside_key(key))

    def log_left_alone(self, job: bytes, key: str) -> None:
        """Logs that a job stays under `key`."""
        self._log_once("foreign job left alone", job, key)

    def _log_once(self, event: str, job: bytes, key: str, **fields: str) -> None:
        if (event, key) not in self._logged:
            self._logged.add((event, key))
            logs.get().error(event, job=repr(job), key=key, **fields, remedy=REMEDY)

    @staticmethod
    def log_dropped(job: bytes, *, is_job: bool, key: str) -> None:
        """Logs that a job could not be kept, or that an id was no job."""
        why = f"{aside_key(key)} is full" if is_job else "this is not the id of one of our jobs"
        logs.get().warning("dropped job", job=repr(job), why=why)
