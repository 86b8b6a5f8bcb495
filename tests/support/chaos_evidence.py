"""Builds evidence of a chaos run for tests of its judge."""

from typing import Any

from tests.chaos.evidence import Evidence, Mail, Row, Session, SignUp, User
from tests.chaos.judge import judge


def good_run() -> Evidence:
    """Returns the evidence of a good run with two users: both got 201 at second 100, and a mail at second 101."""
    evidence = Evidence(seed=1, delays=(0.0,), lease=15.0)
    for number in (1, 2):
        name = f"user_{number}"
        evidence.sign_ups.append(SignUp("new", name, f"{name}@x", 0, 99.0, 100.0, 201))
        evidence.users.append(User(name, f"{name}@x", 99.5))
        evidence.rows.append(row(number))
        evidence.sessions.append(Session(number - 1, 0, 5000 + number, 90.0))
        evidence.mails.append(mail(number, 101.0))
    return evidence


def row(number: int, status: str = "done", **changes: Any) -> Row:
    """Returns the row of a user."""
    fields: dict[str, Any] = {"attempts": 1, "delivery": 1, "max_retries": 10, "last_error": None, "created": 99.5}
    return Row(id=number, username=f"user_{number}", status=status, **{**fields, **changes})


def mail(number: int, accepted: float, **changes: Any) -> Mail:
    """Returns a mail to a user, on the session of the same number."""
    fields: dict[str, Any] = {
        "message_id": f"<{number}>",
        "link": f"https://x/{number}",
        "worker": 0,
        "session": number - 1,
        "answered": accepted,
        "followed": True,
    }
    return Mail(recipient=f"user_{number}@x", accepted=accepted, **{**fields, **changes})


def failed_checks(evidence: Evidence) -> list[str]:
    """Returns the names of the checks that fail."""
    return sorted({failure.check for failure in judge(evidence)})
