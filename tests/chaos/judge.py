"""The judge: what must hold after a run, from the clients' own list, the mails, and the database."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.chaos import logbook
from tests.chaos.duplicates import copies, duplicates
from tests.chaos.evidence import SHORTAGES, Attempt, Evidence
from tests.chaos.foreign_jobs import lost_foreign_jobs
from tests.chaos.intervals import Span, overlaps
from tests.chaos.large_rows import mishandled_large_rows
from tests.chaos.spent_attempts import spent_attempts

EXPECTED_REFUSALS = frozenset({400, 409, 413, 415, 422})
"""What a client may be told that asked for what cannot be."""

_LOSING = frozenset({"redis", "postgres", "worker"})
"""Targets whose faults may lose a job that Redis had, or keep its worker from claiming the row."""
_AFTERMATH = 3.0
"""Seconds after such a fault for which a job may still be missed: two sweeps."""
_HORIZON = 60.0
"""Seconds ahead of its time that a job may be in rq-scheduler's set: what a stranger did to it may show as late."""
_LOGGED = 1.0
"""Seconds after it is dated by which a hand-over is in the log."""
_EARLY = 0.25
"""Seconds that two clocks and the way here may differ."""


@dataclass(frozen=True)
class Failure:
    """Something that must not be."""

    check: str
    about: str
    """The user, row or process."""
    text: str


def judge(evidence: Evidence) -> list[Failure]:
    """Returns all that is wrong; nothing after a good run."""
    return [Failure(name, about, text) for name, check in CHECKS.items() for about, text in check(evidence)]


