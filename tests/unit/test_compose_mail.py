"""The content of the verification mail, and what cannot get into its headers."""

from datetime import UTC
from email import message_from_bytes, policy
from email.message import EmailMessage
from email.utils import parsedate_to_datetime
from typing import Any

import pytest

from outbox.errors import SettingsError
from outbox.message import alternatives
from outbox.runtime.settings import WorkerSettings
from outbox_worker.handlers.send_verify_email import compose, message_id

SENT_AT = 1_700_000_000.0
LINK = "https://example.com/app/v1/verify_email?email_id=1&secret_code=abc"


def settings(**changes: Any) -> WorkerSettings:
    """Returns a worker's settings."""
    return WorkerSettings.model_validate(
        {
            "database_url": "postgresql://nowhere/none",
            "redis_url": "redis://nowhere",
            "smtp_server": "smtp://nowhere",
            "mail_from": "Sign-up <no-reply@example.com>",
            "public_url": "https://example.com/app",
            "secret_key": "k" * 32,
            **changes,
        }
    )


def mail_of(
    settings: WorkerSettings, recipient: str = "a@example.com", name: str = "Alice", link: str = LINK
) -> EmailMessage:
    """Returns the mail of row 7, parsed."""
    read = message_from_bytes(wire(settings, recipient, name, link), policy=policy.default)
    assert isinstance(read, EmailMessage)
    assert not read.defects
    return read


def wire(settings: WorkerSettings, recipient: str = "a@example.com", name: str = "Alice", link: str = LINK) -> bytes:
    """Returns the mail of row 7 as it is sent; checks the ends and lengths of its lines."""
    content = compose(settings, 7, recipient, name, link, username="alice", sent_at=SENT_AT).content
    assert content.count(b"\n") == content.count(b"\r\n") == content.count(b"\r")
    assert max(map(len, content.split(b"\r\n"))) <= 300
    return content


def body(mail: EmailMessage, kind: str) -> str:
    """Returns the text of one part."""
    part = mail.get_body((kind,))
    assert part is not None
    return str(part.get_content())


def test_both_parts_carry_the_link() -> None:
    """The text part and the HTML part have the name, the full link and its lifetime."""
    mail = mail_of(settings(), "alice@example.com", "Alice Liddell")
    assert [part.get_content_type() for part in mail.iter_parts()] == ["text/plain", "text/html"]
    assert LINK in body(mail, "plain")
    assert f'href="{LINK.replace("&", "&amp;")}"' in body(mail, "html")
    for kind in ("plain", "html"):
        assert "Hello Alice Liddell," in body(mail, kind)
        assert "15 minutes" in body(mail, kind)
    assert (mail["To"], mail["From"]) == ("alice@example.com", "Sign-up <no-reply@example.com>")
    assert mail["Subject"]
    assert parsedate_to_datetime(mail["Date"]).replace(tzinfo=UTC).timestamp() == SENT_AT
    assert mail["Auto-Submitted"] == "auto-generated"


def test_both_parts_name_the_account_that_a_click_confirms() -> None:
    """Another person may have signed up with the reader's address: a click would verify that person's account."""
    mail = mail_of(settings(public_url="https://example.com:8443/app"), "victim@example.com", "Eve")
    for kind in ("plain", "html"):
        text = " ".join(body(mail, kind).split())
        assert "the account alice at example.com was created with this address" in text
        assert "confirm that it is yours" in text
        assert "If you did not sign up, ignore this mail: someone else has the password of this account" in text


@pytest.mark.parametrize(("seconds", "text"), [(900, "15 minutes"), (60, "1 minute"), (1, "1 minute"), (90, "2 min")])
def test_the_lifetime_is_shown_in_minutes(seconds: float, text: str) -> None:
    """Rounded, and never 0."""
    mail = mail_of(settings(link_lifetime=seconds))
    assert f"It works for {text}" in body(mail, "plain")


