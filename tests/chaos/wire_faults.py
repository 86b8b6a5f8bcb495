"""Faults of the connections between all that runs."""

from collections.abc import Awaitable, Callable
from itertools import product

from tests.chaos.faults import Act, Kind
from tests.chaos.proxy import Proxy


def _chosen(act: Act, target: str) -> list[Proxy]:
    proxies = act.stage.proxies[target]
    chosen = proxies if act.draw.random() < 0.5 else [act.draw.choice(proxies)]
    act.fault.note = ", ".join(proxy.name for proxy in chosen)
    return chosen


def _cut(target: str) -> Callable[[Act], Awaitable[None]]:
    async def inject(act: Act) -> None:
        for proxy in _chosen(act, target):
            proxy.cut()

    return inject


def _tear(target: str) -> Callable[[Act], Awaitable[None]]:
    async def inject(act: Act) -> None:
        chosen = _chosen(act, target)
        for proxy in chosen:
            proxy.tear()
        try:
            await act.hold(0.5, 2)
        finally:
            for proxy in chosen:
                proxy.mend()

    return inject


def _refuse(target: str) -> Callable[[Act], Awaitable[None]]:
    async def inject(act: Act) -> None:
        chosen = _chosen(act, target)
        for proxy in chosen:
            proxy.close()
        try:
            await act.hold(0.5, 5)
        finally:
            for proxy in chosen:
                await proxy.open()

    return inject


def _silence(target: str) -> Callable[[Act], Awaitable[None]]:
    """Makes connections go dead without a word, as those to a host that has vanished; new ones reach the next host."""

    async def inject(act: Act) -> None:
        chosen = _chosen(act, target)
        for proxy in chosen:
            proxy.silence()
        try:
            await act.hold(5, 30)
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
