"""The judge of the chaos run accepts a second mail only if a fault explains it."""

import pytest

from tests.chaos.duplicates import duplicates
from tests.chaos.evidence import (
    Cut,
    Exit,
    Fault,
)
from tests.support.chaos_evidence import failed_checks, good_run, mail


def test_an_unexplained_duplicate() -> None:
    """A second mail without a fault is a failure."""
    evidence = good_run()
    evidence.mails.append(mail(1, 120.0))
    assert failed_checks(evidence) == ["unexplained duplicates"]


def test_a_duplicate_because_the_250_was_not_sent() -> None:
    """A second mail is excused if the mail server accepted the first and hung."""
    evidence = good_run()
    evidence.mails[0].answered = None
    evidence.mails.append(mail(1, 120.0))
    evidence.faults.append(Fault(0, "mail.take-and-hang", ("mail",), 100.5, 101.5))
    assert failed_checks(evidence) == []
    assert [duplicate.kind for duplicate in duplicates(evidence)] == ["mail.take-and-hang"]


@pytest.mark.parametrize(
    ("at", "port", "followed", "checks"),
    [
        (101.1, 5001, False, []),
        (101.1, 5001, True, ["unexplained duplicates"]),
        (101.1, 5002, False, ["unexplained duplicates"]),
        (103.0, 5001, False, ["unexplained duplicates"]),
    ],
    ids=["at the 250", "the 250 was read", "another connection", "too late"],
)
def test_a_duplicate_because_the_connection_was_cut(at: float, port: int, followed: bool, checks: list[str]) -> None:  # noqa: FBT001
    """A second mail is excused if the first's own connection was cut at the 250, before the worker read it."""
    evidence = good_run()
    evidence.mails[0].followed = followed
    evidence.cuts.append(Cut(port, at))
    evidence.mails.append(mail(1, 120.0))
    assert failed_checks(evidence) == checks


@pytest.mark.parametrize(
    ("at", "slot", "cause", "checks"),
    [
        (102.5, "worker-0", "SIGKILL", []),
        (103.5, "worker-0", "SIGKILL", ["unexplained duplicates"]),
        (100.9, "worker-0", "SIGKILL", []),
        (100.5, "worker-0", "SIGKILL", ["unexplained duplicates"]),
        (102.5, "worker-1", "SIGKILL", ["unexplained duplicates"]),
    ],
    ids=["before completion", "long after completion", "just before the 250", "too early", "another worker"],
)
def test_a_duplicate_because_the_worker_was_killed(at: float, slot: str, cause: str, checks: list[str]) -> None:
    """A second mail is excused if the worker that sent the first was killed before it can have completed the row."""
    evidence = good_run()
    evidence.exits.append(Exit(slot, "worker", at, -9, cause))
    evidence.mails.append(mail(1, 120.0))
    assert failed_checks(evidence) == checks


@pytest.mark.parametrize("kind", ["worker.little-memory", "worker.few-descriptors"])
@pytest.mark.parametrize(
    ("at", "slot", "checks"),
    [
        (102.5, "worker-0", []),
        (103.5, "worker-0", ["unexplained duplicates"]),
        (102.5, "worker-1", ["unexplained duplicates"]),
    ],
    ids=["before completion", "long after completion", "another worker"],
)
def test_a_duplicate_because_a_shortage_ended_the_worker(kind: str, at: float, slot: str, checks: list[str]) -> None:
    """A shortage excuses a second mail like a kill if it ended the worker; the shortage alone does not."""
    evidence = good_run()
    evidence.faults.append(Fault(0, kind, ("worker",), 100.5, 108.0, slots=(slot,), relieved=106.0))
    evidence.mails.append(mail(1, 120.0))
    assert failed_checks(evidence) == ["unexplained duplicates"]
    evidence.exits.append(Exit(slot, "worker", at, 1, kind))
    assert failed_checks(evidence) == checks


@pytest.mark.parametrize(
    ("relieved", "accepted", "slot", "checks"),
    [
        (112.0, 101.0, "worker-0", []),
        (108.0, 101.0, "worker-0", ["unexplained duplicates"]),
        (112.0, 115.0, "worker-0", ["unexplained duplicates"]),
        (112.0, 101.0, "worker-1", ["unexplained duplicates"]),
    ],
    ids=["beyond the lease", "too short", "after the shortage", "another worker"],
)
def test_a_duplicate_because_the_worker_could_not_connect(
    relieved: float, accepted: float, slot: str, checks: list[str]
) -> None:
    """A second mail is excused if its worker could open no connection to Postgres until its lease may have passed."""
    evidence = good_run()
    kind = "worker.few-descriptors"
    evidence.faults.append(Fault(0, kind, ("worker",), 100.5, 118.0, slots=(slot,), relieved=relieved))
    evidence.mails[0].accepted = evidence.mails[0].answered = accepted
    evidence.mails.append(mail(1, 120.0))
    assert failed_checks(evidence) == checks


def test_a_duplicate_because_the_worker_was_cut_off_from_postgres() -> None:
    """A second mail is excused if its worker alone could not reach Postgres; an outage for all is no excuse."""
    evidence = good_run()
    evidence.mails.append(mail(1, 120.0))
    evidence.faults.append(Fault(0, "postgres.pause", ("postgres",), 100.5, 119.0))
    assert failed_checks(evidence) == ["unexplained duplicates"]
    cut_off = Fault(1, "worker.part-from-postgres", ("postgres", "worker"), 100.5, 118.0, slots=("worker-0",))
    evidence.faults.append(cut_off)
    assert failed_checks(evidence) == []
    cut_off.slots = ("worker-1",)
    assert failed_checks(evidence) == ["unexplained duplicates"]


@pytest.mark.parametrize("kind", ["postgres.lock-table", "postgres.clock-jump"])
def test_a_locked_table_or_a_clock_jump_excuses_no_duplicate(kind: str) -> None:
    """A second mail is not excused while its worker is alive and reaches Postgres."""
    evidence = good_run()
    evidence.mails.append(mail(1, 120.0))
    evidence.faults.append(Fault(0, kind, ("mail", "postgres"), 100.5, 119.0))
    assert failed_checks(evidence) == ["unexplained duplicates"]


def test_a_killed_worker_could_not_complete_while_postgres_was_away() -> None:
    """Time without Postgres does not count towards the limit for the completion."""
    evidence = good_run()
    evidence.exits.append(Exit("worker-0", "worker", 110.0, -9, "SIGKILL"))
    evidence.mails.append(mail(1, 130.0))
    assert failed_checks(evidence) == ["unexplained duplicates"]
    evidence.faults.append(Fault(0, "postgres.stop", ("postgres",), 101.5, 109.5))
    assert failed_checks(evidence) == []
