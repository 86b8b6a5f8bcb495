"""Errors of sending a mail."""

from outbox.errors import NotNowError, OutboxError


class MailError(OutboxError):
    """The mail server did not accept a mail, and may accept it later."""


class MailServerError(MailError, NotNowError):
    """The mail server accepts no mail now: it is away, rejects us, or no connection to it is free."""

    def __init__(self, text: str, refused: str = "", reply: str = "") -> None:
        """Takes the error's text and, if the server rejected something, what that was and the server's reply."""
        super().__init__(text)
        self.refused = refused
        self.reply = reply
