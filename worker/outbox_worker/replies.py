"""What a mail server's refusals mean: whose fault they are, decided here and nowhere else.

A row is dead at once only where the server names its mailbox. Everything else may be the operator's to mend, whatever
step it is said at: servers report a sender, a login or a HELO that they do not like as late as at RCPT. The table is in
`docs/deploy.md`.
"""

import re
from typing import Literal

from outbox.runtime.redaction import masked

Reply = tuple[int, bytes]
"""A mail server's answer: its code, and its text."""

Refused = Literal["the connection", "the login", "the sender", "an international address", "the recipient", "the mail"]
"""What a server may refuse."""

Fault = Literal["mailbox", "mail", "server"]
"""Whose fault a refusal is: the row is dead at once; it is tried again, and the attempt counts; it does not count."""

CLOSING = 421
"""What a server says at any step before it closes the connection (RFC 5321, 3.8)."""

_MAILBOX = {b"5.1.1", b"5.1.2", b"5.1.3", b"5.1.6", b"5.1.10", b"5.2.1"}
"""No such mailbox, no such domain, no address, moved away, takes no mail, disabled (RFC 3463, RFC 7505)."""

_SENDER = {b"4.1.7", b"4.1.8", b"5.1.7", b"5.1.8"}
"""The sender's address or domain is none (RFC 3463)."""

_ENHANCED = re.compile(rb"[245]\.\d{1,3}\.\d{1,3}(?!\S)")


def fault_of(refused: Refused, code: int, text: bytes) -> Fault:
    """Returns whose fault a refusal is.

    The connection, the login and the sender are the same for all mails, so no mail is at fault. From RCPT on, an answer
    is about the mail unless it says otherwise: taken for the server's, it would hold up all others.

    A bare 550 or 553 is not taken to name the mailbox: some servers say no more where they know no such mailbox, others
    where they do not relay for us. To try the former again costs ten refusals; to give up the latter costs every user
    of those days the mail.
    """
    found = _ENHANCED.match(text)
    status = found[0] if found else b""
    if code == CLOSING or refused in {"the connection", "the login", "the sender"} or status in _SENDER:
        return "server"
    if refused == "the recipient" and 500 <= code < 600 and status in _MAILBOX:
        return "mailbox"
    return "mail"


def status_of(code: int, text: bytes | str) -> str:
    """Returns the codes of an answer, without what the server says besides."""
    found = _ENHANCED.match(text.encode(errors="replace") if isinstance(text, str) else text)
    return f"{code} {found[0].decode()}" if found else str(code)


def quoted(code: int, text: bytes | str) -> str:
    """Returns an answer on one line, as errors and the log show it."""
    said = text if isinstance(text, str) else text.decode(errors="replace")
    return f"{code} {' '.join(masked(said).split())[:300]}"
