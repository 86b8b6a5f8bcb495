"""Writes mails as bytes for SMTP, for handlers that send many: the email package takes 2 ms for one."""

import binascii
import re
from collections.abc import Mapping
from typing import NamedTuple

_BOUNDARY = "=_alternative"
"""Does not occur in a part: quoted-printable has no "=_" (RFC 2045, section 6.7)."""

_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")


class Message(NamedTuple):
    """A mail that is ready to be sent."""

    recipient: str
    """The address in the envelope."""
    content: bytes
    """Headers and body; every line ends with CRLF."""


def alternatives(recipient: str, headers: Mapping[str, str], *, text: str, html: str) -> Message:
    """Returns a mail with a text and an HTML alternative of its body.

    Args:
        recipient: the address, for the envelope and the `To` header.
        headers: the other headers; values must be in ASCII, as encoded words if needed.
        text: the body for mail programs that show no HTML.
        html: the body for the others.

    Raises:
        ValueError: a header has a linefeed or another control character in it.
    """
    lines = [f"{name}: {value}" for name, value in {"To": recipient, **headers}.items()]
    if _CONTROL.search("".join(lines)):
        raise ValueError("a header has a linefeed or another control character in it")
    head = "\r\n".join([*lines, "MIME-Version: 1.0", f'Content-Type: multipart/alternative; boundary="{_BOUNDARY}"'])
    parts = b"".join(_part(kind, body) for kind, body in (("plain", text), ("html", html)))
    return Message(recipient, f"{head}\r\n\r\n".encode() + parts + f"--{_BOUNDARY}--\r\n".encode())


def _part(kind: str, body: str) -> bytes:
    head = (
        f"--{_BOUNDARY}\r\n"
        f'Content-Type: text/{kind}; charset="utf-8"\r\n'
        "Content-Transfer-Encoding: quoted-printable\r\n\r\n"
    )
    return head.encode() + binascii.b2a_qp(_with_crlf(f"{body}\n").encode(errors="replace"))


def _with_crlf(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\r\n")
