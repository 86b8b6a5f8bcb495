"""Reaching the mail server: names whose look-up hangs, addresses that are dead, and what this machine calls itself."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from outbox.errors import TimeLimitError
from outbox_worker.mail_errors import MailError
from tests.support.mailbox import Mailbox, serve_mailbox, serve_script
from tests.support.mailing import close, mail, mailer, send_when_back, within
from tests.support.waiting import eventually

HOST = "mail.test"
"""What no resolver knows but `Resolver`."""


class Resolver:
    """The system's resolver, but for one name: it answers what a test says, or hangs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ports: list[int] = []
        self.error: OSError | None = None
        self.answers = threading.Event()
        self.answers.set()
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self.find)

    def find(self, host: str, *args: Any, **options: Any) -> list[Any]:
        """Stands for `socket.getaddrinfo`."""
        if host != HOST:
            return list(self._real(host, *args, **options))
        if options.get("flags"):
            raise socket.gaierror(socket.EAI_NONAME, "not numeric")
        assert self.answers.wait(30)
        if self.error is not None:
            raise self.error
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in self.ports]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    """A resolver that hangs no longer than the test."""
    made = Resolver(monkeypatch)
    yield made
    made.answers.set()


@pytest.fixture
def name_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], str]], None]:
    """Sets what this machine's name is found to be."""

    def set_name(find: Callable[[], str]) -> None:
        monkeypatch.setattr(socket, "getfqdn", find)

    return set_name


def test_a_silent_resolver_stops_no_mail_to_an_address(
    name_of_this_machine: Callable[[Callable[[], str]], None],
) -> None:
    """Our own name is asked for once and not waited for; the server hears this end's address instead."""
    asked: list[int] = []
    answers = threading.Event()

    def never() -> str:
        asked.append(1)
        answers.wait(8)
        return "late.example.com"

    name_of_this_machine(never)
    with serve_script() as server:
        sender = mailer(server.url, smtp_timeout=10)
        for _ in range(3):
            within(5, lambda: sender.send(mail()))
            close(sender)
        assert server.helos == ["[127.0.0.1]"] * 3
    assert len(asked) == 1
    answers.set()


@pytest.mark.parametrize("name", ["my_host.example.com", "localhost", "", "-x.example.com", "exämple.com"])
def test_a_name_that_is_no_domain_is_not_said(
    name: str, mailbox: Mailbox, name_of_this_machine: Callable[[Callable[[], str]], None]
) -> None:
    """Servers refuse all mails after it (501 from Exim)."""
    name_of_this_machine(lambda: name)
    sender = mailer(mailbox.url)
    sender.send(mail())
    assert mailbox.helos == ["[127.0.0.1]"]
    close(sender)


def test_a_domain_is_said(mailbox: Mailbox, name_of_this_machine: Callable[[Callable[[], str]], None]) -> None:
    """The name that is found, or the one that the settings say."""
    name_of_this_machine(lambda: "worker-1.example.com")
    for options, name in [({}, "worker-1.example.com"), ({"smtp_helo": "out.example.org"}, "out.example.org")]:
        sender = mailer(mailbox.url, **options)
        sender.send(mail())
        assert mailbox.helos[-1] == name
        close(sender)


def test_a_look_up_that_hangs(mailbox: Mailbox, resolver: Resolver) -> None:
    """It takes no longer than a step where the server was never found, and else the earlier answer holds."""
    resolver.ports = [mailbox.port]
    resolver.answers.clear()
    sender = mailer(f"smtp://{HOST}:25")
    began = time.monotonic()
    with pytest.raises(MailError, match=r"the look-up of mail\.test timed out"):
        sender.send(mail())
    assert time.monotonic() - began < 5
    resolver.answers.set()
    send_when_back(sender)
    close(sender)
    resolver.answers.clear()
    sender.send(mail())
    close(sender)
    assert len(mailbox.mails) == 2


def test_a_look_up_that_fails(mailbox: Mailbox, resolver: Resolver) -> None:
    """It is the server that is away, and where it was found before, it is still there."""
    resolver.error = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    sender = mailer(f"smtp://{HOST}:25")
    with pytest.raises(MailError, match="Temporary failure in name resolution"):
        sender.send(mail())
    resolver.error, resolver.ports = None, [mailbox.port]
    send_when_back(sender)
    close(sender)
    resolver.error = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    sender.send(mail())
    close(sender)
    assert len(mailbox.mails) == 2


def test_a_server_that_moves_is_followed(resolver: Resolver) -> None:
    """A new answer is taken at the next connection."""
    sender = mailer(f"smtp://{HOST}:25")
    for _ in range(2):
        with serve_mailbox() as mailbox:
            resolver.ports = [mailbox.port]
            sender.send(mail())
            assert len(mailbox.mails) == 1
        close(sender)


@contextmanager
def dead_ports(count: int, *, takes: bool) -> Iterator[list[socket.socket]]:
    """Listeners that say nothing; unless it `takes` them, a connection to one does not even come about."""
    with ExitStack() as stack:
        listeners = []
        for _ in range(count):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=9 if takes else 0))
            for _ in range(0 if takes else 4):  # connections that nobody accepts: the next one waits
                waiting = stack.enter_context(socket.socket())
                waiting.settimeout(0)
                waiting.connect_ex(listener.getsockname())
            listener.settimeout(0)
            listeners.append(listener)
        yield listeners


def port_of(listener: socket.socket) -> int:
    """Returns where it listens."""
    return int(listener.getsockname()[1])


@pytest.mark.parametrize("kind", ["unreachable", "silent"])
def test_a_live_address_behind_dead_ones_is_reached_and_remembered(
    kind: str, mailbox: Mailbox, resolver: Resolver
) -> None:
    """In one attempt, and from then on it is the first."""
    with dead_ports(3, takes=kind == "silent") as dead:
        resolver.ports = [*map(port_of, dead), mailbox.port]
        sender = mailer(f"smtp://{HOST}:25", smtp_timeout=10)
        within(4, lambda: sender.send(mail()))
        close(sender)
        began = time.monotonic()
        within(4, lambda: sender.send(mail()))
        close(sender)
        assert time.monotonic() - began < 2, "it has not tried the dead ones again, which takes three seconds"
        assert len(mailbox.mails) == 2


def test_what_was_tried_in_vain_is_tried_last(mailbox: Mailbox, resolver: Resolver) -> None:
    """More dead addresses than one attempt has time for: the next attempt goes on with the others."""
    with dead_ports(8, takes=True) as dead:
        resolver.ports = [*map(port_of, dead), mailbox.port]
        sender = mailer(f"smtp://{HOST}:25", smtp_timeout=0.3)

        def is_sent() -> bool:
            try:
                within(0.5, lambda: sender.send(mail()))
            except (MailError, TimeLimitError):
                return False
            return True

        eventually(is_sent, 10, "the live address is reached")
        close(sender)
    assert len(mailbox.mails) == 1


def test_dead_addresses_take_no_longer_than_the_attempt(resolver: Resolver) -> None:
    """However many there are."""
    with dead_ports(8, takes=False) as dead:
        resolver.ports = [port_of(listener) for listener in dead]
        sender = mailer(f"smtp://{HOST}:25", smtp_timeout=10)
        began = time.monotonic()
        with pytest.raises((MailError, TimeLimitError)):
            within(1, lambda: sender.send(mail()))
        assert time.monotonic() - began < 3
