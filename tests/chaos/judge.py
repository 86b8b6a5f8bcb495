"""Judges a run: checks what must hold by the clients' answers, the mails, the database and the logs."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.chaos import process_logs
from tests.chaos.duplicates import copies, duplicates
from tests.chaos.evidence import SHORTAGES, Evidence, SignUp
from tests.chaos.foreign_jobs import lost_foreign_jobs
from tests.chaos.intervals import Span, overlaps
from tests.chaos.large_rows import mishandled_large_rows
from tests.chaos.spent_attempts import spent_attempts

EXPECTED_REFUSALS = frozenset({400, 409, 413, 415, 422})
"""Status codes for requests that cannot be fulfilled."""

_LOSING = frozenset({"redis", "postgres", "worker"})
"""Targets whose faults may lose a job in Redis, or keep its worker from claiming the row."""
_AFTERMATH = 3.0
"""Seconds after such a fault in which a lost job may still be noticed: two sweeps."""
_HORIZON = 60.0
"""Seconds that a job may wait in rq-scheduler's set: damage by another client may be noticed that much later."""
_LOG_DELAY = 1.0
"""Seconds from the time of a hand-over within which it is logged."""
_CLOCK_TOLERANCE = 0.25
"""Seconds by which a mail may seem early, for differences between clocks and for transit."""


@dataclass(frozen=True)
class Failure:
    """One violation of a check."""

    check: str
    about: str
    """The user, row or process."""
    text: str


def judge(evidence: Evidence) -> list[Failure]:
    """Returns all failures; none after a good run."""
    return [Failure(name, about, text) for name, check in CHECKS.items() for about, text in check(evidence)]


