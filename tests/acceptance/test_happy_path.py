"""A user signs up and is verified when nothing fails."""

from tests.support.mailbox import Mailbox, link_in
from tests.support.processes import Stack
from tests.support.waiting import eventually


def test_the_link_in_the_mail_verifies_the_user(stack: Stack, mailbox: Mailbox) -> None:
    """A client creates a user; the mail arrives, and its link verifies the user."""
    for module in ("service", "relay", "worker"):
        stack.run(module, VERIFY_EMAIL_DELAY="2")

    status, answer = stack.create_user("alice")
    assert status == 201
    assert "hashed_password" not in answer["user"]

    mail = eventually(lambda: mailbox.to("alice@example.com"), 10, "the mail")[0]
    status, answer = stack.get(link_in(mail).removeprefix(stack.url))
    assert (status, answer) == (200, {"is_verified": True})
