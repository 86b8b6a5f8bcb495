"""The judge of the chaos run detects lost jobs, lost foreign jobs, and large rows that did not run exactly once."""

from dataclasses import replace

from tests.chaos.evidence import (
    Exit,
    Fault,
    ForeignJob,
    HandlerRun,
)
from tests.support.chaos_evidence import failed_checks, good_run, row


def test_a_job_lost_without_a_fault() -> None:
    """A swept row is a failure unless a fault may have lost its job shortly before."""
    evidence = good_run()
    evidence.log_lines.append({"event": "swept row", "row": 1, "at": 110.0})
    evidence.faults.append(Fault(0, "mail.cut", ("mail",), 109.0, 109.0))
    assert failed_checks(evidence) == ["lost jobs"]
    evidence.faults.append(Fault(1, "redis.flushall", ("redis",), 107.5, 107.5))
    assert failed_checks(evidence) == []


def test_a_lost_job_may_be_noticed_late_while_relays_are_away() -> None:
    """A loss may be noticed later if the relays, which sweep, were affected by a fault."""
    evidence = good_run()
    evidence.log_lines.append({"event": "swept row", "row": 1, "at": 120.0})
    evidence.faults.append(Fault(0, "redis.flushall", ("redis",), 107.5, 107.5))
    assert failed_checks(evidence) == ["lost jobs"]
    evidence.faults.append(Fault(1, "relay.pause", ("relay",), 107.0, 118.0))
    assert failed_checks(evidence) == []


def test_a_lost_job_may_be_noticed_late_after_a_clock_jump() -> None:
    """A loss may be noticed later if Postgres' clock was ahead at that delivery's hand-over."""
    evidence = good_run()
    evidence.log_lines.append({"event": "enqueued task", "row": 1, "delivery": 1, "at": 100.7})
    evidence.log_lines.append({"event": "swept row", "row": 1, "delivery": 1, "at": 140.0})
    assert failed_checks(evidence) == ["lost jobs"]
    evidence.faults.append(Fault(0, "postgres.clock-jump", ("mail", "postgres"), 100.5, 110.0))
    assert failed_checks(evidence) == []
    evidence.log_lines.append({"event": "swept row", "row": 1, "delivery": 2, "at": 150.0})
    assert failed_checks(evidence) == ["lost jobs"]


def test_a_lost_foreign_job() -> None:
    """A foreign job must keep its place and its hash, unless a fault deleted Redis' data since it was written."""
    evidence = good_run()
    places = ("rq:queue:app", "outbox:foreign:rq:queue:app")
    evidence.foreign_jobs.append(ForeignJob("x", places, 100.0, [(105.0, places[0], True), (200.0, places[1], True)]))
    assert failed_checks(evidence) == []
    for lost in ((200.0, "", True), (200.0, places[0], False)):
        evidence.foreign_jobs[0].sightings[1] = lost
        evidence.faults = [
            Fault(0, "redis.silence", ("redis",), 110.0, 130.0),
            Fault(1, "worker.kill", ("worker",), 110, 111),
        ]
        assert failed_checks(evidence) == ["lost foreign jobs"]
        evidence.faults.append(Fault(2, "redis.flushall", ("redis",), 110.0, 110.0))
        assert failed_checks(evidence) == []
        evidence.faults[2] = replace(evidence.faults[2], start=90.0, end=91.0)
        assert failed_checks(evidence) == ["lost foreign jobs"]


def test_a_foreign_job_in_the_hands_of_a_worker() -> None:
    """A foreign job in a queue with the name of ours may be lost with a worker, until it is put aside."""
    evidence = good_run()
    places = ("rq:queue:default", "outbox:foreign:rq:queue:default")
    evidence.foreign_jobs.append(ForeignJob("x", places, 100.0, [(105.0, places[0], True), (200.0, "", True)]))
    assert failed_checks(evidence) == ["lost foreign jobs"]
    evidence.faults.append(Fault(0, "worker.kill", ("worker",), 110.0, 111.0))
    assert failed_checks(evidence) == []
    evidence.foreign_jobs[0].sightings[0] = (105.0, places[1], True)
    assert failed_checks(evidence) == ["lost foreign jobs"]


def test_a_large_row_that_is_lost_or_never_ran() -> None:
    """A large row must exist and have run; it belongs to no user."""
    evidence = good_run()
    evidence.large_rows.append(3)
    assert failed_checks(evidence) == ["large rows"]
    evidence.rows.append(replace(row(3), username=None, task="take_large_payload"))
    assert failed_checks(evidence) == ["large rows"]
    evidence.handler_runs.append(HandlerRun(3, 0, 101.0))
    assert failed_checks(evidence) == []
    evidence.rows[-1] = replace(evidence.rows[-1], status="dead")
    assert failed_checks(evidence) == ["unexplained dead"]


def test_a_large_row_that_ran_twice() -> None:
    """A large row may run twice only if its worker could not complete it."""
    evidence = good_run()
    evidence.rows.append(replace(row(3), username=None, task="take_large_payload"))
    evidence.handler_runs += [HandlerRun(3, 0, 101.0), HandlerRun(3, 1, 120.0)]
    assert failed_checks(evidence) == ["large rows"]
    evidence.exits.append(Exit("worker-0", "worker", 102.5, -9, "SIGKILL"))
    assert failed_checks(evidence) == []
