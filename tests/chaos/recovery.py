"""Computes which users each fault delayed, and how long after its end the last of them got the mail."""

from collections import defaultdict
from dataclasses import dataclass, field

from tests.chaos.duplicates import copies
from tests.chaos.evidence import AWAY_WITH_BACKLOG, IMPORTED, Evidence, Fault
from tests.chaos.intervals import Span, overlaps, without

PUNCTUAL = 1.5
"""Seconds after its due time within which a mail is sent if nothing is wrong."""

DEFINITION = (
    "A user is touched by a fault if the fault occurred between the 201 and the mail, the mail was more than "
    f"{PUNCTUAL:g} s late, and the row was not just waiting for its retry or for a dead worker's lease to end. "
    "A fault of the service touches the users whose clients got no answer, or 503. "
    "Recovery is the time from a fault's end to the last mail whose delay is charged to it. If several faults delayed "
    "a mail, it is charged to the one that ended last. After a failed attempt, recovery includes the backoff of 15 s "
    "and more; after a killed worker, the lease of 15 s. Users who wait behind the backlog of a longer outage are "
    "charged to that outage only."
)

_CLIENTS = ("service",)
"""The only target whose faults cannot delay the mail of a user that was acknowledged with 201."""

_TIMEOUTS = 5.0
"""Seconds after the end of a fault in which attempts may still fail because of it, by a timeout."""


@dataclass
class Recovery:
    """The effect of one fault on users."""

    touched: set[str] = field(default_factory=set)
    """Usernames."""
    seconds: float | None = None
    """Seconds from its end to the last mail that is charged to it; None if there is none."""

    def add(self, username: str, seconds: float) -> None:
        """Charges a mail to the fault, which arrived that many seconds after its end."""
        self.touched.add(username)
        self.seconds = max(self.seconds or 0.0, seconds, 0.0)


@dataclass(frozen=True)
class _Wait:
    """A span in which a row waited for its retry, or for a dead worker's lease to end."""

    span: Span
    cause: str
    """The target whose fault caused it."""


def recoveries(evidence: Evidence) -> dict[int, Recovery]:
    """Returns the effect of each fault, by its number."""
    result: dict[int, Recovery] = {fault.number: Recovery() for fault in evidence.faults}
    first = {recipient: mails[0].accepted for recipient, mails in copies(evidence.mails).items()}
    waits = _waits(evidence)
    faults = sorted(evidence.faults, key=lambda fault: fault.start)
    holding = [fault for fault in faults if fault.targets != _CLIENTS]
    clients = [fault for fault in faults if fault.targets == _CLIENTS]
    backlogs = _backlogs(evidence, first, waits)
    for sign_up in evidence.sign_ups:
        if sign_up.status in (None, 503):
            for fault in clients:
                if overlaps((fault.start, fault.end), (sign_up.sent, sign_up.answered)):
                    result[fault.number].touched.add(sign_up.username)
        got = first.get(sign_up.email)
        if sign_up.status != 201 or got is None:
            continue
        if got < sign_up.answered + evidence.delay_of(sign_up) + PUNCTUAL:
            continue
        own = [wait for wait in waits.get(sign_up.username, ()) if wait.span[0] < got]
        behind = [fault for fault, span in backlogs if overlaps(span, (sign_up.answered, got))]
        if behind and not own:
            result[behind[-1].number].add(sign_up.username, got - behind[-1].end)
            continue
        exposed = without((sign_up.answered, got), [wait.span for wait in own])
        touching = [fault for fault in holding if any(overlaps((fault.start, fault.end), span) for span in exposed)]
        for fault in touching:
            result[fault.number].touched.add(sign_up.username)
        if charged := _charged(touching, own, got):
            result[charged.number].add(sign_up.username, got - charged.end)
    return result


def _backlogs(evidence: Evidence, first: dict[str, float], waits: dict[str, list[_Wait]]) -> list[tuple[Fault, Span]]:
    """Returns the outages with imported users, each until these had their mails; rows with a wait do not count."""
    imported = [one for one in evidence.sign_ups if one.intent == IMPORTED and one.username not in waits]
    result = []
    for fault in evidence.faults:
        if fault.kind == AWAY_WITH_BACKLOG:
            got = [first.get(one.email, 0.0) for one in imported if fault.start <= one.sent <= fault.end]
            result.append((fault, (fault.start, max(got, default=fault.end))))
    return result


def _charged(touching: list[Fault], waits: list[_Wait], got: float) -> Fault | None:
    """Returns the last fault that delayed a mail."""
    if not waits or got - waits[-1].span[1] > PUNCTUAL:
        since = waits[-1].span[1] if waits else 0.0
        held = [fault for fault in touching if fault.end >= since]
        return max(held, key=lambda fault: (fault.end <= got, fault.end), default=None)
    last = waits[-1]
    causes = [fault for fault in touching if fault.start <= last.span[0] <= fault.end + _TIMEOUTS]
    of_target = [fault for fault in causes if last.cause in fault.targets]
    return next(reversed(of_target or causes), None)


def _waits(evidence: Evidence) -> dict[str, list[_Wait]]:
    """Returns the waits of each user's row, in order."""
    usernames = {row.id: row.username for row in evidence.rows if row.username is not None}
    waits: dict[str, list[_Wait]] = defaultdict(list)
    for line in evidence.log_lines:
        if (username := usernames.get(line.get("row", 0))) is None:
            continue
        if line["event"] == "process task failed" and line["next_try"] is not None:
            cause = "postgres" if line["error"].startswith(("OperationalError", "PoolTimeout")) else "mail"
            waits[username].append(_Wait((line["at"], line["at"] + line["next_try"]), cause))
        if line["event"] == "rescued row":
            waits[username].append(_Wait((line["at"] - evidence.lease, line["at"]), "worker"))
    return waits
