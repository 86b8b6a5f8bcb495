"""The pool of connections to the mail server: its limits, and its behaviour in an outage."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from outbox_worker import connections
from outbox_worker.mail import AttemptMails, Mailer
from outbox_worker.mail_errors import MailError, MailServerError
from tests.support.mailbox import Mailbox, free_port, serve_mailbox, serve_script
from tests.support.mailing import close, mail, mailer, send_when_back, within
from tests.support.waiting import eventually


def send_all(send: Callable[[], None], mails: int, threads: int = 32) -> Counter[type[Exception] | None]:
    """Sends mails from many threads, and counts the errors by class; None stands for a mail that was sent."""

    def one(_: int) -> type[Exception] | None:
        try:
            send()
        except Exception as error:  # noqa: BLE001 - the tests check it
            return type(error)
        return None

    with ThreadPoolExecutor(threads) as pool:
        return Counter(pool.map(one, range(mails)))


def test_threads_share_a_bounded_number_of_connections() -> None:
    """The number of threads does not matter, and each connection carries many mails."""
    with serve_script() as server:
        sender = mailer(server.url, smtp_timeout=10, mail_connections=3)
        assert send_all(lambda: sender.send(mail()), 200) == {None: 200}
        assert server.connections <= 3
        close(sender)


@pytest.mark.parametrize("limit", [1, 3])
def test_a_server_with_a_limit_of_connections_accepts_all_mails(limit: int) -> None:
    """The pool uses as many connections as the server permits. One line logs the limit, and no mail fails."""
    with serve_script(limit=limit) as server, capture_logs() as lines:
        sender = mailer(server.url, smtp_timeout=10)
        assert send_all(lambda: sender.send(mail()), 100) == {None: 100}
        assert not sender.is_away
        assert server.refused <= 8 - limit
        close(sender)
    (line,) = lines
    assert (line["event"], line["connections"]) == ("mail server limits connections", limit)
    assert "421 4.7.0 too many concurrent SMTP connections" in line["error"]


def test_a_limited_pool_grows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tries one more connection from time to time, because other clients may have closed theirs."""
    monkeypatch.setattr(connections, "GROWTH_INTERVAL", 0.1)
    with serve_script(limit=1) as server:
        sender = mailer(server.url, smtp_timeout=10)
        send_all(lambda: sender.send(mail()), 20)
        assert len(server.open) == 1
        server.limit = None

        def has_grown() -> bool:
            assert send_all(lambda: sender.send(mail()), 50) == {None: 50}
            return len(server.open) >= 3

        eventually(has_grown, 10, "the pool has grown")
        close(sender)


def test_two_workers_share_a_limit() -> None:
    """A worker with a connection sends its mails; one without gives its rows back, and no attempt counts."""
    with serve_script(limit=2) as server:
        senders = [mailer(server.url, smtp_timeout=10) for _ in range(2)]
        with ThreadPoolExecutor(2) as both:
            outcomes = list(both.map(lambda sender: send_all(lambda: sender.send(mail()), 50), senders))
        assert {kind for results in outcomes for kind in results} <= {None, MailServerError}
        assert max(results[None] for results in outcomes) == 50
        close(*senders)


def test_idle_connections_are_closed(mailbox: Mailbox) -> None:
    """Only those that were idle for long enough are closed."""
    with serve_script() as server:
        sender = mailer(server.url, smtp_timeout=10)
        sender.send(mail())
        sender.close_idle(60)
        assert len(server.open) == 1
        sender.close_idle(0)
        eventually(lambda: not server.open, 5, "it is closed")
        sender.send(mail())
        assert server.connections == 2
        close(sender)


def test_a_mail_that_gets_no_connection_in_time_does_not_count(mailbox: Mailbox) -> None:
    """Its row is given back, and the server is not away."""
    mailbox.data_delay = 3
    sender = mailer(mailbox.url, smtp_timeout=10, mail_connections=1)
    thread = threading.Thread(target=lambda: sender.send(mail()))
    thread.start()
    eventually(lambda: mailbox.taking, 5, "the first mail is being sent")
    with capture_logs() as lines, pytest.raises(MailServerError, match="became free in time"):
        within(1, lambda: sender.send(mail()))
    assert not sender.is_away
    assert not lines
    thread.join(10)
    close(sender)


