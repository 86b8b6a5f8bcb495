"""Mails that went out twice, and whether the one window that cannot be closed explains it."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

from tests.chaos.evidence import SHORTAGES, Evidence, Fault, Mail
from tests.chaos.intervals import covered

MARKING_LIMIT = 2.0
"""Seconds after a mail's acceptance, with Postgres there, by which its row is marked: a worker that is killed later
explains no second mail."""

_CUT_MARGIN = 0.25
"""Seconds around the 250 in which the end of its connection or of its worker may have lost it: the mail server
takes note of either a moment late."""

_LATE = 2.0
_LAG = 0.5
"""Seconds of the `_LATE` before and after a 250 that make it too late for the worker's time limit."""


@dataclass(frozen=True)
class Duplicate:
    """A copy that was followed by another one."""

    mail: Mail
    following: Mail
    excuse: str
    """Why the row could not be marked after this copy; empty where nothing explains it."""
    kind: str
    """The kind of fault that did it."""


def copies(mails: list[Mail]) -> dict[str, list[Mail]]:
    """Returns each recipient's mails in the order of their acceptance."""
    by_recipient: dict[str, list[Mail]] = defaultdict(list)
    for mail in sorted(mails, key=lambda mail: mail.accepted):
        by_recipient[mail.recipient].append(mail)
    return dict(by_recipient)


def duplicates(evidence: Evidence) -> list[Duplicate]:
    """Returns every copy that was followed by another, with its excuse."""
    found = []
    for mails in copies(evidence.mails).values():
        for mail, following in pairwise(mails):
            excuse, kind = _excuse(evidence, mail)
            found.append(Duplicate(mail, following, excuse, kind))
    return found


def _excuse(evidence: Evidence, mail: Mail) -> tuple[str, str]:
    return _lost_reply(evidence, mail) or excuse_of_worker(evidence, mail.worker, mail.accepted) or ("", "")


def excuse_of_worker(evidence: Evidence, worker: int, at: float) -> tuple[str, str] | None:
    """Returns why a worker could not mark what it had done at some time, and the kind of fault that did it."""
    return _killed(evidence, worker, at) or _parted(evidence, worker, at)


def _lost_reply(evidence: Evidence, mail: Mail) -> tuple[str, str] | None:
    """The server took the mail, and its 250 did not reach the worker."""
    if mail.answered is None:
        return "the mail server took it and did not say so", _kind_at(evidence, mail.accepted, "mail")
    session = evidence.sessions[mail.session]
    for cut in evidence.cuts:
        if cut.port == session.port and -_CUT_MARGIN < cut.at - mail.answered < _CUT_MARGIN and not mail.followed:
            return "the connection was cut at the 250", _kind_at(evidence, cut.at, "mail")
    if not mail.followed and covered((mail.accepted - _LATE, mail.accepted + _LATE), evidence.lags) > _LAG:
        return "this machine was too busy to pass the 250 on in time", ""
    return None


def _killed(evidence: Evidence, worker: int, at: float) -> tuple[str, str] | None:
    """The worker was killed, or ended by a shortage, between the 250 and the mark."""
    slot = f"worker-{worker}"
    for end in evidence.exits:
        if end.slot != slot or end.cause not in ("SIGKILL", *SHORTAGES) or end.at < at - _CUT_MARGIN:
            continue
        away = [(fault.start, fault.end) for fault in evidence.faults if "postgres" in fault.targets]
        lived = end.at - at - covered((at, end.at), away)
        if lived < MARKING_LIMIT:
            return f"its worker ended {end.at - at:.2f} s later", _kind_at(evidence, end.at, "worker")
        return None
    return None


def _parted(evidence: Evidence, worker: int, at: float) -> tuple[str, str] | None:
    """The worker alone could not reach Postgres for longer than its lease: to all others it was dead.

    One that can open no connection may have renewed its leases a third of their length before that.
    """
    slot = f"worker-{worker}"
    for fault in evidence.faults:
        end = fault.end
        if fault.kind == "worker.few-descriptors" and fault.relieved - fault.start > evidence.lease * 2 / 3:
            end = fault.relieved
        elif fault.kind != "worker.part-from-postgres":
            continue
        if slot in fault.slots and fault.start - MARKING_LIMIT < at < end + MARKING_LIMIT:
            return "its worker was parted from Postgres for longer than the lease", fault.kind
    return None


def _kind_at(evidence: Evidence, at: float, target: str) -> str:
    def distance(fault: Fault) -> float:
        return max(fault.start - at, at - fault.end, 0.0)

    aimed = [fault for fault in evidence.faults if target in fault.targets]
    return min(aimed, key=distance).kind if aimed else ""
