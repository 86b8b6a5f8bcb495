"""Claims the rows of jobs taken from Redis; repeats claims without an answer and splits those that are refused."""

from collections.abc import Iterable

import psycopg

from outbox.rq_jobs import Delivery
from outbox.runtime import logs, postgres
from outbox.runtime.postgres import Connection
from outbox.runtime.redaction import one_line
from outbox_worker.claim import Claim, claim, claim_free
from outbox_worker.in_flight import InFlight
from outbox_worker.outcome import unanswered

MAX_JOBS = 4096
"""Upper bound of jobs taken at a time; by default there is room for fewer."""

MAX_CHARACTERS = 64_000_000
"""Characters of payloads of running and waiting rows at which a worker leaves the jobs that it has put off to the
sweep."""


class Claimer:
    """Holds the jobs that are taken from Redis and claims their rows. Used by the main thread alone.

    A claim that got no answer is repeated, so that no row waits for its lease to pass.
    """

    def __init__(self, in_flight: InFlight, worker: str, lease: float) -> None:
        """Begins with no jobs.

        Args:
            in_flight: the rows that the worker holds.
            worker: the name to claim in.
            lease: seconds of a lease.
        """
        self._in_flight = in_flight
        self._worker = worker
        self._lease = lease
        self._jobs: list[Delivery] = []
        self._put_off: list[Delivery] = []
        """Jobs that the last claim left for the next one, because payloads are large."""
        self._may_have_claimed = False
        """Whether a claim of the jobs got no answer."""
        self.max_jobs = MAX_JOBS
        """Upper bound of jobs to take: the rows of the last claim if payloads are large, else doubled at each claim."""

    @property
    def has_jobs(self) -> bool:
        """Whether there are jobs to claim."""
        return bool(self._jobs)

    def add(self, jobs: Iterable[Delivery]) -> None:
        """Adds jobs taken from Redis, which may hold a job twice."""
        self._jobs += dict.fromkeys(jobs)

    def record_lost_answer(self) -> None:
        """Records that Postgres went away: the jobs may have been claimed."""
        self._may_have_claimed = bool(self._jobs)

    def give_back_unanswered(self) -> None:
        """Gives back the rows that may have been claimed. Called when the worker stops."""
        if self._may_have_claimed:
            self._give_back(self._jobs)

    def claim(self, connection: Connection) -> list[Claim]:
        """Claims a batch of the jobs.

        Raises:
            psycopg.Error: Postgres is away; the jobs are kept.
        """
        # After a lost answer, jobs are claimed one by one: the other rows may already run in this worker's name, and
        # must not wait for a row that is locked.
        batch = self._jobs[:1] if self._may_have_claimed else self._jobs.copy()
        claims = self._claim(connection, batch)
        self.max_jobs = max(1, len(claims)) if self._put_off else min(MAX_JOBS, 2 * self.max_jobs)
        del self._jobs[: len(batch)]
        if self._may_have_claimed and not claims:
            self._give_back(batch)
        self._may_have_claimed = self._may_have_claimed and bool(self._jobs)
        if self._put_off:
            self._jobs += self._claimable(claims)
        return claims

    def _claim(self, connection: Connection, jobs: list[Delivery]) -> list[Claim]:
        """Claims jobs; if Postgres refuses, claims those whose rows are not locked, in smaller batches if necessary.

        Rows that another session has locked are left to the sweep, which hands them over again.
        """
        given = (self._worker, self._lease, self._in_flight.deliveries())
        self._put_off = []
        try:
            return claim(connection, jobs, *given, put_off=self._put_off)
        except psycopg.Error as error:
            _raise_outage(connection, error)
            refusal = error
        claims: list[Claim] = []
        refused: list[tuple[Delivery, Exception]] = []
        try:
            claims, refused = claim_free(connection, jobs, *given)
        except psycopg.Error as error:
            _raise_outage(connection, error)
        if left := len(jobs) - len(claims) - len(refused):
            is_lock = isinstance(refusal, psycopg.errors.LockNotAvailable)
            event = "claim timed out waiting for a row lock" if is_lock else "claim refused"
            logs.get().warning(event, error=one_line(refusal), jobs=left)
        if refused:
            row_ids, why = sorted(delivery.row_id for delivery, _ in refused), refused[0][1]
            logs.get().error("rows cannot be claimed", rows=row_ids, error=one_line(why))
        return claims

    def _claimable(self, claims: list[Claim]) -> list[Delivery]:
        """Returns the jobs that were put off; none if the payloads in memory are too large: the sweep takes them."""
        if sum(len(held.payload) for held in [*self._in_flight.unended(), *claims]) < MAX_CHARACTERS:
            return self._put_off
        why = f"the payloads of rows that were claimed have over {MAX_CHARACTERS:,} characters"
        logs.get().warning("claim refused", error=why, jobs=len(self._put_off))
        return []

    def _give_back(self, jobs: Iterable[Delivery]) -> None:
        held = self._in_flight.deliveries()
        for delivery in jobs:
            if delivery not in held:  # else the row runs, and this is a copy of its job
                self._in_flight.put(unanswered(delivery))


def _raise_outage(connection: Connection, error: psycopg.Error) -> None:
    if postgres.loses_connection(error, connection):
        raise error
