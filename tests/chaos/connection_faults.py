"""Injects faults of the connections between servers, processes and clients."""

from collections.abc import Awaitable, Callable
from itertools import product

from tests.chaos.faults import Injection, Kind
from tests.chaos.proxy import Proxy


def _choose_proxies(injection: Injection, target: str) -> list[Proxy]:
    proxies = injection.system.proxies[target]
    chosen = proxies if injection.draw.random() < 0.5 else [injection.draw.choice(proxies)]
    injection.fault.note = ", ".join(proxy.name for proxy in chosen)
    return chosen


def _cut(target: str) -> Callable[[Injection], Awaitable[None]]:
    async def inject(injection: Injection) -> None:
        for proxy in _choose_proxies(injection, target):
            proxy.cut()

    return inject


def _tear(target: str) -> Callable[[Injection], Awaitable[None]]:
    async def inject(injection: Injection) -> None:
        chosen = _choose_proxies(injection, target)
        for proxy in chosen:
            proxy.tear()
        try:
            await injection.hold(0.5, 2)
        finally:
            for proxy in chosen:
                proxy.cancel_tears()

    return inject


def _refuse(target: str) -> Callable[[Injection], Awaitable[None]]:
    async def inject(injection: Injection) -> None:
        chosen = _choose_proxies(injection, target)
        for proxy in chosen:
            proxy.close()
        try:
            await injection.hold(0.5, 5)
        finally:
            for proxy in chosen:
                await proxy.open()

    return inject


def _silence(target: str) -> Callable[[Injection], Awaitable[None]]:
    """Silences connections, as if their host had vanished; new connections reach the next host."""

    async def inject(injection: Injection) -> None:
        chosen = _choose_proxies(injection, target)
        for proxy in chosen:
            proxy.silence()
        try:
            await injection.hold(5, 30)
        finally:
            for proxy in chosen:
                proxy.cut_silenced()

    return inject


_TARGETS = ("service", "postgres", "redis", "mail")

KINDS = tuple(
    Kind(f"{target}.{name}", make(target), weight)
    for target, (name, make, weight) in (
        *product(_TARGETS, (("cut", _cut, 1), ("tear", _tear, 2), ("refuse", _refuse, 1))),
        *product(("postgres", "redis"), (("silence", _silence, 1),)),
    )
)
