"""Faults of the mail server."""

from collections.abc import Awaitable, Callable

from tests.chaos.faults import Act, Kind
from tests.chaos.mailserver import ON_CONNECTING, Misbehaviour

_LENGTH = (0.5, 3.0)
"""Seconds. Each costs the mails that it strikes a wait of 15 s and more, by design."""
_STEPS = ("connect", "ehlo", "starttls", "auth", "mail", "rcpt", "data", "dot")


def _misbehave(step: str, does: str, share: float = 0.7) -> Callable[[Act], Awaitable[None]]:
    async def inject(act: Act) -> None:
        mail = act.stage.mail
        mail.misbehaviour = Misbehaviour(step, does, share)
        if step in ON_CONNECTING:
            mail.hang_up()
        try:
            await act.hold(*_LENGTH)
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
