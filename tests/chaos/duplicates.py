"""Finds mails that were sent twice, and whether the gap that cannot be closed explains it."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

from tests.chaos.evidence import SHORTAGES, Evidence, Fault, Mail
from tests.chaos.intervals import covered

COMPLETION_LIMIT = 2.0
"""Seconds after the acceptance of a mail, while Postgres is up, within which its row is completed: a worker that is
killed later explains no second mail."""

_CUT_MARGIN = 0.25
"""Seconds around the 250 within which the end of its connection or worker may have lost it: the mail server records
both slightly late."""

_LAG_SPAN = 2.0
"""Seconds before and after a 250 in which lag of this process counts."""
_MAX_LAG = 0.5
"""Seconds of lag in that span above which the 250 may miss the worker's time limit."""


@dataclass(frozen=True)
class Duplicate:
    """A mail that was followed by another copy."""

    mail: Mail
    following: Mail
    excuse: str
    """Why the row could not be completed after this copy; empty if nothing explains it."""
    kind: str
    """The kind of fault that caused it."""


def copies(mails: list[Mail]) -> dict[str, list[Mail]]:
    """Returns the mails of each recipient in the order of their acceptance."""
    by_recipient: dict[str, list[Mail]] = defaultdict(list)
    for mail in sorted(mails, key=lambda mail: mail.accepted):
        by_recipient[mail.recipient].append(mail)
    return dict(by_recipient)


def duplicates(evidence: Evidence) -> list[Duplicate]:
    """Returns every mail that was followed by another copy, with its excuse."""
    result = []
    for mails in copies(evidence.mails).values():
        for mail, following in pairwise(mails):
            excuse, kind = _excuse(evidence, mail)
            result.append(Duplicate(mail, following, excuse, kind))
    return result


def _excuse(evidence: Evidence, mail: Mail) -> tuple[str, str]:
    return _lost_reply(evidence, mail) or excuse_of_worker(evidence, mail.worker, mail.accepted) or ("", "")


def excuse_of_worker(evidence: Evidence, worker: int, at: float) -> tuple[str, str] | None:
    """Returns why a worker could not complete what it did at a time, and the kind of fault that caused it."""
    return _killed(evidence, worker, at) or _parted(evidence, worker, at)


def _lost_reply(evidence: Evidence, mail: Mail) -> tuple[str, str] | None:
    """Returns the excuse if the mail server accepted the mail, and its 250 did not reach the worker."""
    if mail.answered is None:
        return "the mail server accepted it and sent no reply", _kind_at(evidence, mail.accepted, "mail")
    session = evidence.sessions[mail.session]
    for cut in evidence.cuts:
        if cut.port == session.port and -_CUT_MARGIN < cut.at - mail.answered < _CUT_MARGIN and not mail.followed:
            return "the connection was cut at the 250", _kind_at(evidence, cut.at, "mail")
    if not mail.followed and covered((mail.accepted - _LAG_SPAN, mail.accepted + _LAG_SPAN), evidence.lags) > _MAX_LAG:
        return "this machine was too busy to forward the 250 in time", ""
    return None


def _killed(evidence: Evidence, worker: int, at: float) -> tuple[str, str] | None:
    """Returns the excuse if the worker was killed, or ended by a shortage, between the 250 and the completion."""
    slot = f"worker-{worker}"
    for end in evidence.exits:
        if end.slot != slot or end.cause not in ("SIGKILL", *SHORTAGES) or end.at < at - _CUT_MARGIN:
            continue
        away = [(fault.start, fault.end) for fault in evidence.faults if "postgres" in fault.targets]
        usable = end.at - at - covered((at, end.at), away)
        if usable < COMPLETION_LIMIT:
            return f"its worker ended {end.at - at:.2f} s later", _kind_at(evidence, end.at, "worker")
        return None
    return None


def _parted(evidence: Evidence, worker: int, at: float) -> tuple[str, str] | None:
    """Returns the excuse if this worker alone could not reach Postgres for longer than its lease.

    A worker that can open no connection may have renewed its leases up to a third of a lease earlier.
    """
    slot = f"worker-{worker}"
    for fault in evidence.faults:
        end = fault.end
        if fault.kind == "worker.few-descriptors" and fault.relieved - fault.start > evidence.lease * 2 / 3:
            end = fault.relieved
        elif fault.kind != "worker.part-from-postgres":
            continue
        if slot in fault.slots and fault.start - COMPLETION_LIMIT < at < end + COMPLETION_LIMIT:
            return "its worker could not reach Postgres for longer than the lease", fault.kind
    return None


def _kind_at(evidence: Evidence, at: float, target: str) -> str:
    def distance(fault: Fault) -> float:
        return max(fault.start - at, at - fault.end, 0.0)

    aimed = [fault for fault in evidence.faults if target in fault.targets]
    return min(aimed, key=distance).kind if aimed else ""
