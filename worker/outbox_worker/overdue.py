"""Watches for handlers that run past their time limit and do not end."""

import time

from outbox.rq_jobs import Delivery
from outbox.runtime import logs
from outbox.runtime.stop import Stop
from outbox_worker.claim import Claim
from outbox_worker.errors import OverdueError
from outbox_worker.in_flight import InFlight

CONFIRMED_AFTER = 1.0
"""Seconds that a handler must be overdue before it is logged: after a pause of this process it may be about to end."""


class OverdueWatch:
    """Tracks the rows whose handlers are overdue. Used by the main thread alone.

    A thread cannot be ended from outside, so the process must end before the next attempt at the row may begin.
    """

    def __init__(self, in_flight: InFlight, stop: Stop) -> None:
        self._in_flight = in_flight
        self._stop = stop
        self._seen_at: dict[Delivery, float] = {}
        self._logged: set[Delivery] = set()

    def look(self) -> bool:
        """Returns whether a handler is overdue: then the worker takes nothing new and lets the other handlers end.

        Raises:
            OverdueError: only overdue handlers are left.
        """
        overdue = self._in_flight.overdue()
        if not overdue:
            self._seen_at.clear()
            self._logged.clear()
            return False
        now = time.monotonic()
        self._seen_at = {claim.delivery: self._seen_at.get(claim.delivery, now) for claim in overdue}
        confirmed = [claim for claim in overdue if now - self._seen_at[claim.delivery] > CONFIRMED_AFTER]
        for claim in confirmed:
            if claim.delivery not in self._logged:
                _log(claim)
                self._logged.add(claim.delivery)
        self._in_flight.give_back_waiting()
        if confirmed and {claim.delivery for claim in self._in_flight.unended()} <= self._logged & self._seen_at.keys():
            self._stop.hurry()  # no other handler runs
            row_ids = ", ".join(str(claim.delivery.row_id) for claim in confirmed)
            raise OverdueError(f"the handlers of rows {row_ids} do not end: start another worker")
        return True


def _log(claim: Claim) -> None:
    logs.get().error(
        "attempt is overdue",
        type=claim.task,
        row=claim.delivery.row_id,
        delivery=claim.delivery.number,
        attempt=claim.attempt,
        timeout=claim.timeout,
        request_id=claim.request_id,
    )
