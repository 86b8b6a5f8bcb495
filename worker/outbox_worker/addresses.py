"""Looks up the mail server's addresses and this machine's own name.

The system's resolver takes no time limit. So each look-up runs in its own thread, and the caller waits for a limited
time.
"""

import re
import socket
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock, Thread
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

OWN_NAME_LIMIT = 1.0
"""Seconds that the first connection waits for this machine's name; later ones use it only if it is known by then."""
REFRESH_LIMIT = 1.0
"""Seconds to wait for a look-up if the addresses are known from an earlier one."""

_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DOMAIN = re.compile(rf"(?=.{{1,255}}$){_LABEL}(?:\.{_LABEL})+")


class Address(NamedTuple):
    """A socket address of a server."""

    family: socket.AddressFamily
    sockaddr: tuple[Any, ...]


class Addresses:
    """A server's addresses in the order to try them. Safe to share between threads."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._known: list[Address] = []
        """The latest result; one that is too late for its caller serves the next."""
        self._lookup: Future[list[Address]] | None = None
        self._reached: Address | None = None
        """The address that was reached last, unless it has failed since."""
        self._failed_at: dict[Address, int] = {}
        """The count of failures when an address last failed."""
        self._failures = 0
        self._lock = Lock()

    def find(self, seconds: float) -> list[Address]:
        """Returns the addresses: first the one that was reached last, and at the end those that failed, latest last.

        If the look-up fails or takes too long, the result of the latest one that succeeded is used.

        Args:
            seconds: limit of the look-up.

        Raises:
            OSError, UnicodeError: the look-up failed, and no earlier result is known.
        """
        try:
            addresses = self._look_up(socket.AI_NUMERICHOST)
        except (OSError, UnicodeError):
            addresses = self._resolve(seconds)
        with self._lock:
            return sorted(addresses, key=lambda address: (address != self._reached, self._failed_at.get(address, 0)))

    def _resolve(self, seconds: float) -> list[Address]:
        with self._lock:
            if self._lookup is None or self._lookup.done():
                self._lookup = _start_lookup(self._refresh)
            lookup = self._lookup
        try:
            return lookup.result(min(seconds, REFRESH_LIMIT) if self._known else seconds)
        except (OSError, UnicodeError) as error:
            if not self._known:
                if isinstance(error, TimeoutError):
                    raise TimeoutError(f"the look-up of {self._host} timed out") from None
                raise
            return self._known

    def _refresh(self) -> list[Address]:
        self._known = self._look_up()
        return self._known

    def _look_up(self, flags: int = 0) -> list[Address]:
        found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=flags)
        return [Address(family, sockaddr) for family, _, _, _, sockaddr in found]

    def mark_reached(self, address: Address) -> None:
        """Makes an address the first to try."""
        with self._lock:
            self._reached = address
            self._failed_at.pop(address, None)

    def mark_failed(self, address: Address) -> None:
        """Makes an address the last to try."""
        with self._lock:
            self._failures += 1
            self._failed_at[address] = self._failures
            if self._reached == address:
                self._reached = None


class OwnName:
    """The name that this machine sends in EHLO. Safe to share between threads."""

    def __init__(self, configured: str | None) -> None:
        """Takes the configured name; without one, the name is looked up once."""
        self._configured = configured
        self._lookup: Future[str] | None = None
        self._wait_limit = OWN_NAME_LIMIT
        self._lock = Lock()

    def for_connection(self, connected: socket.socket) -> str:
        """Returns the name, or the local address of the connection in brackets if there is none (RFC 5321, 4.1.4).

        A name that is not a domain, such as `my_host` or `localhost`, is not used: some servers reject all mails after
        it.
        """
        if self._configured is not None:
            return self._configured
        with self._lock:
            self._lookup = self._lookup or _start_lookup(socket.getfqdn)
        try:
            name = self._lookup.result(self._wait_limit)
        except (OSError, UnicodeError):
            self._wait_limit = 0.0
            name = ""
        return name if _DOMAIN.fullmatch(name) else address_literal(connected)


def address_literal(connected: socket.socket) -> str:
    """Returns the local address of a connection in the form for EHLO (RFC 5321, 4.1.3)."""
    address = connected.getsockname()[0].partition("%")[0]
    return f"[IPv6:{address}]" if ":" in address else f"[{address}]"


def _start_lookup(look_up: Callable[[], T]) -> Future[T]:
    lookup: Future[T] = Future()

    def run() -> None:
        try:
            lookup.set_result(look_up())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits for the result
            lookup.set_exception(error)

    try:
        Thread(target=run, name="look-up", daemon=True).start()
    except RuntimeError:
        lookup.set_exception(OSError("no thread can be started for a look-up"))
    return lookup
