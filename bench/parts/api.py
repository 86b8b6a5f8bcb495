"""What creating a user costs: `POST /v1/users`.

One service process at default settings (its log at `info`, into a file; a delay of 10 s) and 1, 8 or 64 clients that
each create one user after the other on a connection that they keep. The rate is counted from one answer to another,
from 0.2 s after the first request on; a client's wait is timed from the request's first byte to the answer's last. Only
`201` counts.

`without the outbox row` is the same service but for the row and the NOTIFY; it runs all the time too, idle while the
other is measured. `argon2 alone` makes the same hashes on as many threads as can be busy (the cores, or the one of a
single client) and nothing else: no service, no Postgres. The service hashes with libsodium, which needs about half the
time of what argon2-cffi comes with; `argon2-cffi alone` makes hashes of the same parameters with that. The clients (a
process of their own, on bare sockets) and Postgres share the machine's cores with the service here, so what they take
is missing from its rate. How much CPU a user takes of the service and (where it runs on this machine) of Postgres, by
the system's own accounts, does not depend on what else the machine has to do; `extra` parts it, and has the clients'
share.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from statistics import median
from typing import Any

import numpy as np
import psutil
import psycopg

from bench.hashing import hash_alone
from bench.load import Load, create_users
from bench.measure import OURS, Figure
from bench.process import Process
from bench.stage import Bench
from outbox_service.passwords import usable_cores
from tests.support.mailbox import free_port

BARE, ALONE, REFERENCE = "without the outbox row", "argon2 alone", "argon2-cffi alone"

_SECONDS = {1: 1.0, 8: 1.6, 64: 1.6}
"""Clients -> for how long they are measured in one run."""
_WARMUP = {1: 0.2, 8: 0.2, 64: 1.0}
"""Clients -> seconds before that: until the line of those who wait for a hash is as long as it gets."""
_TARGET = "95 % of argon2 alone; the row costs at most 3 %"


def measure(bench: Bench) -> list[Figure]:
    """Measures the part."""
    bench.fresh()
    ports = {OURS: free_port(), BARE: free_port()}
    with (
        bench.start("service", **_settings(ports[OURS])) as ours,
        bench.start("bench.bare_service", **_settings(ports[BARE])) as bare,
        bench.connect() as connection,
    ):
        services = {OURS: ours, BARE: bare}
        measured = _Measured(_postmaster(connection), services, ports)
        for name, process in services.items():
            process.await_event("started")
            measured.run(name, 8, 0.3 if bench.smoke else 1.0, 0.2)
        return [figure for clients in _SECONDS for figure in _of_clients(bench, measured, clients)]


def _settings(port: int) -> dict[str, str]:
    return {"HTTP_SERVER_ADDRESS": f"127.0.0.1:{port}", "LOG_LEVEL": "info", "VERIFY_EMAIL_DELAY": "10"}


def _of_clients(bench: Bench, measured: "_Measured", clients: int) -> list[Figure]:
    seconds, warmup = (1.0, 0.1) if bench.smoke else (_SECONDS[clients], _WARMUP[clients])
    loads: dict[str, list[Load]] = {OURS: [], BARE: []}
    measured.cpu.clear()

    def one_run(name: str) -> Callable[[], float]:
        def run() -> float:
            loads[name].append(measured.run(name, clients, seconds, warmup))
            return loads[name][-1].rate

        return run

    def hash_only(name: str, kind: str) -> Callable[[], float]:
        def run() -> float:
            rate, cpu = hash_alone(kind, threads, min(seconds, 1.0))
            measured.cpu.setdefault(name, []).append({"argon2": cpu})
            return rate

        return run

    title = f"POST /v1/users, {clients} client{'s' if clients > 1 else ''}"
    threads = min(clients, usable_cores())
    rates = bench.in_turn(
        "api",
        title,
        "users/s",
        {
            OURS: one_run(OURS),
            BARE: one_run(BARE),
            ALONE: hash_only(ALONE, "service"),
            REFERENCE: hash_only(REFERENCE, "argon2-cffi"),
        },
        target=_TARGET,
    )
    extra = {
        "clients": clients,
        "cost_of_the_row": _cost(rates),
        "cpu_ms_per_request": {name: _medians(runs) for name, runs in measured.cpu.items()},
        "refused": {name: sum(load.refused for load in runs) for name, runs in loads.items()},
    }
    cpu = {name: [sum(run.values()) - run.get("clients", 0.0) for run in runs] for name, runs in measured.cpu.items()}
    figures = [
        replace(rates, extra=extra),
        Figure("api", f"{title}, CPU of service and Postgres", "ms/user", higher_is_better=False, samples=cpu),
    ]
    for what, share in (("p50", 0.5), ("p99", 0.99)):
        samples = {
            name: [float(np.quantile(load.waits, share, method="higher")) for load in runs]
            for name, runs in loads.items()
        }
        figures.append(Figure("api", f"{title}, {what}", "ms", higher_is_better=False, samples=samples))
    return figures


def _cost(rates: Figure) -> float:
    """Returns which part of the rate the outbox row takes: the median over the runs, each with its neighbour."""
    pairs = zip(rates.samples[OURS], rates.samples[BARE], strict=True)
    return round(median(1 - ours / bare for ours, bare in pairs), 4)


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(median(run[name] for run in runs), 3) for name in runs[0]}


class _Measured:
    """Both services, and what a request to either takes of the cores."""

    def __init__(self, postmaster: psutil.Process | None, services: dict[str, Process], ports: dict[str, int]) -> None:
        self.cpu: dict[str, list[dict[str, float]]] = {}
        """ms per request, by service and by who takes them."""
        self._postmaster = postmaster
        self._services = services
        self._ports = ports
        self._numbers = count(1)

    def run(self, name: str, clients: int, seconds: float, warmup: float) -> Load:
        """Has clients create users at one of the services."""
        before = self._cpu_times(name)
        load = create_users(self._ports[name], clients, seconds, f"user{next(self._numbers)}", warmup)
        after = self._cpu_times(name)
        taken = {who: (after[who] - before[who]) * 1000 / load.requests for who in before if who in after}
        self.cpu.setdefault(name, []).append({**taken, "clients": load.cpu * 1000 / load.requests})
        self._services[name].check()
        return load

    def _cpu_times(self, name: str) -> dict[str, float]:
        times = {"service": _seconds(psutil.Process(self._services[name].popen.pid))}
        if self._postmaster:
            times["postgres"] = sum(map(_seconds, self._postmaster.children()))
        return times


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _postmaster(connection: psycopg.Connection[Any]) -> psutil.Process | None:
    """Returns Postgres' main process where it is one of this machine."""
    if not connection.info.host.startswith("/"):
        return None  # whose process of that number is here is another's
    try:
        return psutil.Process(connection.info.backend_pid).parent()
    except psutil.NoSuchProcess:
        return None
