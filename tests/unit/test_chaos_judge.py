"""The judge of the chaos run: each of its checks can fail, and passes where it should."""

from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.duplicates import duplicates
from tests.chaos.evidence import (
    Cut,
    Evidence,
    Exit,
    Fault,
    ForeignJob,
    HandlerRun,
    Mail,
    Overlap,
    Row,
    Session,
    SignUp,
    User,
)
from tests.chaos.intervals import covered, without
from tests.chaos.judge import judge
from tests.chaos.recovery import recoveries


def evidence() -> Evidence:
    """What a good run with two users leaves: both told 201 at second 100, both with a mail at second 101."""
    made = Evidence(seed=1, delays=(0.0,), lease=15.0)
    for number in (1, 2):
        name = f"user_{number}"
        made.sign_ups.append(SignUp("new", name, f"{name}@x", 0, 99.0, 100.0, 201))
        made.users.append(User(name, f"{name}@x", 99.5))
        made.rows.append(row(number))
        made.sessions.append(Session(number - 1, 0, 5000 + number, 90.0))
        made.mails.append(mail(number, 101.0))
    return made


def row(number: int, status: str = "done", **changes: Any) -> Row:
    """A user's row."""
    fields: dict[str, Any] = {"attempts": 1, "delivery": 1, "max_retries": 10, "last_error": None, "created": 99.5}
    return Row(id=number, username=f"user_{number}", status=status, **{**fields, **changes})


def mail(number: int, accepted: float, **changes: Any) -> Mail:
    """A mail to a user, on the session of the same number."""
    fields: dict[str, Any] = {
        "message_id": f"<{number}>",
        "link": f"https://x/{number}",
        "worker": 0,
        "session": number - 1,
        "answered": accepted,
        "followed": True,
    }
    return Mail(recipient=f"user_{number}@x", accepted=accepted, **{**fields, **changes})


def failed(made: Evidence) -> list[str]:
    """Returns the names of the checks that fail."""
    return sorted({failure.check for failure in judge(made)})


def test_a_good_run() -> None:
    """Nothing is wrong with it."""
    assert judge(evidence()) == []


def test_an_orphan() -> None:
    """A user that was told 201 and has no mail; one that exists without having been told is no better."""
    made = evidence()
    del made.mails[0]
    assert failed(made) == ["orphans"]
    made.sign_ups[0].status = None
    assert failed(made) == ["orphans"]


def test_an_address_that_is_refused_is_no_orphan() -> None:
    """Its row is dead, and the mail server says why; dead alone, or refused alone, is not enough."""
    made = evidence()
    del made.mails[0]
    made.rows[0] = row(1, "dead", last_error="550 no such user")
    assert failed(made) == ["orphans", "unexplained dead"]
    made.refused_addresses["user_1@x"] = 100.5
    assert failed(made) == []
    made.rows[0] = row(1)
    assert failed(made) == ["orphans"]


def test_a_ghost() -> None:
    """A mail to somebody who is no user."""
    made = evidence()
    made.mails.append(mail(3, 101.0, session=0))
    assert failed(made) == ["ghosts"]


@pytest.mark.parametrize("ids", [[], [1, 3]])
def test_half_made_users(ids: list[int]) -> None:
    """A user without a row, or with two."""
    made = evidence()
    made.rows = [row(2), *(replace(row(1), id=number) for number in ids)]
    assert failed(made) == ["half-made"]


def test_a_row_without_its_user() -> None:
    """It was committed without what it belongs to."""
    made = evidence()
    made.rows.append(row(3))
    assert failed(made) == ["half-made"]


@pytest.mark.parametrize("status", ["pending", "enqueued", "running"])
def test_an_unfinished_row(status: str) -> None:
    """Neither done nor dead in the end."""
    made = evidence()
    made.rows[0] = row(1, status)
    assert failed(made) == ["unfinished"]


def test_an_unexplained_duplicate() -> None:
    """Two mails, and nothing had happened."""
    made = evidence()
    made.mails.append(mail(1, 120.0))
    assert failed(made) == ["unexplained duplicates"]


