"""The connections to the mail server that all handlers of a worker share."""

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
"""Seconds that a mail may wait for a connection, but no more than half of what its attempt has left."""
IDLE = 10.0
"""Seconds after which a connection that nobody needs is closed: another worker may need it."""
GROWING = 5.0
"""Seconds until one connection more is tried than the server has taken."""
LONGEST_BACKOFF = 30
"""How many times the usual wait it may be until a server is tried again that has refused us with 5xx each time: some
lock out who logs in wrongly too often, and it will not pass by itself."""


class Connections:
    """A bounded pool, last in first out, and what is known of the server behind it. Safe to share between threads.

    Where the server refuses a connection while others are open or being opened, the pool is limited to these, and tries
    one more from time to time. Where there are no others, the server is away: whoever wants a connection is told so at
    once, but for one at a time that tries it, with backoff. It is back when it has judged a mail: some let us in and
    refuse all mails.
    """

    def __init__(self, server: MailServer, most: int) -> None:
        self._server = server
        self._most = most
        self._limit = most
        self._grow_at = 0.0
        self._refusal: str | None = None
        """Why the pool was limited lately."""
        self._is_limit_told = False
        """Whether the log has said so since the pool had its full size."""
        self._idle: list[tuple[Smtp, float]] = []
        """Since when; the one that was used last is the last."""
        self._lent = 0
        self._opening = 0
        self._waiting: deque[_Waiting] = deque()
        self._outage = Outage("mail server")
        self._away: MailServerError | None = None
        """Why the server is away, if it is."""
        self._try_at = 0.0
        self._is_tried = False
        """Whether a thread tries a server that is away."""
        self._refusals = 0
        """How often in a row it was tried and has refused us with 5xx."""
        self._lock = Lock()

    @property
    def is_away(self) -> bool:
        """Whether the server is away, as far as is known."""
        return self._away is not None

    def take(self) -> tuple[Smtp, bool]:
        """Lends a connection, and says whether it is new. It is to be put back, dropped, or reported as refused.

        Raises:
            MailServerError: the server is away, or has no connection to spare.
            TimeLimitError: the attempt's time is over.
        """
        gives_up_at = time.monotonic() + min(WAIT, deadline.begin_step(2 * WAIT) / 2)
        while True:
            with self._lock:
                is_trial = self._check_away()
                if self._idle:
                    self._lent += 1
                    return self._idle.pop()[0], False
                waiting = None
                if is_trial or self._has_room():
                    self._opening += 1
                else:
                    waiting = _Waiting()
                    self._waiting.append(waiting)
            if waiting is None:
                if opened := self._open():
                    return opened, True
            elif handed := self._wait(waiting, gives_up_at):
                return handed, False

    def _check_away(self) -> bool:
        """Returns whether the caller is to try a server that is away."""
        if self._away is None:
            return False
        if self._is_tried or time.monotonic() < self._try_at:
            raise MailServerError(str(self._away))
        self._is_tried = True
        return True

    def _has_room(self) -> bool:
        if self._lent + self._opening < self._limit:
            return True
        now = time.monotonic()
        if self._limit == self._most or now < self._grow_at:
            return False
        self._limit += 1
        self._grow_at = now + GROWING
        self._is_limit_told &= self._limit < self._most
        return True

    def _open(self) -> Smtp | None:
        """Returns a new connection, or nothing where the server refuses it and others are open."""
        try:
            opened = self._server.connect()
        except MailServerError as error:
            with self._lock:
                self._opening -= 1
                self._note_refused(error)
            return None
        except BaseException:
            with self._lock:
                self._opening -= 1
                self._free_place()
            raise
        with self._lock:
            self._opening -= 1
            self._lent += 1
        return opened

    def _wait(self, waiting: "_Waiting", gives_up_at: float) -> Smtp | None:
        """Returns a connection that another thread has put back, or None where it is worth another look."""
        if not waiting.wait(max(0.0, gives_up_at - time.monotonic())):
            with self._lock:
                if not waiting.is_over:
                    self._waiting.remove(waiting)
                    raise MailServerError(f"no connection to the mail server {self._server} came free in time")
        return waiting.handed

    def refused(self, smtp: Smtp, error: MailServerError) -> None:
        """Closes a connection that was lent, on which the server takes no mail.

        Raises:
            MailServerError: no other is open, so the server is away.
        """
        smtp.close()
        with self._lock:
            self._lent -= 1
            self._note_refused(error)

    def _note_refused(self, error: MailServerError) -> None:
        if others := self._lent + self._opening + len(self._idle):
            self._limit = min(self._limit, others)
            self._grow_at = time.monotonic() + GROWING
            self._refusal = self._refusal or str(error)
            return
        if self._away is None or self._is_tried:  # else it has failed along with others
            is_refusal = error.reply.startswith("5")
            self._refusals += is_refusal
            if is_refusal and self._refusals == 1:  # a retry alone does not help: an operator must look
                logs.get().error("mail server rejected our request", refused=error.refused, reply=error.reply)
            backoff = min(LONGEST_BACKOFF, 2 ** max(0, self._refusals - 1))
            self._try_at = time.monotonic() + self._outage.away(error) * backoff
        self._away, self._is_tried = error, False
        self._limit, self._refusal = self._most, None
        while self._waiting:
            self._waiting.popleft().end(None)
        raise error

    def works(self) -> None:
        """Takes note that the server has judged a mail."""
        if self._away is None and self._refusal is None:
            return
        with self._lock:
            if self._refusal is not None and not self._opening:  # else the next to be refused is not counted yet
                if not self._is_limit_told:
                    logs.get().warning("mail server limits connections", connections=self._limit, error=self._refusal)
                self._is_limit_told, self._refusal = True, None
            self._away, self._is_tried, self._refusals = None, False, 0
            self._outage.back()

    def put_back(self, smtp: Smtp) -> None:
        """Takes a connection back that is ready for the next mail."""
        with self._lock:
            self._is_tried = False
            if self._waiting:
                self._waiting.popleft().end(smtp)
            else:
                self._lent -= 1
                self._idle.append((smtp, time.monotonic()))

    def drop(self, smtp: Smtp) -> None:
        """Closes a connection that was lent."""
        smtp.close()
        with self._lock:
            self._lent -= 1
            self._free_place()

    def _free_place(self) -> None:
        self._is_tried = False
        if self._waiting:
            self._waiting.popleft().end(None)

    def close_idle(self, seconds: float = IDLE) -> None:
        """Closes the connections that nobody has needed for so many seconds."""
        if not self._idle:
            return
        with self._lock:
            limit = time.monotonic() - seconds
            closing = [smtp for smtp, since in self._idle if since <= limit]
            self._idle = [(smtp, since) for smtp, since in self._idle if since > limit]
        for smtp in closing:
            with suppress(Exception):  # nobody waits for the answer
                smtp.send("QUIT\r\n")
            smtp.close()


class _Waiting:
    """A thread that waits for a connection, on a bare lock: an `Event` costs several times as much."""

    def __init__(self) -> None:
        self.is_over = False
        self.handed: Smtp | None = None
        self._over = Lock()
        self._over.acquire()

    def wait(self, seconds: float) -> bool:
        return self._over.acquire(timeout=seconds)

    def end(self, handed: Smtp | None) -> None:
        self.is_over, self.handed = True, handed
        self._over.release()
