"""`python -m bench.bare_service`: the service without the outbox: no row, and no hint to the relays."""

from typing import Any

import outbox
from outbox.runtime import process
from outbox_service.main import main
from outbox_service.notifier import RelayNotifier


async def _add_nothing(*_: Any, **__: Any) -> None:
    """Replaces `outbox.add`."""


def _send_no_hint(_: RelayNotifier) -> None:
    """Replaces `RelayNotifier.notify_soon`."""


def run_bare_service() -> None:
    """Runs the service without the outbox."""
    outbox.add = _add_nothing  # type: ignore[assignment]
    RelayNotifier.notify_soon = _send_no_hint  # type: ignore[method-assign, assignment]
    process.run(main)


if __name__ == "__main__":
    run_bare_service()
