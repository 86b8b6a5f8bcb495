"""How long a user waits for the mail: commit to mailbox.

Users sign up at a steady rate, 10, 100 and 500 a second, whatever becomes of those before them; each is a transaction
of a user and an outbox row, as the service writes it, with no delay. Timed for every row from the return of its commit
until the mail server has the end of the mail's DATA, with one relay and one worker at default settings; the first
mails, for which the worker connects, are not counted. `p50`, `p99` and `worst` are of the rows of one run; at 10 a
second, of which a run has 25, the p99 is the worst.

`polling alone` is the same with a relay that cannot LISTEN, as behind a PgBouncer in transaction mode
(`OUTBOX_TRANSACTION_POOLING`): it finds the rows when it looks. Of the two relays the one whose turn it is not is
stopped (SIGSTOP). `RQ after the commit` puts a job into RQ when the user's transaction is over, which
may lose it, and RQ's SimpleWorker sends the same mail over one connection; it reads and marks nothing in Postgres.
At 500 a second it cannot keep up, and its waits grow for as long as the users come: it gets one second of them.
The users' clock, the mail server and all of these share the machine.
"""

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from threading import Event, Thread
from typing import Any, Self

import numpy as np
from rq import Queue

import outbox
from bench.arrivals import Arrivals, note_arrivals
from bench.measure import OURS, Figure
from bench.plain_rq import QUEUE, send
from bench.process import Process
from bench.stage import Bench
from outbox.queries import query
from outbox.signup.send_verify_email import SEND_VERIFY_EMAIL, SendVerifyEmail
from outbox_service.wakeup import DEBOUNCE

POLLING, PLAIN = "polling alone", "RQ after the commit"

_SECONDS = {10: 2.5, 100: 2.0, 500: 1.5}
"""Rate -> for how long users sign up in one run."""
_PLAIN_LIMIT = 1.0
_TARGETS = {
    (100, "p50"): "at most 10 ms",
    (100, "p99"): "at most 40 ms; polling alone: the poll interval (1,000 ms) + 40 ms",
}
_WARMUP = 64
"""Mails: more than the worker has threads."""
_LOOK = 0.02
_PATIENCE = 30.0

Offer = Callable[[int, float, str], list[float]]
"""Has users sign up (a second, seconds, their name) and returns what each of them waited, in ms."""


def measure(bench: Bench) -> list[Figure]:
    """Measures the part."""
    bench.fresh()
    figures = []
    with ExitStack() as stack:
        arrivals = stack.enter_context(note_arrivals())
        settings = {"SMTP_URL": arrivals.url, "LOG_LEVEL": "info"}
        for module in ("worker", "bench.plain_rq"):
            stack.enter_context(bench.start(module, **settings))
        listening = stack.enter_context(bench.start("relay", **settings))
        polling = stack.enter_context(bench.start("relay", OUTBOX_TRANSACTION_POOLING="true", **settings))
        users = stack.enter_context(Users(bench, arrivals))
        contenders: Mapping[str, Offer] = {
            OURS: _without(polling, users.sign_up),
            POLLING: _without(listening, users.sign_up),
            PLAIN: users.plain,
        }
        for offer in contenders.values():
            offer(_WARMUP * 2, 0.5, "warm")
        for rate, seconds in _SECONDS.items():
            figures += _of_rate(bench, contenders, rate, seconds if not bench.smoke else 0.3)
    return figures


def _without(relay: Process, offer: Offer) -> Offer:
    """Returns the offer, during which that relay is stopped."""

    def stopped(rate: int, seconds: float, name: str) -> list[float]:
        relay.await_event("started")
        relay.send(signal.SIGSTOP)
        try:
            return offer(rate, seconds, f"{name}_{relay.popen.pid}")
        finally:
            relay.send(signal.SIGCONT)
            relay.check()

    return stopped


