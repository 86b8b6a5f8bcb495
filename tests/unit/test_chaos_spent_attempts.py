"""The judge of the chaos run detects attempts that were spent on an outage of the mail server."""

from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.evidence import (
    Evidence,
    Exit,
    Fault,
)
from tests.support.chaos_evidence import failed_checks, good_run, row


def with_outage(kind: str = "mail.away-with-backlog") -> Evidence:
    """Returns a good run with an outage of the mail server during the life of the first row."""
    evidence = good_run()
    evidence.faults.append(Fault(0, kind, ("mail",), 99.7, 100.8))
    return evidence


def failed_line(at: float, error: str = "MailError: the connection to it broke") -> dict[str, Any]:
    """Returns the log line of a failed attempt at the first row that counts."""
    return {"event": "process task failed", "row": 1, "at": at, "next_try": 15.0, "error": error, "slot": "worker-0"}


@pytest.mark.parametrize("kind", ["mail.away-with-backlog", "mail.connection-limit"])
@pytest.mark.parametrize("error", ["MailError: it broke", "TimeLimitError: the attempt took longer than its 30 s"])
def test_an_attempt_that_failed_because_of_an_outage(kind: str, error: str) -> None:
    """A failed attempt during an outage is spent, unless another fault or lag of the run may have caused it."""
    evidence = with_outage(kind)
    evidence.log_lines.append(failed_line(100.5, error))
    evidence.rows[0] = row(1, attempts=2)
    assert failed_checks(evidence) == ["spent attempts"]
    evidence.faults.append(Fault(1, "mail.reset-at-rcpt", ("mail",), 98.0, 99.0))
    assert failed_checks(evidence) == []
    evidence.faults[1] = Fault(1, "worker.pause", ("worker",), 98.0, 99.0, slots=("worker-1",))
    assert failed_checks(evidence) == (["spent attempts"] if error.startswith("Mail") else [])
    evidence.faults[1].slots = ("worker-0",)
    assert failed_checks(evidence) == []
    evidence.faults.pop()
    evidence.lags.append((99.0, 101.0))
    assert failed_checks(evidence) == []


@pytest.mark.parametrize(("at", "error"), [(99.5, "MailError: it broke"), (100.5, "OperationalError: it broke")])
def test_an_attempt_that_failed_for_other_reasons(at: float, error: str) -> None:
    """A failure before the outage, or not of the mail, is not spent on the outage."""
    evidence = with_outage()
    evidence.log_lines.append(failed_line(at, error))
    evidence.rows[0] = row(1, attempts=2)
    assert failed_checks(evidence) == []


def test_an_unexplained_attempt() -> None:
    """Every attempt before the last needs a line of its failure or rescue; each ended process may have lost one."""
    evidence = with_outage()
    evidence.rows[0] = row(1, attempts=3)
    assert failed_checks(evidence) == ["spent attempts"]
    evidence.log_lines.append({"event": "rescued row", "row": 1, "at": 100.2})
    assert failed_checks(evidence) == ["spent attempts"]
    evidence.exits.append(Exit("worker-0", "worker", 100.1, -9, "SIGKILL"))
    assert failed_checks(evidence) == []
    evidence.rows[0] = row(1, attempts=4)
    assert failed_checks(evidence) == ["spent attempts"]
    evidence.faults[0] = replace(evidence.faults[0], start=102.0, end=103.0)
    assert failed_checks(evidence) == [], "the row did not meet the outage"