def _orphans(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Every user whose client got 201, and every user that exists, gets a mail."""
    mailed = {mail.recipient for mail in evidence.mails}
    created = {sign_up.email: sign_up for sign_up in evidence.sign_ups if sign_up.status == 201}
    refused = _dead_by_address(evidence)
    for address in sorted({*created, *(user.email for user in evidence.users)} - mailed - refused):
        how = f"got 201 at {created[address].answered:.3f}" if address in created else "exists, although it got no 201"
        yield address, f"{how}, and got no mail"


def _ghosts(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Only users get mails."""
    users = {user.email for user in evidence.users}
    for recipient in copies(evidence.mails):
        if recipient not in users:
            yield recipient, "got a mail, and is not a user"


def _half_made(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Every user has exactly one row, and every row has its user."""
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
            yield str(owner), f"is not a user, and has the outbox rows {ids}"


def _unfinished(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Every row is done or dead at the end."""
    for row in evidence.rows:
        if row.status not in ("done", "dead"):
            yield (
                f"row {row.id}",
                f"is {row.status} (attempt {row.attempts}, delivery {row.delivery}): {row.last_error}",
            )


def _unexplained_dead(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """A row is dead only if the mail server permanently refused its address."""
    excused = {user.username for user in evidence.users if user.email in evidence.refused_addresses}
    for row in evidence.rows:
        if row.status == "dead" and row.username not in excused:
            yield f"row {row.id}", f"is dead after {row.attempts} attempts: {row.last_error}"


def _unexplained_duplicates(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """A mail is sent twice only if a fault prevented the completion after the 250."""
    for duplicate in duplicates(evidence):
        if not duplicate.excuse:
            one, two = duplicate.mail, duplicate.following
            later = f"and another from worker-{two.worker} {two.accepted - one.accepted:.2f} s later"
            yield one.recipient, f"got a mail from worker-{one.worker} at {one.accepted:.3f}, {later}: unexplained"


def _different_copies(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """All copies of a mail have the same Message-ID and link, and no other mail has them."""
    owners: dict[str, str] = {}
    for recipient, mails in copies(evidence.mails).items():
        for name, values in (
            ("Message-ID", {mail.message_id for mail in mails}),
            ("link", {mail.link for mail in mails}),
        ):
            if len(values) > 1:
                yield recipient, f"got copies with different {name}s: {', '.join(sorted(values))}"
            for value in values:
                if not value or owners.setdefault(value, recipient) != recipient:
                    yield recipient, f"got the {name} {value!r}, which is empty or belongs to {owners.get(value)}"


def _unanswered_keys(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Every client with an Idempotency-Key gets an answer in the end; all answers with 201 to one key are the same."""
    asked: dict[str, list[SignUp]] = defaultdict(list)
    for sign_up in evidence.sign_ups:
        if sign_up.key:
            asked[sign_up.key].append(sign_up)
    for sign_ups in asked.values():
        username = sign_ups[0].username
        if not any(sign_up.is_final for sign_up in sign_ups):
            yield username, f"asked {len(sign_ups)} times with a key, and got no answer"
        if len({sign_up.body for sign_up in sign_ups if sign_up.status == 201}) > 1:
            yield username, "got different answers to one key"
        if sum(sign_up.status == 201 and not sign_up.is_replayed for sign_up in sign_ups) > 1:
            yield username, "was created twice with one key"
        if any(sign_up.status == 422 for sign_up in sign_ups):
            yield username, "got 422 to its own key"


def _inconsistent_clients(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """The answers to the clients match the database."""
    users = {user.username: user.email for user in evidence.users}
    emails = {user.email.lower() for user in evidence.users}
    asked: dict[tuple[str, str], list[SignUp]] = defaultdict(list)
    for sign_up in evidence.sign_ups:
        asked[sign_up.username, sign_up.email].append(sign_up)
    for (username, email), sign_ups in asked.items():
        statuses = [sign_up.status for sign_up in sign_ups if not sign_up.is_replayed]
        exists = users.get(username) == email
        if statuses.count(201) > 1:
            yield username, "was created twice"
        if 201 in statuses and not exists:
            yield username, "got 201 and does not exist"
        if exists and not {201, 503, None} & set(statuses):
            yield username, f"exists, and got {statuses}"
        is_refused = any(sign_up.status == 409 and sign_up.is_final for sign_up in sign_ups)
        if is_refused and username not in users and email.lower() not in emails:
            yield username, "got 409, and neither name nor address is taken"
    for username, email in users.items():
        if (username, email) not in asked:
            yield username, f"exists with the address {email}, which no client requested"


def _unexpected_answers(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """A client gets 201, a status for what is wrong with its request, 503, or no answer."""
    for sign_up in evidence.sign_ups:
        expected = {201, 409, 503, None}
        if sign_up.intent.startswith("taken"):
            expected = {409, 503, None}
        if sign_up.intent == "invalid":
            expected = {*EXPECTED_REFUSALS, 503, None}
        if sign_up.status not in expected:
            yield (
                sign_up.username,
                f"sent a request of kind '{sign_up.intent}' and got {sign_up.status}: {sign_up.body}",
            )


def _unasked_exits(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """A process ends by a kill, by SIGTERM with code 0, or by a shortage with a positive code."""
    for end in evidence.exits:
        if end.tail:
            yield end.slot, f"exited with {end.code} after {end.cause or 'no signal'}:\n{end.tail}"


def _failed_faults(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Every fault is injected as intended, and its target recovers."""
    for fault in evidence.faults:
        if fault.crash:
            yield f"fault {fault.number}, {fault.kind}", fault.crash


def _tracebacks(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """No log has a traceback, except that of a process ended by a shortage."""
    excused = {end.log for end in evidence.exits if end.cause in SHORTAGES}
    for traceback in evidence.tracebacks:
        name, _, text = traceback.partition(": ")
        if name not in excused:
            yield name, text


def _overlaps(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Two workers send to one user at the same time only while one, cut off from Postgres, cannot know of the other."""
    cut_off = [(fault.start, fault.end) for fault in evidence.faults if fault.kind == "worker.part-from-postgres"]
    for overlap in evidence.overlaps:
        if not any(overlaps((overlap.at, overlap.at), span) for span in cut_off):
            one, two = overlap.workers
            yield overlap.recipient, f"worker-{one} and worker-{two} sent to it at the same time"


def _lost_jobs(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """A row is swept only after a fault that may have lost its job."""
    causes = _losing_times(evidence)
    misdated = _misdated(evidence)
    for line in process_logs.lines_of(evidence.log_lines, "swept row"):
        if (line["row"], line.get("delivery")) in misdated:
            continue
        if not any(overlaps((line["at"] - _AFTERMATH, line["at"]), span) for span in causes):
            yield f"row {line['row']}", f"was swept at {line['at']:.3f}, although no fault had affected its job"


def _misdated(evidence: Evidence) -> set[tuple[int, int]]:
    """Returns the deliveries handed over while Postgres' clock was ahead: their loss is noticed that much later."""
    jumps = [(fault.start, fault.end) for fault in evidence.faults if fault.kind == "postgres.clock-jump"]
    return {
        (line["row"], line["delivery"])
        for line in process_logs.lines_of(evidence.log_lines, "enqueued task")
        if any(overlaps((line["at"] - _LOG_DELAY, line["at"]), span) for span in jumps)
    }


def _losing_times(evidence: Evidence) -> list[Span]:
    """Returns when a lost job may be noticed: faults of the relays postpone that."""
    faults = sorted(evidence.faults, key=lambda fault: fault.start)
    relays = [(fault.start, fault.end) for fault in faults if "relay" in fault.targets]
    times: list[Span] = []
    for fault in faults:
        if _LOSING & set(fault.targets):
            changes_set = fault.kind in ("redis.hostile-jobs", "redis.stale-replica")
            end = fault.end + _AFTERMATH + (_HORIZON if changes_set else 0)
            for start, back in relays:
                if overlaps((start, back), (fault.start, end)):
                    end = max(end, back + _AFTERMATH)
            times.append((fault.start, end))
    return times


def _early(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """No mail is sent before it is due, unless Postgres' clock jumped in between: its due time is unknown."""
    jumps = [(fault.start, fault.end) for fault in evidence.faults if fault.kind == "postgres.clock-jump"]
    first = {recipient: mails[0].accepted for recipient, mails in copies(evidence.mails).items()}
    created = {user.username: user.created for user in evidence.users}
    for sign_up in evidence.sign_ups:
        # Another service, with another delay, may have replayed the answer.
        is_first = sign_up.status == 201 and not sign_up.is_replayed
        if is_first and sign_up.email in first and sign_up.username in created:
            early = created[sign_up.username] + evidence.delay_of(sign_up) - first[sign_up.email]
            jumped = any(overlaps((sign_up.sent, first[sign_up.email]), span) for span in jumps)
            if early > _CLOCK_TOLERANCE and not jumped:
                yield sign_up.email, f"got the mail {early:.2f} s too early"


def _bombs(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Nothing that another client writes to Redis is loaded or run."""
    if evidence.loaded_bombs:
        yield "redis", f"pickles were loaded or jobs run of {evidence.loaded_bombs} faults"


def _dead_by_address(evidence: Evidence) -> set[str]:
    dead = {row.username for row in evidence.rows if row.status == "dead"}
    return {user.email for user in evidence.users if user.username in dead and user.email in evidence.refused_addresses}


CHECKS: dict[str, Callable[[Evidence], Iterator[tuple[str, str]]]] = {
    "orphans": _orphans,
    "ghosts": _ghosts,
    "half-made": _half_made,
    "unfinished": _unfinished,
    "unexplained dead": _unexplained_dead,
    "unexplained duplicates": _unexplained_duplicates,
    "different copies": _different_copies,
    "inconsistent clients": _inconsistent_clients,
    "unanswered keys": _unanswered_keys,
    "unexpected answers": _unexpected_answers,
    "unasked exits": _unasked_exits,
    "failed faults": _failed_faults,
    "tracebacks": _tracebacks,
    "overlaps": _overlaps,
    "lost jobs": _lost_jobs,
    "early mails": _early,
    "hostile code": _bombs,
    "spent attempts": spent_attempts,
    "lost foreign jobs": lost_foreign_jobs,
    "large rows": mishandled_large_rows,
}
