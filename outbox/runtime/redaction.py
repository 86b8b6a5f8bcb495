"""Removes secrets from texts for logs and rows: secret codes, and rows that errors from Postgres quote."""

import re

import psycopg
from structlog.typing import EventDict, WrappedLogger

_CODE_IN_TEXT = re.compile(r"(?i)secret_code(=3D|%3D|=)[0-9a-f=\s]*")


def masked(text: str) -> str:
    """Returns a text without the secret codes of verification links: a mail server may quote a link that it rejects."""
    return _CODE_IN_TEXT.sub("secret_code=…", text)


def one_line(error: BaseException) -> str:
    """Returns an error's class and text on one line of at most 500 characters that Postgres can store."""
    shown = without_detail(error) if isinstance(error, psycopg.Error) else str(error)
    text = " ".join(masked(shown).replace("\0", "\ufffd").encode(errors="replace").decode().split())
    name = type(error).__name__
    return (f"{name}: {text}" if text else name)[:500]


def without_detail(error: psycopg.Error) -> str:
    """Returns the message of an error from Postgres without the row that it quotes, which may hold a password hash."""
    return error.diag.message_primary or str(error)


def hide_rows(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Removes the rows that errors from Postgres quote, before the log shows a traceback with their text."""
    error, seen = event.get("exc_info"), set[int]()
    if isinstance(error, tuple):
        error = error[1]
    while isinstance(error, BaseException) and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, psycopg.Error):
            error.args = (without_detail(error),)
        error = error.__cause__ or error.__context__
    return event
