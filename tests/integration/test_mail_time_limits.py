"""Time limits of sending a mail to a slow server."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

import pytest
import trustme

from outbox.errors import TimeLimitError
from outbox_worker import mail_server
from outbox_worker.mail_errors import MailError
from tests.support.mailbox import Mailbox, serve_mailbox, tls
from tests.support.mailing import close, mail, mailer, within
from tests.support.waiting import eventually

pytestmark = pytest.mark.usefixtures("pipelining")


def test_a_mail_that_the_server_is_accepting_is_not_given_up(mailbox: Mailbox) -> None:
    """If the attempt's time ends before the reply to the mail, the mailer waits a few seconds longer for it."""
    mailbox.data_delay = 1
    sender = mailer(mailbox.url, smtp_timeout=10)
    within(0.8, lambda: sender.send(mail()))
    assert len(mailbox.mails) == 1
    close(sender)


def test_a_reply_that_comes_line_by_line_takes_no_longer_than_a_step() -> None:
    """Each line comes within the time limit, but the reply does not end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            with suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    for _ in range(100):
                        connection.sendall(b"220-still here\r\n")
                        time.sleep(0.1)

        Thread(target=drip, daemon=True).start()
        sender = mailer(f"smtp://127.0.0.1:{listener.getsockname()[1]}", smtp_timeout=0.5)
        began = time.monotonic()
        with pytest.raises(MailError, match="timed out"):
            sender.send(mail())
        assert time.monotonic() - began < 2


@contextmanager
def slow_tls(mailbox: Mailbox, answer: float, handshake: float) -> Iterator[str]:
    """Runs a proxy that delays the reply to STARTTLS by `answer` seconds and the handshake by `handshake` seconds."""

    def forward(source: socket.socket, target: socket.socket) -> None:
        has_greeted = False
        with suppress(OSError):
            while data := source.recv(65536):
                if data.startswith(b"220") and has_greeted:
                    time.sleep(answer)
                if data.startswith(b"\x16\x03") and source.getpeername()[1] == mailbox.port:
                    time.sleep(handshake)
                has_greeted = True
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        client, _ = listener.accept()
        with client, socket.create_connection(("127.0.0.1", mailbox.port)) as server:
            upstream = Thread(target=forward, args=(client, server), daemon=True)
            upstream.start()
            forward(server, client)
            upstream.join(10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = Thread(target=serve, daemon=True)
        serving.start()
        yield f"smtp+starttls://127.0.0.1:{listener.getsockname()[1]}"
        serving.join(10)


def test_a_slow_handshake_leaves_less_time_for_the_next_step(authority: trustme.CA) -> None:
    """Steps after STARTTLS set their limits on the TLS socket, not on the plain one."""
    with serve_mailbox(tls_context=tls(authority)) as mailbox, slow_tls(mailbox, 0, 1) as url:
        sender = mailer(url, smtp_timeout=10)
        within(5, lambda: sender.send(mail()))
        assert len(mailbox.mails) == 1
        close(sender)


def test_a_handshake_takes_no_longer_than_the_attempt(authority: trustme.CA) -> None:
    """Its limit is computed after the reply to STARTTLS, not before."""
    with serve_mailbox(tls_context=tls(authority)) as mailbox, slow_tls(mailbox, 1.6, 5) as url:
        sender = mailer(url, smtp_timeout=10)
        began = time.monotonic()
        with pytest.raises(TimeLimitError):
            within(2, lambda: sender.send(mail()))
        assert time.monotonic() - began < 3.3
        assert not mailbox.mails


def test_waiting_for_a_connection_does_not_count_against_the_server(
    mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt's time ends while the server replies; it had less than its patience for that."""
    monkeypatch.setattr(mail_server, "PATIENCE", 2.0)
    mailbox.data_delay = 1
    sender = mailer(mailbox.url, smtp_timeout=10, mail_connections=1)
    other = Thread(target=sender.send, args=(mail("other@example.com"),))
    other.start()
    eventually(lambda: mailbox.taking, 5, "the only connection is in use")
    mailbox.mail_delay = 3
    with pytest.raises(TimeLimitError):
        within(2.5, lambda: sender.send(mail()))
    assert not sender.is_away
    other.join()
    close(sender)
