"""Injects faults of the mail server: it misbehaves at one step of a session."""

from collections.abc import Awaitable, Callable

from tests.chaos.faults import Injection, Kind
from tests.chaos.mailserver import CONNECT_STEPS, Misbehaviour

_DURATION = (0.5, 3.0)
"""Seconds. Each affected mail then waits 15 s or more, by design."""
_STEPS = ("connect", "ehlo", "starttls", "auth", "mail", "rcpt", "data", "dot")


def _misbehave(step: str, does: str, share: float = 0.7) -> Callable[[Injection], Awaitable[None]]:
    async def inject(injection: Injection) -> None:
        mail = injection.system.mail
        mail.misbehaviour = Misbehaviour(step, does, share)
        if step in CONNECT_STEPS:
            mail.close_idle_sessions()
        try:
            await injection.hold(*_DURATION)
        finally:
            mail.misbehaviour = None

    return inject


KINDS = (
    *(Kind(f"mail.hang-at-{step}", _misbehave(step, "hang")) for step in (*_STEPS, "handshake", "quit")),
    *(Kind(f"mail.4xx-at-{step}", _misbehave(step, "4xx")) for step in _STEPS),
    *(Kind(f"mail.5xx-at-{step}", _misbehave(step, "5xx")) for step in _STEPS),
    *(Kind(f"mail.reset-at-{step}", _misbehave(step, "reset")) for step in ("connect", "handshake", "rcpt", "dot")),
    Kind("mail.5xx-for-address", _misbehave("rcpt", "address", 0.3)),
    Kind("mail.reset-in-data", _misbehave("body", "reset"), weight=2),
    Kind("mail.hang-in-data", _misbehave("body", "hang")),
    Kind("mail.take-and-hang", _misbehave("dot", "take and hang", 0.5)),
    Kind("mail.take-and-reset", _misbehave("dot", "take and reset", 0.5)),
    Kind("mail.tls-wrong-name", _misbehave("handshake", "wrong name")),
    Kind("mail.tls-unknown-authority", _misbehave("handshake", "unknown authority")),
    Kind("mail.tls-garbage", _misbehave("handshake", "garbage")),
)
