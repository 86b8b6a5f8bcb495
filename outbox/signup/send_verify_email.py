"""The task of the sign-up application."""

from pydantic import BaseModel, ConfigDict

from outbox.task import Task


class SendVerifyEmail(BaseModel):
    """Payload of `send_verify_email`."""

    model_config = ConfigDict(extra="forbid")

    username: str


SEND_VERIFY_EMAIL = Task("send_verify_email", SendVerifyEmail, queue="critical", delay=10, max_retries=10, timeout=30)
