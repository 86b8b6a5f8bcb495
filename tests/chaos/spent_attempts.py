"""Finds attempts that were spent on an outage of the mail server: there must be none."""

from collections import Counter
from collections.abc import Iterator

from tests.chaos import process_logs
from tests.chaos.duplicates import copies
from tests.chaos.evidence import MAIL_OUTAGES, SHORTAGES, Evidence, Fault
from tests.chaos.intervals import Span, covered, overlaps

_TIMEOUTS = 5.0
"""Seconds after a fault in which attempts may still fail because of it, by a timeout."""
_TIME_LIMIT = 30.0
"""Seconds that an attempt to send a mail may take."""
_MAX_LAG = 0.5
"""Seconds of lag of this process before a failure above which its answers may have been too late."""


def spent_attempts(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Yields the rows that spent an attempt on an outage of the mail server, and on no other fault."""
    outages = [fault for fault in evidence.faults if fault.kind in MAIL_OUTAGES]
    if outages:
        yield from _failed(evidence, outages)
        yield from _unaccounted(evidence, outages)


def _failed(evidence: Evidence, outages: list[Fault]) -> Iterator[tuple[str, str]]:
    """Yields failed attempts to send a mail during an outage, unless another fault may have caused them."""
    others = [fault for fault in evidence.faults if fault not in outages]
    for line in process_logs.lines_of(evidence.log_lines, "process task failed"):
        at, is_late = line["at"], "took longer than" in line["error"]
        if not is_late and not line["error"].startswith("Mail"):
            continue
        targets = {"mail", "postgres", "worker"} if is_late else {"mail"}
        possible = [fault for fault in others if targets & set(fault.targets) or line["slot"] in fault.slots]
        causes = [(fault.start, fault.end) for fault in possible]
        since = at - _TIMEOUTS - (_TIME_LIMIT if is_late else 0)
        if any(overlaps((since, at), cause) for cause in causes) or covered((since, at), evidence.lags) > _MAX_LAG:
            continue
        for outage in outages:
            if outage.start <= at <= outage.end + _TIMEOUTS:
                yield f"row {line['row']}", f"spent an attempt on {outage.kind} at {at:.3f}: {line['error']}"


def _unaccounted(evidence: Evidence, outages: list[Fault]) -> Iterator[tuple[str, str]]:
    """Yields the rows with attempts, before the last, that no log line explains: neither a failure nor a rescue."""
    logged = Counter(
        line["row"]
        for event in ("process task failed", "rescued row")
        for line in process_logs.lines_of(evidence.log_lines, event)
    )
    last = {recipient: mails[-1].accepted for recipient, mails in copies(evidence.mails).items()}
    addresses = {user.username: user.email for user in evidence.users}
    for row in evidence.rows:
        extra = row.attempts - 1 - logged[row.id]
        if extra < 1 or row.username is None:
            continue
        life = (row.created, last.get(addresses.get(row.username, ""), evidence.faults_over_at))
        met = [outage.kind for outage in outages if overlaps(life, (outage.start, outage.end))]
        if met and extra > _lost_lines(evidence, life):
            yield f"row {row.id}", f"has {row.attempts} attempts, {extra} explained by nothing but {', '.join(met)}"


def _lost_lines(evidence: Evidence, life: Span) -> int:
    """Returns how many log lines may be missing: lost by a worker, or by the relay that rescued the row."""
    exits = sum(end.module in ("worker", "relay") and life[0] <= end.at <= life[1] for end in evidence.exits)
    shortages = [(fault.start, fault.end) for fault in evidence.faults if fault.kind in SHORTAGES]
    return exits + sum(overlaps(life, span) for span in shortages)