def test_a_duplicate_because_the_250_was_kept_back() -> None:
    """The mail server took the mail and hung."""
    made = evidence()
    made.mails[0].answered = None
    made.mails.append(mail(1, 120.0))
    made.faults.append(Fault(0, "mail.take-and-hang", ("mail",), 100.5, 101.5))
    assert failed(made) == []
    assert [duplicate.kind for duplicate in duplicates(made)] == ["mail.take-and-hang"]


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
    """Its own connection, at the 250, and the worker had not read it."""
    made = evidence()
    made.mails[0].followed = followed
    made.cuts.append(Cut(port, at))
    made.mails.append(mail(1, 120.0))
    assert failed(made) == checks


@pytest.mark.parametrize(
    ("at", "slot", "cause", "checks"),
    [
        (102.5, "worker-0", "SIGKILL", []),
        (103.5, "worker-0", "SIGKILL", ["unexplained duplicates"]),
        (100.9, "worker-0", "SIGKILL", []),
        (100.5, "worker-0", "SIGKILL", ["unexplained duplicates"]),
        (102.5, "worker-1", "SIGKILL", ["unexplained duplicates"]),
    ],
    ids=["in the window", "long after the mark", "while the mail server decides", "before", "another worker"],
)
def test_a_duplicate_because_the_worker_was_killed(at: float, slot: str, cause: str, checks: list[str]) -> None:
    """The worker that sent it, before it can have marked the row."""
    made = evidence()
    made.exits.append(Exit(slot, "worker", at, -9, cause))
    made.mails.append(mail(1, 120.0))
    assert failed(made) == checks


@pytest.mark.parametrize("kind", ["worker.little-memory", "worker.few-descriptors"])
@pytest.mark.parametrize(
    ("at", "slot", "checks"),
    [
        (102.5, "worker-0", []),
        (103.5, "worker-0", ["unexplained duplicates"]),
        (102.5, "worker-1", ["unexplained duplicates"]),
    ],
    ids=["in the window", "long after the mark", "another worker"],
)
def test_a_duplicate_because_a_shortage_ended_the_worker(kind: str, at: float, slot: str, checks: list[str]) -> None:
    """As if it had been killed; the shortage alone is no excuse."""
    made = evidence()
    made.faults.append(Fault(0, kind, ("worker",), 100.5, 108.0, slots=(slot,), relieved=106.0))
    made.mails.append(mail(1, 120.0))
    assert failed(made) == ["unexplained duplicates"]
    made.exits.append(Exit(slot, "worker", at, 1, kind))
    assert failed(made) == checks


@pytest.mark.parametrize(
    ("relieved", "accepted", "slot", "checks"),
    [
        (112.0, 101.0, "worker-0", []),
        (108.0, 101.0, "worker-0", ["unexplained duplicates"]),
        (112.0, 115.0, "worker-0", ["unexplained duplicates"]),
        (112.0, 101.0, "worker-1", ["unexplained duplicates"]),
    ],
    ids=["beyond the lease", "too short", "after the relief", "another worker"],
)
def test_a_duplicate_because_the_worker_could_not_connect(
    relieved: float, accepted: float, slot: str, checks: list[str]
) -> None:
    """A worker that can open no connection to Postgres for as long as a lease may last is as good as parted from it."""
    made = evidence()
    kind = "worker.few-descriptors"
    made.faults.append(Fault(0, kind, ("worker",), 100.5, 118.0, slots=(slot,), relieved=relieved))
    made.mails[0].accepted = made.mails[0].answered = accepted
    made.mails.append(mail(1, 120.0))
    assert failed(made) == checks


@pytest.mark.parametrize("kind", ["postgres.lock-table", "postgres.clock-jump"])
def test_neither_a_locked_table_nor_a_clock_excuses_a_duplicate(kind: str) -> None:
    """The worker lives and reaches Postgres."""
    made = evidence()
    made.mails.append(mail(1, 120.0))
    made.faults.append(Fault(0, kind, ("mail", "postgres"), 100.5, 119.0))
    assert failed(made) == ["unexplained duplicates"]


