"""Whom each fault held up, and how long after its end the last of them got the mail."""

from collections import defaultdict
from dataclasses import dataclass, field

from tests.chaos.duplicates import copies
from tests.chaos.evidence import AWAY_WITH_BACKLOG, IMPORTED, Evidence, Fault
from tests.chaos.intervals import Span, overlaps, without

PUNCTUAL = 1.5
"""Seconds after it is due by which a mail goes out when nothing is wrong."""

DEFINITION = (
    "A user is touched by a fault if the fault struck between the 201 and the mail, the mail was more than "
    f"{PUNCTUAL:g} s late, and the row was not just waiting for its retry or for a dead worker's lease to end. "
    "A fault of the service touches those who got no answer, or 503. "
    "Recovery is from a fault's end to the last mail whose lateness is charged to it: of all that held a mail up, the "
    "one that was over last is charged. After a failed attempt that includes the backoff of 15 s and more, after a "
    "killed worker the lease of 15 s. Who waits behind the backlog of a longer outage is charged to that outage alone."
)

_CLIENTS = ("service",)
"""The only target of faults that cannot hold up the mail of a user who has been told 201."""

_LIMITS = 5.0
"""Seconds after a fault's end in which an attempt may still fail because of it: time limits run out."""


@dataclass
class Recovery:
    """What one fault did to users."""

    touched: set[str] = field(default_factory=set)
    """Usernames."""
    seconds: float | None = None
    """From its end to the last mail that is charged to it; None where there is none."""

    def add(self, username: str, seconds: float) -> None:
        """Charges a mail to it that came so long after its end."""
        self.touched.add(username)
        self.seconds = max(self.seconds or 0.0, seconds, 0.0)


@dataclass(frozen=True)
class _Wait:
    """What a row had to wait for: its retry, or the end of a dead worker's lease."""

    span: Span
    cause: str
    """The target whose fault made it wait."""


def recoveries(evidence: Evidence) -> dict[int, Recovery]:
    """Returns for each fault, by its number, what it did."""
    found: dict[int, Recovery] = {fault.number: Recovery() for fault in evidence.faults}
    first = {recipient: mails[0].accepted for recipient, mails in copies(evidence.mails).items()}
    waits = _waits(evidence)
    faults = sorted(evidence.faults, key=lambda fault: fault.start)
    holding = [fault for fault in faults if fault.targets != _CLIENTS]
    clients = [fault for fault in faults if fault.targets == _CLIENTS]
    backlogs = _backlogs(evidence, first, waits)
    for attempt in evidence.attempts:
        if attempt.status in (None, 503):
            for fault in clients:
                if overlaps((fault.start, fault.end), (attempt.sent, attempt.answered)):
                    found[fault.number].touched.add(attempt.username)
        got = first.get(attempt.email)
        if attempt.status != 201 or got is None:
            continue
        if got < attempt.answered + evidence.delay_of(attempt) + PUNCTUAL:
            continue
        own = [wait for wait in waits.get(attempt.username, ()) if wait.span[0] < got]
        behind = [fault for fault, span in backlogs if overlaps(span, (attempt.answered, got))]
        if behind and not own:
            found[behind[-1].number].add(attempt.username, got - behind[-1].end)
            continue
        exposed = without((attempt.answered, got), [wait.span for wait in own])
        touching = [fault for fault in holding if any(overlaps((fault.start, fault.end), span) for span in exposed)]
        for fault in touching:
            found[fault.number].touched.add(attempt.username)
        if charged := _charged(touching, own, got):
            found[charged.number].add(attempt.username, got - charged.end)
    return found


def _backlogs(evidence: Evidence, first: dict[str, float], waits: dict[str, list[_Wait]]) -> list[tuple[Fault, Span]]:
    """Returns the outages in which users were imported, each until these had their mails, but for rows of a wait."""
    imported = [one for one in evidence.attempts if one.intent == IMPORTED and one.username not in waits]
    found = []
    for fault in evidence.faults:
        if fault.kind == AWAY_WITH_BACKLOG:
            got = [first.get(one.email, 0.0) for one in imported if fault.start <= one.sent <= fault.end]
            found.append((fault, (fault.start, max(got, default=fault.end))))
    return found


def _charged(touching: list[Fault], waits: list[_Wait], got: float) -> Fault | None:
    """Returns the fault that held a mail up last."""
    if not waits or got - waits[-1].span[1] > PUNCTUAL:
        since = waits[-1].span[1] if waits else 0.0
        held = [fault for fault in touching if fault.end >= since]
        return max(held, key=lambda fault: (fault.end <= got, fault.end), default=None)
    last = waits[-1]
    struck = [fault for fault in touching if fault.start <= last.span[0] <= fault.end + _LIMITS]
    aimed = [fault for fault in struck if last.cause in fault.targets]
    return next(reversed(aimed or struck), None)


def _waits(evidence: Evidence) -> dict[str, list[_Wait]]:
    """Returns by username when a row waited, in order."""
    usernames = {row.id: row.username for row in evidence.rows if row.username is not None}
    waits: dict[str, list[_Wait]] = defaultdict(list)
    for line in evidence.lines:
        if (username := usernames.get(line.get("row", 0))) is None:
            continue
        if line["event"] == "process task failed" and line["next_try"] is not None:
            cause = "postgres" if line["error"].startswith(("OperationalError", "PoolTimeout")) else "mail"
            waits[username].append(_Wait((line["at"], line["at"] + line["next_try"]), cause))
        if line["event"] == "rescued row":
            waits[username].append(_Wait((line["at"] - evidence.lease, line["at"]), "worker"))
    return waits
