"""The names that sending a mail needs: the mail server's addresses, and what this machine calls itself.

No time limit reaches the system's resolver, so each look-up has a thread of its own, and whoever waits for it gives up
in time.
"""

import re
import socket
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock, Thread
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

OWN_NAME_LIMIT = 1.0
"""Seconds that the first connection waits for this machine's name; the others take it if it is known by then."""
NEWS_LIMIT = 1.0
"""Seconds that a look-up of a server may take whose addresses are known from an earlier one."""

_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DOMAIN = re.compile(rf"(?=.{{1,255}}$){_LABEL}(?:\.{_LABEL})+")


class Address(NamedTuple):
    """Where a server may listen."""

    family: socket.AddressFamily
    sockaddr: tuple[Any, ...]


class Addresses:
    """A server's addresses, in the order in which they are worth a try. Safe to share between threads."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._known: list[Address] = []
        """The latest answer; one that comes too late for its caller serves the next."""
        self._asked: Future[list[Address]] | None = None
        self._works: Address | None = None
        self._failures: dict[Address, int] = {}
        """When those failed that have, by the count of failures."""
        self._failed = 0
        self._lock = Lock()

    def find(self, seconds: float) -> list[Address]:
        """Returns the addresses: the one that worked last first, those last that have failed, the latest behind.

        Where no new answer comes in time, or an error, the earlier one holds.

        Raises:
            OSError, UnicodeError: there is no answer, and none is known from before.
        """
        try:
            found = self._look_up(socket.AI_NUMERICHOST)
        except (OSError, UnicodeError):
            found = self._ask(seconds)
        with self._lock:
            return sorted(found, key=lambda address: (address != self._works, self._failures.get(address, 0)))

    def _ask(self, seconds: float) -> list[Address]:
        with self._lock:
            if self._asked is None or self._asked.done():
                self._asked = _begin(self._learn)
            asked = self._asked
        try:
            return asked.result(min(seconds, NEWS_LIMIT) if self._known else seconds)
        except (OSError, UnicodeError) as error:
            if not self._known:
                if isinstance(error, TimeoutError):
                    raise TimeoutError(f"the look-up of {self._host} timed out") from None
                raise
            return self._known

    def _learn(self) -> list[Address]:
        self._known = self._look_up()
        return self._known

    def _look_up(self, flags: int = 0) -> list[Address]:
        found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=flags)
        return [Address(family, sockaddr) for family, _, _, _, sockaddr in found]

    def works(self, address: Address) -> None:
        """Takes note of a success."""
        with self._lock:
            self._works = address
            self._failures.pop(address, None)

    def fails(self, address: Address) -> None:
        """Takes note of a failure."""
        with self._lock:
            self._failed += 1
            self._failures[address] = self._failed
            if self._works == address:
                self._works = None


class OwnName:
    """What this machine calls itself to a mail server. Safe to share between threads."""

    def __init__(self, given: str | None) -> None:
        """Takes the name if it is set; else it is looked up, once."""
        self._given = given
        self._found: Future[str] | None = None
        self._patience = OWN_NAME_LIMIT
        self._lock = Lock()

    def on(self, connected: socket.socket) -> str:
        """Returns the name, or what RFC 5321 (4.1.4) wants where there is none: the address of this end, in brackets.

        No name is one that is no domain, such as `my_host` or `localhost`: some servers refuse it for every mail.
        """
        if self._given is not None:
            return self._given
        with self._lock:
            self._found = self._found or _begin(socket.getfqdn)
        try:
            name = self._found.result(self._patience)
        except (OSError, UnicodeError):
            self._patience = 0.0
            name = ""
        return name if _DOMAIN.fullmatch(name) else address_literal(connected)


def address_literal(connected: socket.socket) -> str:
    """Returns the address of this end of a connection as EHLO takes it (RFC 5321, 4.1.3)."""
    address = connected.getsockname()[0].partition("%")[0]
    return f"[IPv6:{address}]" if ":" in address else f"[{address}]"


def _begin(find: Callable[[], T]) -> Future[T]:
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(find())
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            found.set_exception(error)

    try:
        Thread(target=run, name="look-up", daemon=True).start()
    except RuntimeError:
        found.set_exception(OSError("no thread can be started for a look-up"))
    return found