def test_a_killed_worker_could_not_mark_while_postgres_was_away() -> None:
    """That time does not count."""
    made = evidence()
    made.exits.append(Exit("worker-0", "worker", 110.0, -9, "SIGKILL"))
    made.mails.append(mail(1, 130.0))
    assert failed(made) == ["unexplained duplicates"]
    made.faults.append(Fault(0, "postgres.stop", ("postgres",), 101.5, 109.5))
    assert failed(made) == []


def test_a_duplicate_because_the_worker_was_parted_from_postgres() -> None:
    """It alone, and for longer than the lease; Postgres being away for all is no excuse."""
    made = evidence()
    made.mails.append(mail(1, 120.0))
    made.faults.append(Fault(0, "postgres.pause", ("postgres",), 100.5, 119.0))
    assert failed(made) == ["unexplained duplicates"]
    parted = Fault(1, "worker.part-from-postgres", ("postgres", "worker"), 100.5, 118.0, slots=("worker-0",))
    made.faults.append(parted)
    assert failed(made) == []
    parted.slots = ("worker-1",)
    assert failed(made) == ["unexplained duplicates"]


@pytest.mark.parametrize("changes", [{"message_id": "<other>"}, {"link": "https://x/other"}])
def test_copies_that_differ(changes: dict[str, str]) -> None:
    """An excused copy still has to be the same mail."""
    made = evidence()
    made.mails[0].answered = None
    made.mails.append(mail(1, 120.0, **changes))
    assert failed(made) == ["different copies"]


def test_a_message_id_of_two_mails() -> None:
    """No two users' mails may share one."""
    made = evidence()
    made.mails[1].message_id = "<1>"
    assert failed(made) == ["different copies"]


def test_a_client_that_was_refused_and_is_there() -> None:
    """409 and 400 leave nothing behind; no answer and 503 may or may not."""
    made = evidence()
    for status in (409, 400):
        made.sign_ups[0].status = status
        assert "inconsistent clients" in failed(made)
    for unknown in (503, None):
        made.sign_ups[0].status = unknown
        assert failed(made) == []


def test_a_client_that_was_told_of_a_user_who_is_not_there() -> None:
    """201 is a promise."""
    made = evidence()
    del made.users[0]
    assert "inconsistent clients" in failed(made)


def test_a_409_for_what_nobody_has() -> None:
    """A client that is refused without cause can never succeed."""
    made = evidence()
    made.sign_ups.append(SignUp("taken username", "user_9", "user_9@x", 0, 99.0, 100.0, 409))
    assert failed(made) == ["inconsistent clients"]


def test_a_user_that_nobody_asked_for() -> None:
    """The database holds what the clients did, and no more."""
    made = evidence()
    made.users.append(User("user_3", "user_3@x", 99.0))
    made.rows.append(row(3))
    made.mails.append(mail(3, 101.0, session=0))
    assert failed(made) == ["inconsistent clients"]


@pytest.mark.parametrize(("intent", "status"), [("new", 500), ("new", 400), ("invalid", 201), ("taken email", 400)])
def test_an_answer_that_does_not_fit_the_request(intent: str, status: int) -> None:
    """Such as a 500."""
    made = evidence()
    made.sign_ups.append(SignUp(intent, "user_9", "user_9@x", 0, 99.0, 100.0, status))
    assert "unexpected answers" in failed(made)


def test_a_process_that_ended_by_itself() -> None:
    """Its log's end is in the failure."""
    made = evidence()
    made.exits.append(Exit("relay-0", "relay", 100.0, 1, "", "what it said"))
    assert [(failure.check, "what it said" in failure.text) for failure in judge(made)] == [("unasked exits", True)]


def test_a_traceback_of_a_process_that_a_shortage_ended() -> None:
    """It says why; one of a process that lives on, or that ended by itself, is a failure."""
    made = evidence()
    made.tracebacks.append("worker-0.0.log: Traceback … MemoryError")
    assert failed(made) == ["tracebacks"]
    made.exits.append(Exit("worker-0", "worker", 100.0, 1, "worker.little-memory", log="worker-0.0.log"))
    assert failed(made) == []
    made.tracebacks.append("worker-0.1.log: Traceback … MemoryError")
    assert failed(made) == ["tracebacks"]


