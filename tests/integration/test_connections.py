"""The connections to the mail server: shared, bounded, and what an outage costs."""

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
    """Sends mails from many threads at once and returns what became of them."""

    def one(_: int) -> type[Exception] | None:
        try:
            send()
        except Exception as error:  # noqa: BLE001 - it is looked at below
            return type(error)
        return None

    with ThreadPoolExecutor(threads) as pool:
        return Counter(pool.map(one, range(mails)))


def test_threads_share_a_bounded_number_of_connections() -> None:
    """However many handlers there are, and each connection carries many mails."""
    with serve_script() as server:
        sender = mailer(server.url, smtp_timeout=10, mail_connections=3)
        assert send_all(lambda: sender.send(mail()), 200) == {None: 200}
        assert server.connections <= 3
        close(sender)


@pytest.mark.parametrize("limit", [1, 3])
def test_a_server_with_a_limit_of_connections_takes_all_mails(limit: int) -> None:
    """The pool is as many connections as it takes; who has none waits for one. One line says so, and nothing failed."""
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
    """One more is tried from time to time: others may have closed theirs."""
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
    """One that has a connection keeps its mails going, one that has none gives them back without an attempt."""
    with serve_script(limit=2) as server:
        senders = [mailer(server.url, smtp_timeout=10) for _ in range(2)]
        with ThreadPoolExecutor(2) as both:
            tried = list(both.map(lambda sender: send_all(lambda: sender.send(mail()), 50), senders))
        assert {kind for results in tried for kind in results} <= {None, MailServerError}
        assert max(results[None] for results in tried) == 50
        close(*senders)


def test_idle_connections_are_closed(mailbox: Mailbox) -> None:
    """In an orderly way, and only those that nobody has needed lately."""
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


def test_a_wait_for_a_connection_is_the_mail_servers(mailbox: Mailbox) -> None:
    """A mail that finds all connections taken for too long is given back; the server is not away."""
    mailbox.data_delay = 3
    sender = mailer(mailbox.url, smtp_timeout=10, mail_connections=1)
    thread = threading.Thread(target=lambda: sender.send(mail()))
    thread.start()
    eventually(lambda: mailbox.taking, 5, "the first mail is under way")
    with capture_logs() as lines, pytest.raises(MailServerError, match="became free in time"):
        within(1, lambda: sender.send(mail()))
    assert not sender.is_away
    assert not lines
    thread.join(10)
    close(sender)


@contextmanager
def many_under_way(sender: Mailer, mails: int) -> Iterator[list[object]]:
    """Sends mails from as many threads; in the end, the list has what became of them."""
    results: list[object] = []

    def send() -> None:
        try:
            sender.send(mail())
        except Exception as error:  # noqa: BLE001 - it is looked at below
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
def test_a_server_that_goes_in_the_middle_of_mails_costs_no_attempt(step: str) -> None:
    """Whatever step they are at: nothing takes our sender any more. One line when it goes, one when it is back."""
    port = free_port()
    with capture_logs() as lines:
        with serve_script({step: None}, port=port) as server:
            sender = mailer(f"smtp://127.0.0.1:{port}", smtp_timeout=10)
            with many_under_way(sender, 20) as results:
                eventually(lambda: len(server.open) == 8, 5, "eight are under way")
                server.stop()
        assert Counter(type(result) for result in results) == {MailServerError: 20}
        assert sender.is_away
        with serve_mailbox(port) as mailbox:
            send_when_back(sender)
            assert len(mailbox.mails) == 1
            close(sender)
    assert [line["event"] for line in lines] == ["mail server is away", "mail server is back"]


def test_only_one_tries_a_server_that_is_away() -> None:
    """The others are told at once, and the tries are spaced: no flood of connections when it comes back."""
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


def test_a_login_that_is_refused_is_tried_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers lock out who is wrong too often; a server that is just away is tried every second."""
    now = [time.monotonic()]
    monkeypatch.setattr(connections, "time", SimpleNamespace(monotonic=lambda: now[0]))
    tries = []
    wrong_login: dict[str, bytes | None] = {"EHLO": b"250-me\r\n250 AUTH PLAIN", "AUTH": b"535 5.7.8 not you"}
    away: dict[str, bytes | None] = {"CONNECT": b"421 4.3.2 not now"}
    for replies in (wrong_login, away):
        with serve_script(replies) as server:
            sender = mailer(server.url.replace("//", "//user:password@"), smtp_timeout=10)
            for _ in range(120):
                with pytest.raises(MailServerError):
                    sender.send(mail())
                now[0] += 1
            tries.append(server.connections)
    assert tries[0] < 20
    assert tries[1] == 120


def test_a_mail_that_breaks_its_connection_counts() -> None:
    """The server takes our sender on another connection, so it is not away: the mail may be the reason."""
    with serve_script(resets=True) as server, capture_logs() as lines:
        sender = mailer(server.url, smtp_timeout=10)
        with pytest.raises(MailError, match="the connection to it broke") as caught:
            sender.send(mail())
        assert not isinstance(caught.value, MailServerError)
        assert not sender.is_away
        close(sender)
    assert not lines


def test_an_attempt_that_has_sent_a_mail_counts(mailbox: Mailbox) -> None:
    """Its first mail would go out again at each try, as often as the server is away for the second."""
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
