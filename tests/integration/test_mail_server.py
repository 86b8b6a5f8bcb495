"""Connecting to the mail server: look-ups that hang, dead addresses, and the name in EHLO."""

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
"""A host name that only `Resolver` knows."""


class Resolver:
    """Stands for the system's resolver. For `HOST`, it returns what a test says, or hangs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ports: list[int] = []
        self.error: OSError | None = None
        self.answers = threading.Event()
        self.answers.set()
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self.find)

    def find(self, host: str, *args: Any, **options: Any) -> list[Any]:
        """Replaces `socket.getaddrinfo`."""
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
    """A resolver that hangs no longer than the test runs."""
    installed = Resolver(monkeypatch)
    yield installed
    installed.answers.set()


@pytest.fixture
def set_own_name(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], str]], None]:
    """Replaces the look-up of this machine's name."""

    def replace(look_up: Callable[[], str]) -> None:
        monkeypatch.setattr(socket, "getfqdn", look_up)

    return replace


def test_a_resolver_that_hangs_stops_no_mail_to_a_numeric_address(
    set_own_name: Callable[[Callable[[], str]], None],
) -> None:
    """Our own name is looked up once, and EHLO has the local address instead."""
    lookups: list[int] = []
    answers = threading.Event()

    def look_up_slowly() -> str:
        lookups.append(1)
        answers.wait(8)
        return "late.example.com"

    set_own_name(look_up_slowly)
    with serve_script() as server:
        sender = mailer(server.url, smtp_timeout=10)
        for _ in range(3):
            within(5, lambda: sender.send(mail()))
            close(sender)
        assert server.helos == ["[127.0.0.1]"] * 3
    assert len(lookups) == 1
    answers.set()


@pytest.mark.parametrize("name", ["my_host.example.com", "localhost", "", "-x.example.com", "exämple.com"])
def test_an_own_name_that_is_not_a_domain_is_not_sent(
    name: str, mailbox: Mailbox, set_own_name: Callable[[Callable[[], str]], None]
) -> None:
    """Servers reject all mails after such an EHLO (501 from Exim)."""
    set_own_name(lambda: name)
    sender = mailer(mailbox.url)
    sender.send(mail())
    assert mailbox.helos == ["[127.0.0.1]"]
    close(sender)


def test_a_domain_is_sent(mailbox: Mailbox, set_own_name: Callable[[Callable[[], str]], None]) -> None:
    """EHLO has the name that was looked up, or the one in the settings."""
    set_own_name(lambda: "worker-1.example.com")
    for options, name in [({}, "worker-1.example.com"), ({"smtp_helo": "out.example.org"}, "out.example.org")]:
        sender = mailer(mailbox.url, **options)
        sender.send(mail())
        assert mailbox.helos[-1] == name
        close(sender)


def test_a_look_up_that_hangs(mailbox: Mailbox, resolver: Resolver) -> None:
    """It takes no longer than a step, and if an earlier look-up succeeded, its result is used."""
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
    """The server is away, unless an earlier look-up succeeded: then its result is used."""
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
    """The next connection goes to the new address."""
    sender = mailer(f"smtp://{HOST}:25")
    for _ in range(2):
        with serve_mailbox() as mailbox:
            resolver.ports = [mailbox.port]
            sender.send(mail())
            assert len(mailbox.mails) == 1
        close(sender)


@contextmanager
def dead_ports(count: int, *, accepts: bool) -> Iterator[list[socket.socket]]:
    """Opens listeners that send nothing. They accept connections only if `accepts`."""
    with ExitStack() as stack:
        listeners = []
        for _ in range(count):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=9 if accepts else 0))
            for _ in range(0 if accepts else 4):  # they fill the backlog, so that the next one waits
                waiting = stack.enter_context(socket.socket())
                waiting.settimeout(0)
                waiting.connect_ex(listener.getsockname())
            listener.settimeout(0)
            listeners.append(listener)
        yield listeners


def port_of(listener: socket.socket) -> int:
    """Returns the port that a listener uses."""
    return int(listener.getsockname()[1])


@pytest.mark.parametrize("kind", ["unreachable", "silent"])
def test_a_live_address_behind_dead_ones_is_reached_and_remembered(
    kind: str, mailbox: Mailbox, resolver: Resolver
) -> None:
    """It is reached in one attempt, and is tried first from then on."""
    with dead_ports(3, accepts=kind == "silent") as dead:
        resolver.ports = [*map(port_of, dead), mailbox.port]
        sender = mailer(f"smtp://{HOST}:25", smtp_timeout=10)
        within(4, lambda: sender.send(mail()))
        close(sender)
        began = time.monotonic()
        within(4, lambda: sender.send(mail()))
        close(sender)
        assert time.monotonic() - began < 2, "the dead ones are not tried again, which would take three seconds"
        assert len(mailbox.mails) == 2


def test_addresses_that_failed_are_tried_last(mailbox: Mailbox, resolver: Resolver) -> None:
    """If one attempt has no time for all dead addresses, the next attempt tries the others."""
    with dead_ports(8, accepts=True) as dead:
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
    """Their number does not matter."""
    with dead_ports(8, accepts=False) as dead:
        resolver.ports = [port_of(listener) for listener in dead]
        sender = mailer(f"smtp://{HOST}:25", smtp_timeout=10)
        began = time.monotonic()
        with pytest.raises((MailError, TimeLimitError)):
            within(1, lambda: sender.send(mail()))
        assert time.monotonic() - began < 3
