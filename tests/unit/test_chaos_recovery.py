"""The chaos run charges the delay of each mail to the right fault."""

from typing import Any

from tests.chaos.evidence import (
    Fault,
    SignUp,
)
from tests.chaos.intervals import covered, without
from tests.chaos.recovery import recoveries
from tests.support.chaos_evidence import good_run, mail


def charges_for_late_mail(
    *faults: Fault, lines: list[dict[str, Any]] | None = None
) -> dict[int, tuple[int, float | None]]:
    """Returns the users and seconds charged to each fault when the first mail arrives at second 120, not 101."""
    evidence = good_run()
    evidence.mails[0].accepted = 120.0
    evidence.faults.extend(faults)
    evidence.log_lines.extend(lines or [])
    return {number: (len(recovery.touched), recovery.seconds) for number, recovery in recoveries(evidence).items()}


def test_recovery_is_charged_to_the_last_fault_that_delayed_a_mail() -> None:
    """Of two faults that touched a user, the later one is charged."""
    one = Fault(0, "redis.kill", ("redis",), 105.0, 110.0)
    two = Fault(1, "relay.kill", ("relay",), 115.0, 117.0)
    assert charges_for_late_mail(one, two) == {0: (1, None), 1: (1, 3.0)}


def test_a_fault_during_a_backoff_is_not_charged() -> None:
    """The fault that failed the attempt is charged with the wait for the retry."""
    one = Fault(0, "mail.4xx-at-rcpt", ("mail",), 99.0, 101.0)
    two = Fault(1, "relay.kill", ("relay",), 110.0, 112.0)
    line = {"event": "process task failed", "row": 1, "at": 100.5, "next_try": 19.0, "error": "MailError: 450"}
    assert charges_for_late_mail(one, two, lines=[line]) == {0: (1, 19.0), 1: (0, None)}


def test_a_wait_behind_a_backlog_is_charged_to_the_outage() -> None:
    """The outage is charged from its end, despite later faults."""
    evidence = good_run()
    evidence.faults.append(Fault(0, "mail.away-with-backlog", ("mail",), 90.0, 98.0))
    evidence.faults.append(Fault(1, "relay.kill", ("relay",), 115.0, 116.0))
    evidence.mails[0].accepted = 120.0
    evidence.sign_ups.append(SignUp("imported", "user_3", "user_3@x", 0, 91.0, 92.0, 201))
    evidence.mails.append(mail(3, 110.0, session=0))
    recovery = recoveries(evidence)
    assert (recovery[0].touched, recovery[0].seconds) == ({"user_1", "user_3"}, 22.0)
    assert (recovery[1].touched, recovery[1].seconds) == (set(), None)


def test_a_punctual_mail_is_charged_to_no_fault() -> None:
    """A mail that is on time is charged to no fault, even if one occurred."""
    evidence = good_run()
    evidence.faults.append(Fault(0, "redis.flushall", ("redis",), 100.5, 100.5))
    assert recoveries(evidence)[0].seconds is None


def test_intervals() -> None:
    """`covered` and `without` merge overlapping spans."""
    assert covered((0, 10), [(8, 20), (-5, 1), (0, 2), (3, 4)]) == 5
    assert without((0, 10), [(3, 5), (4, 6), (9, 12)]) == [(0, 3), (6, 9)]
