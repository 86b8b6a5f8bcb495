"""Latency from commit to mail.

Users sign up at a constant rate of 10, 100 or 500 per second, independent of how fast mails are sent. Each sign-up is a
transaction with a user and an outbox row, as the service writes it, without delay. Latency is the time from the return
of the commit until the mail server has received the end of DATA, with one relay and one worker at default settings. The
first mails, for which the worker opens its connections, do not count. `p50`, `p99` and `worst` are of the rows of one
run. At 10 per second, a run has 25 rows, so its p99 is the worst.

`polling only` is the same with a relay that cannot LISTEN, as behind a PgBouncer in transaction mode
(`OUTBOX_TRANSACTION_POOLING`): it finds rows when it polls. One of the two relays is stopped (SIGSTOP) while the other
is measured. `RQ after the commit` enqueues a job in RQ after the commit of the user, which may lose it. RQ's
SimpleWorker sends the same mail over one connection, without reading or writing Postgres. At 500 per second it cannot
keep up and its latency grows, so it runs for one second only. All processes share one machine.
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
from bench.arrivals import Arrivals, record_arrivals
from bench.figure import OURS, Figure
from bench.plain_rq import QUEUE, send
from bench.process import Process
from bench.testbed import Bench
from outbox.queries import query
from outbox.signup.send_verify_email import SEND_VERIFY_EMAIL, SendVerifyEmail
from outbox_service.notifier import MIN_INTERVAL

POLLING, PLAIN = "polling only", "RQ after the commit"

_SECONDS = {10: 2.5, 100: 2.0, 500: 1.5}
"""Seconds of one run, by users per second."""
_PLAIN_LIMIT = 1.0
"""Seconds of one run of RQ at most."""
_TARGETS = {
    (100, "p50"): "at most 10 ms",
    (100, "p99"): "at most 40 ms; polling only: the poll interval (1,000 ms) + 40 ms",
}
_WARMUP = 64
"""Number of mails. The worker has fewer threads."""
_POLL_INTERVAL = 0.02
_TIMEOUT = 30.0
"""Seconds that the last mails may take."""

SignUp = Callable[[int, float, str], list[float]]
"""Takes users per second, seconds and a prefix of names; returns the latency of each mail in ms."""


def measure(bench: Bench) -> list[Figure]:
    """Returns the figures of this part."""
    bench.reset()
    figures = []
    with ExitStack() as stack:
        arrivals = stack.enter_context(record_arrivals())
        settings = {"SMTP_URL": arrivals.url, "LOG_LEVEL": "info"}
        for module in ("worker", "bench.plain_rq"):
            stack.enter_context(bench.start(module, **settings))
        listening = stack.enter_context(bench.start("relay", **settings))
        polling = stack.enter_context(bench.start("relay", OUTBOX_TRANSACTION_POOLING="true", **settings))
        users = stack.enter_context(Users(bench, arrivals))
        contenders: Mapping[str, SignUp] = {
            OURS: _with_stopped(polling, users.sign_up),
            POLLING: _with_stopped(listening, users.sign_up),
            PLAIN: users.sign_up_with_rq,
        }
        for sign_up in contenders.values():
            sign_up(_WARMUP * 2, 0.5, "warm")
        for rate, seconds in _SECONDS.items():
            figures += _measure_rate(bench, contenders, rate, seconds if not bench.smoke else 0.3)
    return figures


def _with_stopped(relay: Process, sign_up: SignUp) -> SignUp:
    """Returns a function that calls `sign_up` while a relay is stopped."""

    def sign_up_while_stopped(rate: int, seconds: float, name: str) -> list[float]:
        relay.await_event("started")
        relay.send(signal.SIGSTOP)
        try:
            return sign_up(rate, seconds, f"{name}_{relay.popen.pid}")
        finally:
            relay.send(signal.SIGCONT)
            relay.check()

    return sign_up_while_stopped


def _measure_rate(bench: Bench, contenders: Mapping[str, SignUp], rate: int, seconds: float) -> list[Figure]:
    latencies: dict[str, list[list[float]]] = {name: [] for name in contenders}

    def one_run(name: str) -> Callable[[], float]:
        def run() -> float:
            latencies[name].append(contenders[name](rate, seconds, f"user_{rate}_{len(latencies[name])}"))
            return _quantile(latencies[name][-1], 0.5)

        return run

    title = f"commit to mail at {rate} users/s"
    p50 = bench.measure_in_turn(
        "wait", f"{title}, p50", "ms", {name: one_run(name) for name in contenders}, higher_is_better=False
    )
    quantiles = {name: _curve([latency for run in runs for latency in run]) for name, runs in latencies.items()}
    figures = [replace(p50, target=_TARGETS.get((rate, "p50")), extra={"rate": rate, "quantiles": quantiles})]
    for label, share in (("p99", 0.99), ("worst", 1.0)):
        samples = {name: [_quantile(run, share) for run in runs] for name, runs in latencies.items()}
        figures.append(replace(p50, title=f"{title}, {label}", samples=samples, target=_TARGETS.get((rate, label))))
    return figures


def _quantile(latencies: list[float], share: float) -> float:
    return float(np.quantile(latencies, share, method="higher"))  # a measured latency, not an interpolated one


def _curve(latencies: list[float]) -> list[float]:
    """Returns 200 quantiles, from the shortest latency to the longest, for the chart."""
    return [round(float(latency), 3) for latency in np.quantile(latencies, np.linspace(0, 1, 200))]


class Users:
    """Signs up users with an outbox row or with a job in RQ, and returns latencies. A context manager."""

    def __init__(self, bench: Bench, arrivals: Arrivals) -> None:
        self._arrivals = arrivals
        self._connection = bench.connect()
        self._hint_connection = bench.connect()
        self._client = bench.redis_client()
        self._queue = Queue(QUEUE, connection=self._client)
        self._committed = Event()
        self._is_closing = False
        self._hint_thread = Thread(target=self._send_hints, name="hints")

    def __enter__(self) -> Self:
        self._hint_thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closing = True
        self._committed.set()
        self._hint_thread.join()
        self._hint_connection.close()
        self._connection.close()
        self._client.close()

    def _send_hints(self) -> None:
        """Sends hints to the relays, as `outbox_service.notifier.RelayNotifier` does, but in a thread."""
        while self._committed.wait() and not self._is_closing:
            self._committed.clear()
            self._hint_connection.execute(query("notify_relays"))
            time.sleep(MIN_INTERVAL)

    def sign_up(self, rate: int, seconds: float, name: str) -> list[float]:
        """Signs up users with an outbox row and a hint to the relays."""
        return self._sign_up(rate, seconds, f"{name}_h", self._write_row, lambda *_: self._committed.set())

    def sign_up_with_rq(self, rate: int, seconds: float, name: str) -> list[float]:
        """Signs up users, and enqueues a job in RQ after each commit."""
        return self._sign_up(rate, min(seconds, _PLAIN_LIMIT), f"{name}_q", lambda *_: None, self._enqueue)

    def _sign_up(
        self,
        rate: int,
        seconds: float,
        name: str,
        in_transaction: Callable[[str], None],
        after_commit: Callable[[int, str], object],
    ) -> list[float]:
        committed: dict[str, float] = {}
        begun = time.monotonic()
        for number in range(max(2, round(rate * seconds))):
            time.sleep(max(0.0, begun + number / rate - time.monotonic()))
            user = f"{name}_{number}"
            with self._connection.transaction():
                self._connection.execute(query("add_user"), _user(user))
                in_transaction(user)
            committed[f"{user}@example.com"] = time.monotonic()
            after_commit(number, user)
        return self._await_latencies(committed)

    def _write_row(self, user: str) -> None:
        outbox.add(self._connection, SEND_VERIFY_EMAIL, SendVerifyEmail(username=user), delay=0)

    def _enqueue(self, number: int, user: str) -> None:
        self._queue.enqueue(send, number, f"{user}@example.com", "A User of the Bench")

    def _await_latencies(self, committed: dict[str, float]) -> list[float]:
        """Waits until all mails have arrived, and returns the latency of each in ms.

        Raises:
            TimeoutError: some mails did not arrive.
        """
        arrived: dict[str, float] = {}
        deadline = time.monotonic() + _TIMEOUT
        while len(arrived) < len(committed):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(committed) - len(arrived)} mails did not arrive within {_TIMEOUT:g} s")
            time.sleep(_POLL_INTERVAL)
            arrived |= self._arrivals.take()
        return [(arrived[address] - at) * 1000 for address, at in committed.items()]


def _user(name: str) -> dict[str, Any]:
    hashed = "$argon2id$v=19$m=19456,t=2,p=1$" + "0" * 22 + "$" + "0" * 43
    return {
        "username": name,
        "hashed_password": hashed,
        "full_name": "A User of the Bench",
        "email": f"{name}@example.com",
    }