def test_a_fault_that_failed() -> None:
    """What could not be injected, or did not come back, is no proof of anything."""
    made = evidence()
    made.faults = [Fault(0, "redis.kill", ("redis",), 10.0, 11.0, crash="Traceback …")]
    assert failed(made) == ["failed faults"]


def test_a_traceback() -> None:
    """Nobody may say that all is well with one in the log."""
    made = evidence()
    made.tracebacks.append("service-0.0.log: Traceback …")
    assert failed(made) == ["tracebacks"]


def test_two_workers_at_one_user() -> None:
    """The lease is one worker's, unless that one could not know better."""
    made = evidence()
    made.overlaps.append(Overlap("user_1@x", 101.0, (0, 1)))
    assert failed(made) == ["overlaps"]
    made.faults.append(Fault(0, "worker.part-from-postgres", ("postgres", "worker"), 90.0, 110.0))
    assert failed(made) == []


def test_a_job_that_got_lost_without_a_fault() -> None:
    """The sweep covers it up; the judge does not."""
    made = evidence()
    made.log_lines.append({"event": "swept row", "row": 1, "at": 110.0})
    made.faults.append(Fault(0, "mail.cut", ("mail",), 109.0, 109.0))
    assert failed(made) == ["lost jobs"]
    made.faults.append(Fault(1, "redis.flushall", ("redis",), 107.5, 107.5))
    assert failed(made) == []


def test_a_lost_job_may_be_noticed_late_while_relays_are_away() -> None:
    """The sweep is theirs."""
    made = evidence()
    made.log_lines.append({"event": "swept row", "row": 1, "at": 120.0})
    made.faults.append(Fault(0, "redis.flushall", ("redis",), 107.5, 107.5))
    assert failed(made) == ["lost jobs"]
    made.faults.append(Fault(1, "relay.pause", ("relay",), 107.0, 118.0))
    assert failed(made) == []


def test_a_lost_job_may_be_noticed_late_where_the_clock_jumped() -> None:
    """Its hand-over was dated by a clock that was ahead; another delivery of the row was not."""
    made = evidence()
    made.log_lines.append({"event": "enqueued task", "row": 1, "delivery": 1, "at": 100.7})
    made.log_lines.append({"event": "swept row", "row": 1, "delivery": 1, "at": 140.0})
    assert failed(made) == ["lost jobs"]
    made.faults.append(Fault(0, "postgres.clock-jump", ("mail", "postgres"), 100.5, 110.0))
    assert failed(made) == []
    made.log_lines.append({"event": "swept row", "row": 1, "delivery": 2, "at": 150.0})
    assert failed(made) == ["lost jobs"]


def test_an_early_mail() -> None:
    """Before its user's delay is over."""
    made = evidence()
    made.delays = (2.0,)
    assert failed(made) == ["early mails"]


def test_a_mail_is_not_early_where_the_clock_jumped() -> None:
    """Its row was due by Postgres' clock, or was dated by it; any other mail is judged."""
    made = evidence()
    made.delays = (2.0,)
    made.faults.append(Fault(0, "postgres.clock-jump", ("mail", "postgres"), 102.0, 110.0))
    assert failed(made) == ["early mails"]
    made.faults.append(Fault(1, "postgres.clock-jump", ("mail", "postgres"), 100.5, 100.8))
    assert failed(made) == []


def test_a_pickle_that_was_loaded() -> None:
    """Redis holds no code."""
    made = evidence()
    made.loaded_bombs = 1
    assert failed(made) == ["hostile code"]


def with_outage(kind: str = "mail.away-with-backlog") -> Evidence:
    """Returns a good run with an outage of the mail server, which the first row lived through."""
    made = evidence()
    made.faults.append(Fault(0, kind, ("mail",), 99.7, 100.8))
    return made


def failed_line(at: float, error: str = "MailError: the connection to it broke") -> dict[str, Any]:
    """Returns the line of an attempt at the first row that failed and counts."""
    return {"event": "process task failed", "row": 1, "at": at, "next_try": 15.0, "error": error, "slot": "worker-0"}


