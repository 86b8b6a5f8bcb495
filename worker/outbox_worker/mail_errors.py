"""What a handler may meet that sends a mail."""

from outbox.errors import NotNowError, OutboxError


class MailError(OutboxError):
    """The mail server did not take a mail, and may take it later."""


class MailServerError(MailError, NotNowError):
    """The mail server takes no mail now, whichever it is: it is away, refuses us, or has no connection to spare."""

    def __init__(self, text: str, refused: str = "", reply: str = "") -> None:
        """Takes what to say, and what the server has refused with which answer, if it has."""
        super().__init__(text)
        self.refused = refused
        self.reply = reply
