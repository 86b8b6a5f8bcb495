"""Attempts that were spent on an outage of the mail server: there must be none."""

from collections import Counter
from collections.abc import Iterator

from tests.chaos import logbook
from tests.chaos.duplicates import copies
from tests.chaos.evidence import MAIL_OUTAGES, SHORTAGES, Evidence, Fault
from tests.chaos.intervals import Span, covered, overlaps

_LIMITS = 5.0
"""Seconds after a fault in which an attempt may still fail because of it: time limits run out."""
_LONGEST = 30.0
"""Seconds that an attempt at a mail may take."""
_LAG = 0.5
"""Seconds that this process was late, within `_LIMITS`, which make its answers come too late."""


def spent_attempts(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Yields the rows of which an outage of the mail server, and nothing else that struck then, spent an attempt."""
    outages = [fault for fault in evidence.faults if fault.kind in MAIL_OUTAGES]
    if outages:
        yield from _failed(evidence, outages)
        yield from _unaccounted(evidence, outages)


def _failed(evidence: Evidence, outages: list[Fault]) -> Iterator[tuple[str, str]]:
    """A failure over a mail counts, unless another fault was there or just over: of the server, or of this worker."""
    others = [fault for fault in evidence.faults if fault not in outages]
    for line in logbook.of(evidence.lines, "process task failed"):
        at, is_late = line["at"], "took longer than" in line["error"]
        if not is_late and not line["error"].startswith("Mail"):
            continue
        targets = {"mail", "postgres", "worker"} if is_late else {"mail"}
        struck = [fault for fault in others if targets & set(fault.targets) or line["slot"] in fault.slots]
        causes = [(fault.start, fault.end) for fault in struck]
        since = at - _LIMITS - (_LONGEST if is_late else 0)
        if any(overlaps((since, at), cause) for cause in causes) or covered((since, at), evidence.lags) > _LAG:
            continue
        for outage in outages:
            if outage.start <= at <= outage.end + _LIMITS:
                yield f"row {line['row']}", f"spent an attempt on {outage.kind} at {at:.3f}: {line['error']}"


def _unaccounted(evidence: Evidence, outages: list[Fault]) -> Iterator[tuple[str, str]]:
    """All attempts of a row but the last are in the logs, as failed or as those of a worker that died."""
    told = Counter(
        line["row"] for event in ("process task failed", "rescued row") for line in logbook.of(evidence.lines, event)
    )
    last = {recipient: mails[-1].accepted for recipient, mails in copies(evidence.mails).items()}
    addresses = {user.username: user.email for user in evidence.users}
    for row in evidence.rows:
        extra = row.attempts - 1 - told[row.id]
        if extra < 1 or row.username is None:
            continue
        life = (row.created, last.get(addresses.get(row.username, ""), evidence.calm))
        met = [outage.kind for outage in outages if overlaps(life, (outage.start, outage.end))]
        if met and extra > _lost_lines(evidence, life):
            yield f"row {row.id}", f"has {row.attempts} attempts, {extra} of them unexplained but by {', '.join(met)}"


def _lost_lines(evidence: Evidence, life: Span) -> int:
    """Returns how often an attempt may have ended without a line: with its worker, or the relay that rescued it."""
    ends = sum(end.module in ("worker", "relay") and life[0] <= end.at <= life[1] for end in evidence.exits)
    short = [(fault.start, fault.end) for fault in evidence.faults if fault.kind in SHORTAGES]
    return ends + sum(overlaps(life, span) for span in short)