def test_the_message_id_depends_on_row_link_and_deployment() -> None:
    """It is the same at every attempt, and differs by row, link and secret key."""
    here = settings()
    assert message_id(here, 7, LINK) == message_id(settings(), 7, LINK) == mail_of(here)["Message-ID"]
    assert message_id(here, 7, LINK).endswith("@example.com>")
    others = [(here, 7, LINK), (here, 8, LINK), (here, 7, f"{LINK}1"), (settings(secret_key="x" * 32), 7, LINK)]
    assert len({message_id(*arguments) for arguments in others}) == 4


@pytest.mark.parametrize(
    "name", ["Eve\r\nBcc: victim@example.com", "Eve\nX: y", "Eve\u2028Bcc: v@example.com", "E\0ve"]
)
def test_a_name_never_gets_into_the_headers(name: str) -> None:
    """A name with a line break or a null character is only in the body."""
    mail = mail_of(settings(), "eve@example.com", name)
    assert sorted(mail.keys()) == sorted(
        ["From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "MIME-Version", "Content-Type"]
    )
    assert "Eve" not in "".join(str(value) for value in mail.values())


@pytest.mark.parametrize("recipient", ["a@example.com\r\nBcc: victim@example.com", "a@example.com\nX: y"])
def test_an_address_with_a_line_break_makes_no_mail(recipient: str) -> None:
    """The service rejects such an address; if the table has one anyway, no mail is made."""
    with pytest.raises(ValueError, match="linefeed"):
        compose(settings(), 7, recipient, "Alice", LINK, username="alice", sent_at=SENT_AT)


@pytest.mark.parametrize("sender", ["a@example.com\r\nBcc: v@example.com", "A\n <a@example.com>", "a@b\u2028Bcc: x@y"])
def test_a_sender_with_a_line_break_is_a_wrong_setting(sender: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MAIL_FROM is checked at the start."""
    values = {
        "DATABASE_URL": "postgresql://nowhere/none",
        "REDIS_URL": "redis://nowhere",
        "SMTP_URL": "smtp://nowhere",
        "MAIL_FROM": sender,
        "PUBLIC_URL": "https://example.com",
        "SECRET_KEY": "k" * 32,
    }
    for variable, value in values.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match="MAIL_FROM"):
        WorkerSettings.from_environment()


def test_a_name_is_text_in_html() -> None:
    """Markup in a name is shown, not run."""
    mail = mail_of(settings(), "eve@example.com", "<script>alert('x')</script> & \"co\"")
    html = body(mail, "html")
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "<script>" in body(mail, "plain"), "plain text needs no escapes"


def test_an_international_domain_is_ascii_in_every_header() -> None:
    """Every mail server accepts the ASCII form of a domain; an encoded word in an address is invalid."""
    ours = settings(mail_from="Grüße <no-reply@exämple.com>")
    assert b"To: user@xn--exmple-cua.com\r\n" in wire(ours, "user@exämple.com")
    assert b"<no-reply@xn--exmple-cua.com>" in wire(ours, "user@exämple.com")
    mail = mail_of(ours, "user@exämple.com")
    assert mail["Message-ID"].endswith("@xn--exmple-cua.com>")
    assert mail["From"].addresses[0].display_name == "Grüße"


def test_long_names_and_addresses_survive() -> None:
    """Folding does not break the longest ones that the service accepts."""
    recipient = f"{'a' * 64}@{'b' * 60}.{'c' * 60}.com"
    mail = mail_of(settings(), recipient, "N" * 100, LINK + "x" * 900)
    assert mail["To"] == recipient
    assert "N" * 100 in body(mail, "plain")
    assert LINK + "x" * 900 in body(mail, "plain")


@pytest.mark.parametrize("body", ["x" * 200, "x" * 200 + "\n", "a\nb", "a\r\nb\r", "", "=\n."])
def test_every_line_ends_with_crlf(body: str) -> None:
    """Mail servers reject bare line feeds, which attackers use to smuggle mails."""
    message = alternatives("alice@example.com", {"Subject": "Hello"}, text=body, html=body)
    content = message.content
    assert content.count(b"\n") == content.count(b"\r\n") == content.count(b"\r")
    parsed = message_from_bytes(content, policy=policy.default).get_body(("plain",))
    assert parsed is not None
    assert parsed.get_content().split() == body.split()