@contextmanager
def sending_many(sender: Mailer, mails: int) -> Iterator[list[object]]:
    """Sends mails from as many threads. After the block, the list has the error of each, or None."""
    results: list[object] = []

    def send() -> None:
        try:
            sender.send(mail())
        except Exception as error:  # noqa: BLE001 - the tests check it
            results.append(error)
        else:
            results.append(None)

    threads = [threading.Thread(target=send) for _ in range(mails)]
    for thread in threads:
        thread.start()
    yield results
    for thread in threads:
        thread.join(10)


@pytest.mark.parametrize("step", ["MAIL", "DATA", "."])
def test_a_server_that_stops_in_the_middle_of_mails_costs_no_attempt(step: str) -> None:
    """At any step, because no connection accepts our sender any more. The outage is logged at its start and end."""
    port = free_port()
    with capture_logs() as lines:
        with serve_script({step: None}, port=port) as server:
            sender = mailer(f"smtp://127.0.0.1:{port}", smtp_timeout=10)
            with sending_many(sender, 20) as results:
                eventually(lambda: len(server.open) == 8, 5, "eight mails are being sent")
                server.stop()
        assert Counter(type(result) for result in results) == {MailServerError: 20}
        assert sender.is_away
        with serve_mailbox(port) as mailbox:
            send_when_back(sender)
            assert len(mailbox.mails) == 1
            close(sender)
    assert [line["event"] for line in lines] == ["mail server is away", "mail server is back"]


def test_one_thread_at_a_time_tries_a_server_that_is_away() -> None:
    """The others fail at once, and trials are spaced: the server is not flooded when it comes back."""
    with serve_script({"CONNECT": b"421 4.3.2 not now"}) as server:
        sender = mailer(server.url, smtp_timeout=10)
        began = time.monotonic()
        results = send_all(lambda: sender.send(mail()), 1000)
        elapsed = time.monotonic() - began
        assert results == {MailServerError: 1000}
        assert server.connections <= 8 + 5 + 3 * elapsed
        server.replies.clear()
        send_when_back(sender)
        close(sender)


def test_a_login_that_is_rejected_is_tried_ever_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers lock out clients after too many failed logins. A server that is only away is tried every second."""
    now = [time.monotonic()]
    monkeypatch.setattr(connections, "time", SimpleNamespace(monotonic=lambda: now[0]))
    trials = []
    wrong_login: dict[str, bytes | None] = {"EHLO": b"250-me\r\n250 AUTH PLAIN", "AUTH": b"535 5.7.8 not you"}
    away: dict[str, bytes | None] = {"CONNECT": b"421 4.3.2 not now"}
    for replies in (wrong_login, away):
        with serve_script(replies) as server:
            sender = mailer(server.url.replace("//", "//user:password@"), smtp_timeout=10)
            for _ in range(120):
                with pytest.raises(MailServerError):
                    sender.send(mail())
                now[0] += 1
            trials.append(server.connections)
    assert trials[0] < 20
    assert trials[1] == 120


def test_a_mail_that_breaks_its_connection_counts() -> None:
    """The server accepts our sender on another connection, so it is not away: the mail may be the cause."""
    with serve_script(resets=True) as server, capture_logs() as lines:
        sender = mailer(server.url, smtp_timeout=10)
        with pytest.raises(MailError, match="the connection to it broke") as caught:
            sender.send(mail())
        assert not isinstance(caught.value, MailServerError)
        assert not sender.is_away
        close(sender)
    assert not lines


def test_an_attempt_that_has_sent_a_mail_counts(mailbox: Mailbox) -> None:
    """Otherwise its first mail would be sent again at every attempt while the server is away for the second."""
    sender = mailer(mailbox.url)
    mails = AttemptMails(sender)
    mails.send(mail())
    mailbox.mail_reply = "421 4.3.2 shutting down"
    with pytest.raises(MailError, match="421") as caught:
        mails.send(mail())
    assert not isinstance(caught.value, MailServerError)
    with pytest.raises(MailServerError):
        AttemptMails(sender).send(mail())
    close(sender)
