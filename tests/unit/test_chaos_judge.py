"""The judge of the chaos run detects every kind of failure, and accepts what is allowed."""

from dataclasses import replace

import pytest

from tests.chaos.evidence import (
    Exit,
    Fault,
    Overlap,
    SignUp,
    User,
)
from tests.chaos.judge import judge
from tests.support.chaos_evidence import failed_checks, good_run, mail, row


def test_a_good_run() -> None:
    """A good run has no failures."""
    assert judge(good_run()) == []


def test_an_orphan() -> None:
    """A user without a mail is an orphan, also if its client got no answer."""
    evidence = good_run()
    del evidence.mails[0]
    assert failed_checks(evidence) == ["orphans"]
    evidence.sign_ups[0].status = None
    assert failed_checks(evidence) == ["orphans"]


def test_a_refused_address_is_not_an_orphan() -> None:
    """A user needs no mail if its row is dead and the mail server refused its address; either alone is not enough."""
    evidence = good_run()
    del evidence.mails[0]
    evidence.rows[0] = row(1, "dead", last_error="550 no such user")
    assert failed_checks(evidence) == ["orphans", "unexplained dead"]
    evidence.refused_addresses["user_1@x"] = 100.5
    assert failed_checks(evidence) == []
    evidence.rows[0] = row(1)
    assert failed_checks(evidence) == ["orphans"]


def test_a_ghost() -> None:
    """A mail to an address of no user is a ghost."""
    evidence = good_run()
    evidence.mails.append(mail(3, 101.0, session=0))
    assert failed_checks(evidence) == ["ghosts"]


@pytest.mark.parametrize("ids", [[], [1, 3]])
def test_half_made_users(ids: list[int]) -> None:
    """A user without a row, or with two, is half-made."""
    evidence = good_run()
    evidence.rows = [row(2), *(replace(row(1), id=number) for number in ids)]
    assert failed_checks(evidence) == ["half-made"]


def test_a_row_without_its_user() -> None:
    """A row without its user is half-made."""
    evidence = good_run()
    evidence.rows.append(row(3))
    assert failed_checks(evidence) == ["half-made"]


@pytest.mark.parametrize("status", ["pending", "enqueued", "running"])
def test_an_unfinished_row(status: str) -> None:
    """A row must be done or dead at the end."""
    evidence = good_run()
    evidence.rows[0] = row(1, status)
    assert failed_checks(evidence) == ["unfinished"]


@pytest.mark.parametrize("changes", [{"message_id": "<other>"}, {"link": "https://x/other"}])
def test_copies_that_differ(changes: dict[str, str]) -> None:
    """Copies of a mail must have the same Message-ID and link, even if the second mail is excused."""
    evidence = good_run()
    evidence.mails[0].answered = None
    evidence.mails.append(mail(1, 120.0, **changes))
    assert failed_checks(evidence) == ["different copies"]


def test_a_message_id_of_two_mails() -> None:
    """The mails of two users must not share a Message-ID."""
    evidence = good_run()
    evidence.mails[1].message_id = "<1>"
    assert failed_checks(evidence) == ["different copies"]


def test_a_refused_user_that_exists() -> None:
    """A user that got 409 or 400 must not exist; after 503 or no answer it may."""
    evidence = good_run()
    for status in (409, 400):
        evidence.sign_ups[0].status = status
        assert "inconsistent clients" in failed_checks(evidence)
    for unknown in (503, None):
        evidence.sign_ups[0].status = unknown
        assert failed_checks(evidence) == []


def test_an_acknowledged_user_that_does_not_exist() -> None:
    """A user that got 201 must exist."""
    evidence = good_run()
    del evidence.users[0]
    assert "inconsistent clients" in failed_checks(evidence)


def test_a_409_for_an_unused_name() -> None:
    """A client must not get 409 if neither name nor address is taken."""
    evidence = good_run()
    evidence.sign_ups.append(SignUp("taken username", "user_9", "user_9@x", 0, 99.0, 100.0, 409))
    assert failed_checks(evidence) == ["inconsistent clients"]


def test_a_user_that_no_client_requested() -> None:
    """A user must not exist without a request."""
    evidence = good_run()
    evidence.users.append(User("user_3", "user_3@x", 99.0))
    evidence.rows.append(row(3))
    evidence.mails.append(mail(3, 101.0, session=0))
    assert failed_checks(evidence) == ["inconsistent clients"]


