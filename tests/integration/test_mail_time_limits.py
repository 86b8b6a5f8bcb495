"""Time limits of sending a mail: each step ends with the attempt, even if the server is slow."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

import pytest
import trustme

from outbox.errors import TimeLimitError
from outbox_worker.mail_errors import MailError
from tests.support.mailbox import Mailbox, serve_mailbox, tls
from tests.support.mailing import close, mail, mailer, within

pytestmark = pytest.mark.usefixtures("pipelining")


def test_a_mail_that_the_server_is_taking_is_not_given_up(mailbox: Mailbox) -> None:
    """The attempt's time is over before the answer to the mail comes: it is waited for a few seconds more."""
    mailbox.data_delay = 1
    sender = mailer(mailbox.url, smtp_timeout=10)
    within(0.8, lambda: sender.send(mail()))
    assert len(mailbox.mails) == 1
    close(sender)


def test_a_server_that_answers_in_drips_takes_no_longer_than_a_step() -> None:
    """Each of its lines comes in time, and the answer never ends."""
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
    """Passes everything on to a mailbox, but for its answer to STARTTLS and its handshake: these come seconds later."""

    def pass_on(source: socket.socket, target: socket.socket) -> None:
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
            asking = Thread(target=pass_on, args=(client, server), daemon=True)
            asking.start()
            pass_on(server, client)
            asking.join(10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = Thread(target=serve, daemon=True)
        serving.start()
        yield f"smtp+starttls://127.0.0.1:{listener.getsockname()[1]}"
        serving.join(10)


def test_a_slow_handshake_leaves_less_time_for_the_next_step(authority: trustme.CA) -> None:
    """The steps after STARTTLS are limited on the connection in TLS, and not on the one before."""
    with serve_mailbox(tls_context=tls(authority)) as mailbox, slow_tls(mailbox, 0, 1) as url:
        sender = mailer(url, smtp_timeout=10)
        within(5, lambda: sender.send(mail()))
        assert len(mailbox.mails) == 1
        close(sender)


def test_a_handshake_takes_no_longer_than_the_attempt(authority: trustme.CA) -> None:
    """What is left for it counts from the answer to STARTTLS, and not from the question."""
    with serve_mailbox(tls_context=tls(authority)) as mailbox, slow_tls(mailbox, 1.6, 5) as url:
        sender = mailer(url, smtp_timeout=10)
        began = time.monotonic()
        with pytest.raises(TimeLimitError):
            within(2, lambda: sender.send(mail()))
        assert time.monotonic() - began < 3.3
        assert not mailbox.mails