def test_an_imported_user() -> None:
    """Is no client's, and due at once; it gets a mail as any."""
    made = evidence()
    made.delays = (0.5,)
    made.sign_ups.append(SignUp("imported", "user_3", "user_3@x", 0, 99.0, 100.0, 201))
    made.users.append(User("user_3", "user_3@x", 99.5))
    made.rows.append(row(3))
    assert failed(made) == ["orphans"]
    made.mails.append(mail(3, 99.6, session=0))
    assert failed(made) == []


@pytest.mark.parametrize("kind", ["mail.away-with-backlog", "mail.connection-limit"])
@pytest.mark.parametrize("error", ["MailError: it broke", "TimeLimitError: the attempt took longer than its 30 s"])
def test_an_attempt_that_failed_because_of_an_outage(kind: str, error: str) -> None:
    """No other fault of the server or the worker was there or just over, and this machine did not fall behind."""
    made = with_outage(kind)
    made.log_lines.append(failed_line(100.5, error))
    made.rows[0] = row(1, attempts=2)
    assert failed(made) == ["spent attempts"]
    made.faults.append(Fault(1, "mail.reset-at-rcpt", ("mail",), 98.0, 99.0))
    assert failed(made) == []
    made.faults[1] = Fault(1, "worker.pause", ("worker",), 98.0, 99.0, slots=("worker-1",))
    assert failed(made) == (["spent attempts"] if error.startswith("Mail") else [])
    made.faults[1].slots = ("worker-0",)
    assert failed(made) == []
    made.faults.pop()
    made.lags.append((99.0, 101.0))
    assert failed(made) == []


@pytest.mark.parametrize(("at", "error"), [(99.5, "MailError: it broke"), (100.5, "OperationalError: it broke")])
def test_an_attempt_that_failed_for_other_reasons(at: float, error: str) -> None:
    """Before the outage, or not over a mail."""
    made = with_outage()
    made.log_lines.append(failed_line(at, error))
    made.rows[0] = row(1, attempts=2)
    assert failed(made) == []


def test_an_attempt_that_nobody_accounts_for() -> None:
    """Each but the last has a line: it failed, or its worker died. A process that ended may have kept one back."""
    made = with_outage()
    made.rows[0] = row(1, attempts=3)
    assert failed(made) == ["spent attempts"]
    made.log_lines.append({"event": "rescued row", "row": 1, "at": 100.2})
    assert failed(made) == ["spent attempts"]
    made.exits.append(Exit("worker-0", "worker", 100.1, -9, "SIGKILL"))
    assert failed(made) == []
    made.rows[0] = row(1, attempts=4)
    assert failed(made) == ["spent attempts"]
    made.faults[0] = replace(made.faults[0], start=102.0, end=103.0)
    assert failed(made) == [], "the row did not meet the outage"


def test_a_foreign_job_that_got_lost() -> None:
    """From its queue, from where it was put aside, or its hash; a fault that took Redis' data since is to blame."""
    made = evidence()
    places = ("rq:queue:app", "outbox:foreign:rq:queue:app")
    made.foreign_jobs.append(ForeignJob("x", places, 100.0, [(105.0, places[0], True), (200.0, places[1], True)]))
    assert failed(made) == []
    for lost in ((200.0, "", True), (200.0, places[0], False)):
        made.foreign_jobs[0].sightings[1] = lost
        made.faults = [
            Fault(0, "redis.silence", ("redis",), 110.0, 130.0),
            Fault(1, "worker.kill", ("worker",), 110, 111),
        ]
        assert failed(made) == ["lost foreign jobs"]
        made.faults.append(Fault(2, "redis.flushall", ("redis",), 110.0, 110.0))
        assert failed(made) == []
        made.faults[2] = replace(made.faults[2], start=90.0, end=91.0)
        assert failed(made) == ["lost foreign jobs"]


