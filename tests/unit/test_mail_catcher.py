"""The mail catcher of `outbox up`."""

import smtplib
from email.message import EmailMessage
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from outbox.devstack.mail_catcher import catch_mails, verification_link

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


def test_each_mail_becomes_a_file_named_after_its_recipient(tmp_path: Path) -> None:
    """The file exists before the sender gets the answer."""
    with catch_mails(tmp_path) as url:
        _send(url, _mail("alice@example.com"))
        _send(url, _mail("alice@example.com", "second"))
        files = sorted(tmp_path.iterdir())
    assert [file.name.partition("-")[2] for file in files] == ["alice@example.com.eml"] * 2
    assert "secret_code" in files[0].read_text()


def test_a_recipient_cannot_choose_another_folder(tmp_path: Path) -> None:
    """A recipient with slashes and dots makes one file in the folder."""
    folder = tmp_path / "mails"
    folder.mkdir()
    with catch_mails(folder) as url:
        _send(url, _mail('"../../up"@example.com'))
    assert len(list(folder.iterdir())) == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_stopping_does_not_wait_for_open_connections(tmp_path: Path) -> None:
    """The catcher stops while a client is connected, and closes its port."""
    with catch_mails(tmp_path) as url:
        address = urlsplit(url)
        assert address.hostname
        assert address.port
        client = smtplib.SMTP(address.hostname, address.port, timeout=10)
    client.close()
    with pytest.raises(ConnectionRefusedError):
        smtplib.SMTP(address.hostname, address.port, timeout=10)


def test_other_links_are_not_the_verification_link() -> None:
    """Only the verification link of a text is returned, or None."""
    assert verification_link(_mail("a@example.com", f"https://example.com/help\n{LINK}\n")) == LINK
    assert verification_link(_mail("a@example.com", "nothing")) is None