@pytest.mark.parametrize(("intent", "status"), [("new", 500), ("new", 400), ("invalid", 201), ("taken email", 400)])
def test_an_answer_that_does_not_fit_the_request(intent: str, status: int) -> None:
    """A client must not get an answer that does not fit its request, such as 500."""
    evidence = good_run()
    evidence.sign_ups.append(SignUp(intent, "user_9", "user_9@x", 0, 99.0, 100.0, status))
    assert "unexpected answers" in failed_checks(evidence)


def test_an_imported_user() -> None:
    """An imported user needs a mail like any other, which is due immediately."""
    evidence = good_run()
    evidence.delays = (0.5,)
    evidence.sign_ups.append(SignUp("imported", "user_3", "user_3@x", 0, 99.0, 100.0, 201))
    evidence.users.append(User("user_3", "user_3@x", 99.5))
    evidence.rows.append(row(3))
    assert failed_checks(evidence) == ["orphans"]
    evidence.mails.append(mail(3, 99.6, session=0))
    assert failed_checks(evidence) == []


def test_two_workers_send_to_one_user() -> None:
    """Two workers must not send to one user at the same time, unless one was cut off from Postgres."""
    evidence = good_run()
    evidence.overlaps.append(Overlap("user_1@x", 101.0, (0, 1)))
    assert failed_checks(evidence) == ["overlaps"]
    evidence.faults.append(Fault(0, "worker.part-from-postgres", ("postgres", "worker"), 90.0, 110.0))
    assert failed_checks(evidence) == []


def test_an_early_mail() -> None:
    """A mail must not be sent before the delay is over."""
    evidence = good_run()
    evidence.delays = (2.0,)
    assert failed_checks(evidence) == ["early mails"]


def test_a_mail_is_not_early_if_the_clock_jumped() -> None:
    """A mail may seem early if Postgres' clock jumped between sign-up and mail, and only then."""
    evidence = good_run()
    evidence.delays = (2.0,)
    evidence.faults.append(Fault(0, "postgres.clock-jump", ("mail", "postgres"), 102.0, 110.0))
    assert failed_checks(evidence) == ["early mails"]
    evidence.faults.append(Fault(1, "postgres.clock-jump", ("mail", "postgres"), 100.5, 100.8))
    assert failed_checks(evidence) == []


def test_an_unexpected_exit() -> None:
    """The failure contains the end of the process's log."""
    evidence = good_run()
    evidence.exits.append(Exit("relay-0", "relay", 100.0, 1, "", "end of the log"))
    assert [(failure.check, "end of the log" in failure.text) for failure in judge(evidence)] == [
        ("unasked exits", True)
    ]


def test_a_traceback() -> None:
    """A traceback in a log is a failure."""
    evidence = good_run()
    evidence.tracebacks.append("service-0.0.log: Traceback …")
    assert failed_checks(evidence) == ["tracebacks"]


def test_a_traceback_of_a_process_that_a_shortage_ended() -> None:
    """A traceback is allowed in the log of a process that a shortage ended, and in no other."""
    evidence = good_run()
    evidence.tracebacks.append("worker-0.0.log: Traceback … MemoryError")
    assert failed_checks(evidence) == ["tracebacks"]
    evidence.exits.append(Exit("worker-0", "worker", 100.0, 1, "worker.little-memory", log="worker-0.0.log"))
    assert failed_checks(evidence) == []
    evidence.tracebacks.append("worker-0.1.log: Traceback … MemoryError")
    assert failed_checks(evidence) == ["tracebacks"]


def test_a_fault_that_failed() -> None:
    """A fault that could not be injected, or whose target did not recover, is a failure."""
    evidence = good_run()
    evidence.faults = [Fault(0, "redis.kill", ("redis",), 10.0, 11.0, crash="Traceback …")]
    assert failed_checks(evidence) == ["failed faults"]


def test_a_pickle_that_was_loaded() -> None:
    """Code from Redis must never be loaded."""
    evidence = good_run()
    evidence.loaded_bombs = 1
    assert failed_checks(evidence) == ["hostile code"]