def test_a_foreign_job_that_a_worker_had_in_hand() -> None:
    """From a queue that bears the name of one of ours it may go with a worker, until it was seen aside."""
    made = evidence()
    places = ("rq:queue:default", "outbox:foreign:rq:queue:default")
    made.foreign_jobs.append(ForeignJob("x", places, 100.0, [(105.0, places[0], True), (200.0, "", True)]))
    assert failed(made) == ["lost foreign jobs"]
    made.faults.append(Fault(0, "worker.kill", ("worker",), 110.0, 111.0))
    assert failed(made) == []
    made.foreign_jobs[0].sightings[0] = (105.0, places[1], True)
    assert failed(made) == ["lost foreign jobs"]


def test_a_large_row_that_got_lost_or_never_ran() -> None:
    """It belongs to no user, and is done once it ran."""
    made = evidence()
    made.large_rows.append(3)
    assert failed(made) == ["large rows"]
    made.rows.append(replace(row(3), username=None, task="take_large_payload"))
    assert failed(made) == ["large rows"]
    made.handler_runs.append(HandlerRun(3, 0, 101.0))
    assert failed(made) == []
    made.rows[-1] = replace(made.rows[-1], status="dead")
    assert failed(made) == ["unexplained dead"]


def test_a_large_row_that_ran_twice() -> None:
    """Only where its worker could not mark it."""
    made = evidence()
    made.rows.append(replace(row(3), username=None, task="take_large_payload"))
    made.handler_runs += [HandlerRun(3, 0, 101.0), HandlerRun(3, 1, 120.0)]
    assert failed(made) == ["large rows"]
    made.exits.append(Exit("worker-0", "worker", 102.5, -9, "SIGKILL"))
    assert failed(made) == []


def late(*faults: Fault, lines: list[dict[str, Any]] | None = None) -> dict[int, tuple[int, float | None]]:
    """Returns what these faults are charged with when the first user's mail comes at second 120 instead of 100."""
    made = evidence()
    made.mails[0].accepted = 120.0
    made.faults.extend(faults)
    made.log_lines.extend(lines or [])
    return {number: (len(found.touched), found.seconds) for number, found in recoveries(made).items()}


def test_recovery_is_charged_to_the_last_fault_that_held_a_mail_up() -> None:
    """Both have touched the user."""
    one = Fault(0, "redis.kill", ("redis",), 105.0, 110.0)
    two = Fault(1, "relay.kill", ("relay",), 115.0, 117.0)
    assert late(one, two) == {0: (1, None), 1: (1, 3.0)}


def test_a_fault_during_a_backoff_is_not_charged() -> None:
    """The mail failure is, with the wait for the retry."""
    one = Fault(0, "mail.4xx-at-rcpt", ("mail",), 99.0, 101.0)
    two = Fault(1, "relay.kill", ("relay",), 110.0, 112.0)
    line = {"event": "process task failed", "row": 1, "at": 100.5, "next_try": 19.0, "error": "MailError: 450"}
    assert late(one, two, lines=[line]) == {0: (1, 19.0), 1: (0, None)}


def test_who_waits_behind_a_backlog_is_charged_to_the_outage() -> None:
    """From when the mail server was back, whatever else struck meanwhile."""
    made = evidence()
    made.faults.append(Fault(0, "mail.away-with-backlog", ("mail",), 90.0, 98.0))
    made.faults.append(Fault(1, "relay.kill", ("relay",), 115.0, 116.0))
    made.mails[0].accepted = 120.0
    made.sign_ups.append(SignUp("imported", "user_3", "user_3@x", 0, 91.0, 92.0, 201))
    made.mails.append(mail(3, 110.0, session=0))
    found = recoveries(made)
    assert (found[0].touched, found[0].seconds) == ({"user_1", "user_3"}, 22.0)
    assert (found[1].touched, found[1].seconds) == (set(), None)


def test_a_punctual_mail_is_charged_to_nobody() -> None:
    """Whatever happened meanwhile."""
    made = evidence()
    made.faults.append(Fault(0, "redis.flushall", ("redis",), 100.5, 100.5))
    assert recoveries(made)[0].seconds is None


def test_intervals() -> None:
    """What several spans cover of one, and what they leave of it."""
    assert covered((0, 10), [(8, 20), (-5, 1), (0, 2), (3, 4)]) == 5
    assert without((0, 10), [(3, 5), (4, 6), (9, 12)]) == [(0, 3), (6, 9)]
