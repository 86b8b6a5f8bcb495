"""The mail catcher of `outbox up`."""

import smtplib
from email.message import EmailMessage
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from outbox.devstack.mail_catcher import catch_mails, link

LINK = "http://127.0.0.1:8080/v1/verify_email?email_id=1&secret_code=" + "0a" * 32


def _mail(to: str, text: str = f"Hello,\n\nplease open {LINK}\n") -> EmailMessage:
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "no-reply@example.com", to, "Please verify"
    mail.set_content(text)
    return mail


def _send(url: str, mail: EmailMessage) -> None:
    address = urlsplit(url)
    assert address.hostname
    assert address.port
    with smtplib.SMTP(address.hostname, address.port, timeout=10) as client:
        client.send_message(mail)


def test_each_mail_is_kept_whole_under_its_recipient(tmp_path: Path) -> None:
    """Every mail is a file of its own by the time the sender hears that it was taken."""
    with catch_mails(tmp_path) as url:
        _send(url, _mail("alice@example.com"))
        _send(url, _mail("alice@example.com", "second"))
        files = sorted(tmp_path.iterdir())
    assert [file.name.partition("-")[2] for file in files] == ["alice@example.com.eml"] * 2
    assert "secret_code" in files[0].read_text()


def test_a_recipient_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    """A recipient with slashes and dots stays one file in the folder."""
    folder = tmp_path / "mails"
    folder.mkdir()
    with catch_mails(folder) as url:
        _send(url, _mail('"../../up"@example.com'))
    assert len(list(folder.iterdir())) == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_the_end_does_not_wait_for_a_client_that_stays(tmp_path: Path) -> None:
    """The catcher stops with a connection open, and its port answers no more."""
    with catch_mails(tmp_path) as url:
        address = urlsplit(url)
        assert address.hostname
        assert address.port
        client = smtplib.SMTP(address.hostname, address.port, timeout=10)
    client.close()
    with pytest.raises(ConnectionRefusedError):
        smtplib.SMTP(address.hostname, address.port, timeout=10)


def test_the_link_is_the_verification_link_of_the_text() -> None:
    """Other links in the text are passed over; a text without any has none."""
    assert link(_mail("a@example.com", f"https://example.com/help\n{LINK}\n")) == LINK
    assert link(_mail("a@example.com", "nothing")) is None