def _orphans(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """A user that was told 201, or that exists without having been told, gets a mail."""
    mailed = {mail.recipient for mail in evidence.mails}
    told = {attempt.email: attempt for attempt in evidence.attempts if attempt.status == 201}
    refused = _dead_by_address(evidence)
    for address in sorted({*told, *(user.email for user in evidence.users)} - mailed - refused):
        how = f"told 201 at {told[address].answered:.3f}" if address in told else "exists, and was not told so"
        yield address, f"{how}, and got no mail"


def _ghosts(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """A mail goes to users alone."""
    users = {user.email for user in evidence.users}
    for recipient in copies(evidence.mails):
        if recipient not in users:
            yield recipient, "got a mail, and is no user"


def _half_made(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """A user has exactly one row, and a row has its user."""
    rows: dict[str | None, list[int]] = defaultdict(list)
    for row in evidence.rows:
        if row.task == "send_verify_email":
            rows[row.username].append(row.id)
    users = {user.username for user in evidence.users}
    for username in sorted(users):
        if len(rows.get(username, [])) != 1:
            yield username, f"has the outbox rows {rows.get(username, [])}"
    for owner, ids in rows.items():
        if owner not in users:
            yield str(owner), f"is no user, and has the outbox rows {ids}"


def _unfinished(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """In the end every row is done or dead."""
    for row in evidence.rows:
        if row.status not in ("done", "dead"):
            yield (
                f"row {row.id}",
                f"is {row.status} (attempt {row.attempts}, delivery {row.delivery}): {row.last_error}",
            )


def _unexplained_dead(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """A row is dead only because the mail server refused its address for good."""
    excused = {user.username for user in evidence.users if user.email in evidence.refused}
    for row in evidence.rows:
        if row.status == "dead" and row.username not in excused:
            yield f"row {row.id}", f"is dead after {row.attempts} attempts: {row.last_error}"


def _unexplained_duplicates(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """A mail goes out twice only because of a crash between the 250 and the mark."""
    for duplicate in duplicates(evidence):
        if not duplicate.excuse:
            one, two = duplicate.mail, duplicate.following
            later = f"{two.accepted - one.accepted:.2f} s later another from worker-{two.worker}"
            yield one.recipient, f"got a mail from worker-{one.worker} at {one.accepted:.3f}, {later}: unexplained"


def _different_copies(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """All copies of a mail carry the same Message-ID and link, and no other mail does."""
    owners: dict[str, str] = {}
    for recipient, mails in copies(evidence.mails).items():
        for what, values in (
            ("Message-ID", {mail.message_id for mail in mails}),
            ("link", {mail.link for mail in mails}),
        ):
            if len(values) > 1:
                yield recipient, f"got copies of different {what}s: {', '.join(sorted(values))}"
            for value in values:
                if not value or owners.setdefault(value, recipient) != recipient:
                    yield recipient, f"got the {what} {value!r}, which is empty or {owners.get(value)}'s"


def _inconsistent_clients(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """What a client was told fits the database."""
    users = {user.username: user.email for user in evidence.users}
    emails = {user.email.lower() for user in evidence.users}
    asked: dict[tuple[str, str], list[Attempt]] = defaultdict(list)
    for attempt in evidence.attempts:
        asked[attempt.username, attempt.email].append(attempt)
    for (username, email), attempts in asked.items():
        statuses = [attempt.status for attempt in attempts]
        exists = users.get(username) == email
        if statuses.count(201) > 1:
            yield username, "was created twice"
        if 201 in statuses and not exists:
            yield username, "was told 201 and is not there"
        if exists and not {201, 503, None} & set(statuses):
            yield username, f"is there, and was told {statuses}"
        if 409 in statuses and username not in users and email.lower() not in emails:
            yield username, "was told 409, and neither name nor address is anybody's"
    for username, email in users.items():
        if (username, email) not in asked:
            yield username, f"is there with the address {email}, and nobody asked for it"


def _unexpected_answers(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """A client is told 201, what is wrong with its request, 503, or nothing."""
    for attempt in evidence.attempts:
        expected = {201, 409, 503, None}
        if attempt.intent.startswith("taken"):
            expected = {409, 503, None}
        if attempt.intent == "invalid":
            expected = {*EXPECTED_REFUSALS, 503, None}
        if attempt.status not in expected:
            yield attempt.username, f"asked for what is {attempt.intent} and was told {attempt.status}: {attempt.body}"


def _unasked_exits(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """A process ends because it is killed, or by SIGTERM and then with code 0, or by a shortage and then with 1."""
    for end in evidence.exits:
        if end.tail:
            yield end.slot, f"ended with {end.code} after {end.cause or 'nothing at all'}:\n{end.tail}"


def _failed_faults(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Every fault is injected as it is meant, and what it struck comes back."""
    for fault in evidence.faults:
        if fault.crash:
            yield f"fault {fault.number}, {fault.kind}", fault.crash


def _crashes(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """No log has a traceback, but for that of a process which a shortage ended."""
    excused = {end.log for end in evidence.exits if end.cause in SHORTAGES}
    for crash in evidence.crashes:
        name, _, text = crash.partition(": ")
        if name not in excused:
            yield name, text


def _overlaps(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """No two workers send to one user at once; but one that is parted from Postgres may not know that it has lost."""
    parted = [(fault.start, fault.end) for fault in evidence.faults if fault.kind == "worker.part-from-postgres"]
    for overlap in evidence.overlaps:
        if not any(overlaps((overlap.at, overlap.at), span) for span in parted):
            yield overlap.recipient, f"was being sent to by worker-{overlap.workers[0]} and worker-{overlap.workers[1]}"


def _lost_jobs(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """A job that nothing has taken from Redis is not swept: without a fault, no job gets lost."""
    causes = _losing_times(evidence)
    misdated = _misdated(evidence)
    for line in logbook.of(evidence.lines, "swept row"):
        if (line["row"], line.get("delivery")) in misdated:
            continue
        if not any(overlaps((line["at"] - _AFTERMATH, line["at"]), span) for span in causes):
            yield f"row {line['row']}", f"was swept at {line['at']:.3f}, and nothing had happened to its job"


def _misdated(evidence: Evidence) -> set[tuple[int, int]]:
    """Returns the deliveries whose hand-over Postgres dated by a clock that was ahead: missed that much later."""
    jumps = [(fault.start, fault.end) for fault in evidence.faults if fault.kind == "postgres.clock-jump"]
    return {
        (line["row"], line["delivery"])
        for line in logbook.of(evidence.lines, "enqueued task")
        if any(overlaps((line["at"] - _LOGGED, line["at"]), span) for span in jumps)
    }


def _losing_times(evidence: Evidence) -> list[Span]:
    """Returns when a lost job may be noticed; while the relays are struck, nobody notices."""
    faults = sorted(evidence.faults, key=lambda fault: fault.start)
    relays = [(fault.start, fault.end) for fault in faults if "relay" in fault.targets]
    times: list[Span] = []
    for fault in faults:
        if _LOSING & set(fault.targets):
            is_sly = fault.kind in ("redis.hostile-jobs", "redis.stale-replica")
            end = fault.end + _AFTERMATH + (_HORIZON if is_sly else 0)
            for start, back in relays:
                if overlaps((start, back), (fault.start, end)):
                    end = max(end, back + _AFTERMATH)
            times.append((fault.start, end))
    return times


def _early(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """No mail goes out before it is due; where Postgres' clock jumped meanwhile, nobody knows when that was."""
    jumps = [(fault.start, fault.end) for fault in evidence.faults if fault.kind == "postgres.clock-jump"]
    first = {recipient: mails[0].accepted for recipient, mails in copies(evidence.mails).items()}
    created = {user.username: user.created for user in evidence.users}
    for attempt in evidence.attempts:
        if attempt.status == 201 and attempt.email in first and attempt.username in created:
            early = created[attempt.username] + evidence.delay_of(attempt) - first[attempt.email]
            jumped = any(overlaps((attempt.sent, first[attempt.email]), span) for span in jumps)
            if early > _EARLY and not jumped:
                yield attempt.email, f"got the mail {early:.2f} s too early"


def _bombs(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Nothing that a stranger writes to Redis is loaded or run."""
    if evidence.bombs:
        yield "redis", f"{evidence.bombs} faults' pickles were loaded, or their jobs run"


def _dead_by_address(evidence: Evidence) -> set[str]:
    dead = {row.username for row in evidence.rows if row.status == "dead"}
    return {user.email for user in evidence.users if user.username in dead and user.email in evidence.refused}


CHECKS: dict[str, Callable[[Evidence], Iterator[tuple[str, str]]]] = {
    "orphans": _orphans,
    "ghosts": _ghosts,
    "half-made": _half_made,
    "unfinished": _unfinished,
    "unexplained dead": _unexplained_dead,
    "unexplained duplicates": _unexplained_duplicates,
    "different copies": _different_copies,
    "inconsistent clients": _inconsistent_clients,
    "unexpected answers": _unexpected_answers,
    "unasked exits": _unasked_exits,
    "failed faults": _failed_faults,
    "tracebacks": _crashes,
    "overlaps": _overlaps,
    "lost jobs": _lost_jobs,
    "early mails": _early,
    "hostile code": _bombs,
    "spent attempts": spent_attempts,
    "lost foreign jobs": lost_foreign_jobs,
    "large rows": mishandled_large_rows,
}
