"""Classifies a mail server's rejections: the fault of a mailbox, of a mail, or of the server and our configuration.

A row is dead at once only if the server names its mailbox. Every other rejection may be the operator's to fix,
whichever command it answers: servers reject a sender, a login or a HELO as late as at RCPT. `docs/deploy.md` has the
table.
"""

import re
from typing import Literal

from outbox.runtime.redaction import masked

Reply = tuple[int, bytes]
"""A mail server's reply: its code and its text."""

Refused = Literal["the connection", "the login", "the sender", "an international address", "the recipient", "the mail"]
"""What a server may reject."""

Fault = Literal["mailbox", "mail", "server"]
"""The cause of a rejection. The row is dead at once; is tried again, and the attempt counts; or it does not count."""

CLOSING = 421
"""The code that a server may send at any step before it closes the connection (RFC 5321, 3.8)."""

_MAILBOX_STATUSES = {b"5.1.1", b"5.1.2", b"5.1.3", b"5.1.6", b"5.1.10", b"5.2.1"}
"""No such mailbox, no such domain, not an address, moved, accepts no mail, disabled (RFC 3463, RFC 7505)."""

_SENDER_STATUSES = {b"4.1.7", b"4.1.8", b"5.1.7", b"5.1.8"}
"""The sender's address or domain is invalid (RFC 3463)."""

_ENHANCED_STATUS = re.compile(rb"[245]\.\d{1,3}\.\d{1,3}(?!\S)")


def fault_of(refused: Refused, code: int, text: bytes) -> Fault:
    """Returns the cause of a rejection.

    The connection, the login and the sender are the same for all mails, so no mail is at fault. From RCPT on, a reply
    is about the mail unless it says otherwise: treated as the server's fault, it would delay all other mails.

    A bare 550 or 553 does not name the mailbox: some servers send it for an unknown mailbox, others if they do not
    relay for us. Retrying the former costs ten rejections; giving up the latter costs every user of those days the
    mail.
    """
    match = _ENHANCED_STATUS.match(text)
    status = match[0] if match else b""
    if code == CLOSING or refused in {"the connection", "the login", "the sender"} or status in _SENDER_STATUSES:
        return "server"
    if refused == "the recipient" and 500 <= code < 600 and status in _MAILBOX_STATUSES:
        return "mailbox"
    return "mail"


def status_of(code: int, text: bytes | str) -> str:
    """Returns the codes of a reply, without its text."""
    match = _ENHANCED_STATUS.match(text.encode(errors="replace") if isinstance(text, str) else text)
    return f"{code} {match[0].decode()}" if match else str(code)


def quoted(code: int, text: bytes | str) -> str:
    """Returns a reply on one line for errors and logs: cut, and with secret codes masked."""
    decoded = text if isinstance(text, str) else text.decode(errors="replace")
    return f"{code} {' '.join(masked(decoded).split())[:300]}"
