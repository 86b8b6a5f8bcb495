"""A pool of connections to the mail server, shared by all handlers of a worker."""

import time
from collections import deque
from contextlib import suppress
from threading import Lock

from outbox.runtime import logs
from outbox.runtime.outage import Outage
from outbox_worker import deadline
from outbox_worker.mail_errors import MailServerError
from outbox_worker.mail_server import MailServer
from outbox_worker.smtp import Smtp

WAIT = 10.0
"""Maximum seconds that a mail waits for a connection; also limited to half of its attempt's time left."""
IDLE_LIMIT = 10.0
"""Seconds after which an idle connection is closed: another worker may need it."""
GROWTH_INTERVAL = 5.0
"""Seconds until a limited pool tries one more connection."""
MAX_BACKOFF_FACTOR = 30
"""Largest factor by which repeated 5xx rejections lengthen the wait between trials: they end only when an operator
acts, and some servers lock out clients after too many failed logins."""


class Connections:
    """A bounded pool, last in first out, that tracks whether the server is away. Safe to share between threads.

    If the server rejects a connection while others are open or being opened, the pool is limited to these, and tries
    one more from time to time. If there are no others, the server is away: `take` fails at once, except for one thread
    at a time that tries the server, with backoff. The server is back when it has accepted or rejected a single mail:
    some servers accept logins and reject all mails.
    """

    def __init__(self, server: MailServer, size: int) -> None:
        self._server = server
        self._size = size
        self._limit = size
        self._grows_at = 0.0
        self._limit_reason: str | None = None
        """Why the pool was limited, until `mark_available` has seen it."""
        self._is_limit_logged = False
        """Whether the limit was logged since the pool had its full size."""
        self._idle: list[tuple[Smtp, float]] = []
        """Connections and the time since when they are idle, the latest last."""
        self._lent = 0
        self._opening = 0
        self._waiters: deque[_Waiter] = deque()
        self._outage = Outage("mail server")
        self._away: MailServerError | None = None
        """Why the server is away, if it is."""
        self._trial_at = 0.0
        self._is_trial_running = False
        """Whether a thread is trying a server that is away."""
        self._rejections = 0
        """Rejections with 5xx since the server went away."""
        self._lock = Lock()

    @property
    def is_away(self) -> bool:
        """Whether the server was away when it was last tried."""
        return self._away is not None

    def take(self) -> tuple[Smtp, bool]:
        """Lends a connection, and returns whether it is new. End the loan with `put_back`, `drop` or `drop_rejected`.

        Raises:
            MailServerError: the server is away, or no connection is free.
            TimeLimitError: the attempt's time is over.
        """
        gives_up_at = time.monotonic() + min(WAIT, deadline.begin_step(2 * WAIT) / 2)
        while True:
            with self._lock:
                is_trial = self._begin_trial()
                if self._idle:
                    self._lent += 1
                    return self._idle.pop()[0], False
                waiter = None
                if is_trial or self._may_open():
                    self._opening += 1
                else:
                    waiter = _Waiter()
                    self._waiters.append(waiter)
            if waiter is None:
                if opened := self._open():
                    return opened, True
            elif handed := self._wait(waiter, gives_up_at):
                return handed, False

    def _begin_trial(self) -> bool:
        """Returns whether the server is away and the caller is the one to try it.

        Raises:
            MailServerError: the server is away, and no trial is due or one is running.
        """
        if self._away is None:
            return False
        if self._is_trial_running or time.monotonic() < self._trial_at:
            raise MailServerError(str(self._away))
        self._is_trial_running = True
        return True

    def _may_open(self) -> bool:
        """Returns whether the caller may open a connection; raises a lowered limit by one if that is due."""
        if self._lent + self._opening < self._limit:
            return True
        now = time.monotonic()
        if self._limit == self._size or now < self._grows_at:
            return False
        self._limit += 1
        self._grows_at = now + GROWTH_INTERVAL
        self._is_limit_logged &= self._limit < self._size
        return True

    def _open(self) -> Smtp | None:
        """Returns a new connection, or None if the server rejects it while others are open."""
        try:
            opened = self._server.connect()
        except MailServerError as error:
            with self._lock:
                self._opening -= 1
                self._handle_rejection(error)
            return None
        except BaseException:
            with self._lock:
                self._opening -= 1
                self._release_place()
            raise
        with self._lock:
            self._opening -= 1
            self._lent += 1
        return opened

    def _wait(self, waiter: "_Waiter", gives_up_at: float) -> Smtp | None:
        """Returns a connection that another thread put back, or None if the caller should try again to take one."""
        if not waiter.wait(max(0.0, gives_up_at - time.monotonic())):
            with self._lock:
                if not waiter.is_done:
                    self._waiters.remove(waiter)
                    raise MailServerError(f"no connection to the mail server {self._server} became free in time")
        return waiter.handed

    def drop_rejected(self, smtp: Smtp, error: MailServerError) -> None:
        """Closes a lent connection on which the server accepts no mail.

        Raises:
            MailServerError: no other connection is open, so the server is away.
        """
        smtp.close()
        with self._lock:
            self._lent -= 1
            self._handle_rejection(error)

    def _handle_rejection(self, error: MailServerError) -> None:
        """Limits the pool to the other connections; without any, marks the server as away and raises `error`."""
        if others := self._lent + self._opening + len(self._idle):
            self._limit = min(self._limit, others)
            self._grows_at = time.monotonic() + GROWTH_INTERVAL
            self._limit_reason = self._limit_reason or str(error)
            return
        if self._away is None or self._is_trial_running:  # else it failed together with others, which are counted
            is_permanent = error.reply.startswith("5")
            self._rejections += is_permanent
            if is_permanent and self._rejections == 1:  # a retry does not help: an operator must act
                logs.get().error("mail server rejected our request", refused=error.refused, reply=error.reply)
            factor = min(MAX_BACKOFF_FACTOR, 2 ** max(0, self._rejections - 1))
            self._trial_at = time.monotonic() + self._outage.away(error) * factor
        self._away, self._is_trial_running = error, False
        self._limit, self._limit_reason = self._size, None
        while self._waiters:
            self._waiters.popleft().wake(None)
        raise error

    def mark_available(self) -> None:
        """Ends an outage, and logs a limit of the pool: the server has accepted or rejected a single mail."""
        if self._away is None and self._limit_reason is None:
            return
        with self._lock:
            # A connection that is being opened may still lower the limit.
            if self._limit_reason is not None and not self._opening:
                if not self._is_limit_logged:
                    logs.get().warning(
                        "mail server limits connections", connections=self._limit, error=self._limit_reason
                    )
                self._is_limit_logged, self._limit_reason = True, None
            self._away, self._is_trial_running, self._rejections = None, False, 0
            self._outage.back()

    def put_back(self, smtp: Smtp) -> None:
        """Takes back a connection that is ready for the next mail."""
        with self._lock:
            self._is_trial_running = False
            if self._waiters:
                self._waiters.popleft().wake(smtp)
            else:
                self._lent -= 1
                self._idle.append((smtp, time.monotonic()))

    def drop(self, smtp: Smtp) -> None:
        """Closes a lent connection."""
        smtp.close()
        with self._lock:
            self._lent -= 1
            self._release_place()

    def _release_place(self) -> None:
        self._is_trial_running = False
        if self._waiters:
            self._waiters.popleft().wake(None)

    def close_idle(self, seconds: float = IDLE_LIMIT) -> None:
        """Closes connections that were idle for `seconds`."""
        if not self._idle:
            return
        with self._lock:
            limit = time.monotonic() - seconds
            closing = [smtp for smtp, since in self._idle if since <= limit]
            self._idle = [(smtp, since) for smtp, since in self._idle if since > limit]
        for smtp in closing:
            with suppress(Exception):  # the reply is not read
                smtp.send("QUIT\r\n")
            smtp.close()


class _Waiter:
    """A thread that waits for a connection. It waits on a bare lock: an `Event` costs several times as much."""

    def __init__(self) -> None:
        self.is_done = False
        self.handed: Smtp | None = None
        self._lock = Lock()
        self._lock.acquire()

    def wait(self, seconds: float) -> bool:
        return self._lock.acquire(timeout=seconds)

    def wake(self, handed: Smtp | None) -> None:
        self.is_done, self.handed = True, handed
        self._lock.release()
