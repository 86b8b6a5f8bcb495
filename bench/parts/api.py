"""Creation of users: `POST /v1/users`.

One service process has default settings (log level `info`, into a file; a delay of 10 s), and 1, 8 or 64 clients each
create one user after the other on one connection. The rate is counted between the first and the last response of the
measured time, which begins 0.2 s after the first request (1 s with 64 clients). A latency is the time from the first
byte of the request to the last byte of the response. Only `201` counts.

`without the outbox row` is the same service without the row and the NOTIFY. Both services run all the time, and one is
idle while the other is measured. `argon2 alone` computes the same hashes on as many threads as can be busy (the number
of cores, or one for a single client), without service and Postgres. The service hashes with libsodium, which takes
about half the time of argon2-cffi; `argon2-cffi alone` computes hashes of the same parameters with that library. The
clients (one process, on bare sockets) and Postgres share the cores with the service, which lowers its rate. The CPU
time per user of the service and of Postgres (if it runs on this machine) does not depend on other load; `extra` lists
it by process and includes the clients'.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from statistics import median
from typing import Any

import numpy as np
import psutil
import psycopg

from bench.figure import OURS, Figure
from bench.hashing import measure_hashing
from bench.load import Load, create_users
from bench.process import Process
from bench.testbed import Bench
from outbox_service.passwords import usable_cores
from tests.support.mailbox import free_port

BARE, ALONE, REFERENCE = "without the outbox row", "argon2 alone", "argon2-cffi alone"

_SECONDS = {1: 1.0, 8: 1.6, 64: 1.6}
"""Measured seconds of one run, by number of clients."""
_WARMUP = {1: 0.2, 8: 0.2, 64: 1.0}
"""Seconds before the measured time, by number of clients: until the queue for a hash has its full length."""
_TARGET = "95 % of argon2 alone; the row costs at most 3 %"


def measure(bench: Bench) -> list[Figure]:
    """Returns the figures of this part."""
    bench.reset()
    ports = {OURS: free_port(), BARE: free_port()}
    with (
        bench.start("service", **_settings(ports[OURS])) as ours,
        bench.start("bench.bare_service", **_settings(ports[BARE])) as bare,
        bench.connect() as connection,
    ):
        services = {OURS: ours, BARE: bare}
        pair = _ServicePair(_postmaster(connection), services, ports)
        for name, process in services.items():
            process.await_event("started")
            pair.run(name, 8, 0.3 if bench.smoke else 1.0, 0.2)
        return [figure for clients in _SECONDS for figure in _measure_clients(bench, pair, clients)]


def _settings(port: int) -> dict[str, str]:
    return {"HTTP_SERVER_ADDRESS": f"127.0.0.1:{port}", "LOG_LEVEL": "info", "VERIFY_EMAIL_DELAY": "10"}


def _measure_clients(bench: Bench, pair: "_ServicePair", clients: int) -> list[Figure]:
    seconds, warmup = (1.0, 0.1) if bench.smoke else (_SECONDS[clients], _WARMUP[clients])
    loads: dict[str, list[Load]] = {OURS: [], BARE: []}
    pair.cpu.clear()

    def create_with(name: str) -> Callable[[], float]:
        def run() -> float:
            loads[name].append(pair.run(name, clients, seconds, warmup))
            return loads[name][-1].rate

        return run

    def hash_with(name: str, kind: str) -> Callable[[], float]:
        def run() -> float:
            rate, cpu = measure_hashing(kind, threads, min(seconds, 1.0))
            pair.cpu.setdefault(name, []).append({"argon2": cpu})
            return rate

        return run

    title = f"POST /v1/users, {clients} client{'s' if clients > 1 else ''}"
    threads = min(clients, usable_cores())
    rates = bench.measure_in_turn(
        "api",
        title,
        "users/s",
        {
            OURS: create_with(OURS),
            BARE: create_with(BARE),
            ALONE: hash_with(ALONE, "service"),
            REFERENCE: hash_with(REFERENCE, "argon2-cffi"),
        },
        target=_TARGET,
    )
    extra = {
        "clients": clients,
        "cost_of_the_row": _row_cost(rates),
        "cpu_ms_per_request": {name: _medians(runs) for name, runs in pair.cpu.items()},
        "refused": {name: sum(load.refused for load in runs) for name, runs in loads.items()},
    }
    cpu = {name: [sum(run.values()) - run.get("clients", 0.0) for run in runs] for name, runs in pair.cpu.items()}
    figures = [
        replace(rates, extra=extra),
        Figure("api", f"{title}, CPU of service and Postgres", "ms/user", higher_is_better=False, samples=cpu),
    ]
    for label, share in (("p50", 0.5), ("p99", 0.99)):
        samples = {
            name: [float(np.quantile(load.latencies, share, method="higher")) for load in runs]
            for name, runs in loads.items()
        }
        figures.append(Figure("api", f"{title}, {label}", "ms", higher_is_better=False, samples=samples))
    return figures


def _row_cost(rates: Figure) -> float:
    """Returns the share of the rate that the outbox row costs: the median of adjacent pairs of runs."""
    pairs = zip(rates.samples[OURS], rates.samples[BARE], strict=True)
    return round(median(1 - ours / bare for ours, bare in pairs), 4)


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(median(run[name] for run in runs), 3) for name in runs[0]}


class _ServicePair:
    """The services with and without the outbox, and the CPU time of their requests."""

    def __init__(self, postmaster: psutil.Process | None, services: dict[str, Process], ports: dict[str, int]) -> None:
        self.cpu: dict[str, list[dict[str, float]]] = {}
        """CPU milliseconds per request and process of each run, by service."""
        self._postmaster = postmaster
        self._services = services
        self._ports = ports
        self._ids = count(1)

    def run(self, name: str, clients: int, seconds: float, warmup: float) -> Load:
        """Lets clients create users at one of the services."""
        before = self._cpu_times(name)
        load = create_users(self._ports[name], clients, seconds, f"user{next(self._ids)}", warmup)
        after = self._cpu_times(name)
        used = {
            process: (after[process] - before[process]) * 1000 / load.requests for process in before if process in after
        }
        self.cpu.setdefault(name, []).append({**used, "clients": load.cpu * 1000 / load.requests})
        self._services[name].check()
        return load

    def _cpu_times(self, name: str) -> dict[str, float]:
        times = {"service": _cpu_seconds(psutil.Process(self._services[name].popen.pid))}
        if self._postmaster:
            times["postgres"] = sum(map(_cpu_seconds, self._postmaster.children()))
        return times


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _postmaster(connection: psycopg.Connection[Any]) -> psutil.Process | None:
    """Returns the main process of Postgres if it runs on this machine."""
    if not connection.info.host.startswith("/"):
        return None  # on another machine, its process id means nothing here
    try:
        return psutil.Process(connection.info.backend_pid).parent()
    except psutil.NoSuchProcess:
        return None
