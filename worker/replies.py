"""What a mail server's answers mean for a row: decided here and nowhere else.

A row is dead at once only where the server names its mailbox. Everything else may be the operator's to mend, whatever
step it is said at: servers report a sender, a login or a HELO that they do not like as late as at RCPT. The table is in
`docs/deploy.md`.
"""

import re

Reply = tuple[int, bytes]
"""A mail server's answer: its code, and its text."""

_MAILBOX = {b"5.1.1", b"5.1.2", b"5.1.3", b"5.1.6", b"5.1.10", b"5.2.1"}
"""No such mailbox, no such domain, no address, moved away, takes no mail, disabled (RFC 3463, RFC 7505)."""

_ENHANCED = re.compile(rb"[245]\.\d{1,3}\.\d{1,3}(?!\S)")


def is_final(code: int, text: bytes) -> bool:
    """Returns whether an answer to RCPT means that this mailbox will never do.

    A bare 550 or 553 does not: some servers say no more where they know no such mailbox, others where they do not relay
    for us. To try the former again costs ten refusals; to give up the latter costs every user of those days the mail.
    """
    return 500 <= code < 600 and _enhanced(text) in _MAILBOX


def _enhanced(text: bytes) -> bytes:
    """Returns the status that an answer's text begins with (RFC 2034), or nothing."""
    found = _ENHANCED.match(text)
    return found[0] if found else b""