def _of_rate(bench: Bench, contenders: Mapping[str, Offer], rate: int, seconds: float) -> list[Figure]:
    waits: dict[str, list[list[float]]] = {name: [] for name in contenders}

    def one_run(name: str) -> Callable[[], float]:
        def run() -> float:
            waits[name].append(contenders[name](rate, seconds, f"user_{rate}_{len(waits[name])}"))
            return _quantile(waits[name][-1], 0.5)

        return run

    title = f"commit to mail at {rate} users/s"
    p50 = bench.in_turn(
        "wait", f"{title}, p50", "ms", {name: one_run(name) for name in contenders}, higher_is_better=False
    )
    quantiles = {name: _curve([wait for run in runs for wait in run]) for name, runs in waits.items()}
    figures = [replace(p50, target=_TARGETS.get((rate, "p50")), extra={"rate": rate, "quantiles": quantiles})]
    for what, share in (("p99", 0.99), ("worst", 1.0)):
        samples = {name: [_quantile(run, share) for run in runs] for name, runs in waits.items()}
        figures.append(replace(p50, title=f"{title}, {what}", samples=samples, target=_TARGETS.get((rate, what))))
    return figures


def _quantile(waits: list[float], share: float) -> float:
    return float(np.quantile(waits, share, method="higher"))  # one that was waited, and not between two


def _curve(waits: list[float]) -> list[float]:
    """Returns 200 quantiles, from the shortest wait to the longest, for the picture."""
    return [round(float(wait), 3) for wait in np.quantile(waits, np.linspace(0, 1, 200))]


class Users:
    """Whoever signs up, in the three ways that are compared. A context manager."""

    def __init__(self, bench: Bench, arrivals: Arrivals) -> None:
        self._arrivals = arrivals
        self._connection = bench.connect()
        self._hints = bench.connect()
        self._client = bench.client()
        self._queue = Queue(QUEUE, connection=self._client)
        self._committed = Event()
        self._closing = False
        self._hinting = Thread(target=self._hint, name="hints")

    def __enter__(self) -> Self:
        self._hinting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._committed.set()
        self._hinting.join()
        self._hints.close()
        self._connection.close()
        self._client.close()

    def _hint(self) -> None:
        """Does what `service.wakeup.Wakeup` does, for users who are no coroutines."""
        while self._committed.wait() and not self._closing:
            self._committed.clear()
            self._hints.execute(query("notify_relays"))
            time.sleep(DEBOUNCE)

    def sign_up(self, rate: int, seconds: float, name: str) -> list[float]:
        """Has users sign up, with a row each and a hint to the relays."""
        return self._offer(rate, seconds, f"{name}_h", self._write_row, lambda *_: self._committed.set())

    def plain(self, rate: int, seconds: float, name: str) -> list[float]:
        """Has users sign up, with a job in RQ each after the commit."""
        return self._offer(rate, min(seconds, _PLAIN_LIMIT), f"{name}_q", lambda *_: None, self._enqueue)

    def _offer(
        self,
        rate: int,
        seconds: float,
        name: str,
        inside: Callable[[str], None],
        after: Callable[[int, str], object],
    ) -> list[float]:
        committed: dict[str, float] = {}
        begun = time.monotonic()
        for number in range(max(2, round(rate * seconds))):
            time.sleep(max(0.0, begun + number / rate - time.monotonic()))
            user = f"{name}_{number}"
            with self._connection.transaction():
                self._connection.execute(query("add_user"), _user(user))
                inside(user)
            committed[f"{user}@example.com"] = time.monotonic()
            after(number, user)
        return self._waits(committed)

    def _write_row(self, user: str) -> None:
        outbox.add(self._connection, SEND_VERIFY_EMAIL, SendVerifyEmail(username=user), delay=0)

    def _enqueue(self, number: int, user: str) -> None:
        self._queue.enqueue(send, number, f"{user}@example.com", "A User of the Bench")

    def _waits(self, committed: dict[str, float]) -> list[float]:
        """Waits until all mails are there, and returns what each took, in ms.

        Raises:
            TimeoutError: some do not come.
        """
        came: dict[str, float] = {}
        deadline = time.monotonic() + _PATIENCE
        while len(came) < len(committed):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(committed) - len(came)} mails did not come within {_PATIENCE:g} s")
            time.sleep(_LOOK)
            came |= self._arrivals.take()
        return [(came[address] - at) * 1000 for address, at in committed.items()]


def _user(name: str) -> dict[str, Any]:
    hashed = "$argon2id$v=19$m=19456,t=2,p=1$" + "0" * 22 + "$" + "0" * 43
    return {
        "username": name,
        "hashed_password": hashed,
        "full_name": "A User of the Bench",
        "email": f"{name}@example.com",
    }
