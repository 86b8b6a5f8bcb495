"""`python -m bench.bare_service`: the service as it is, but without the outbox: no row, and no hint to the relays."""

from typing import Any

import outbox
from outbox.runtime import process
from outbox_service.main import main
from outbox_service.wakeup import Wakeup


async def _add_nothing(*_: Any, **__: Any) -> None:
    """Stands for `outbox.add`."""


def _hint_nobody(_: Wakeup) -> None:
    """Stands for `Wakeup.hint`."""


def bare() -> None:
    """Runs the service."""
    outbox.add = _add_nothing  # type: ignore[assignment]
    Wakeup.hint = _hint_nobody  # type: ignore[method-assign, assignment]
    process.run(main)


if __name__ == "__main__":
    bare()
