"""The product's log lines, as part of a schedule's trace."""

import threading

from tests.schedules.setting import Setting


class Journal:
    """Takes the place of the product's logger."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def is_enabled_for(self, _: int) -> bool:
        """Spares the product from composing what is not looked at."""
        return False

    def info(self, event: str, **fields: object) -> None:
        """Notes an event of any level."""
        shown = {name: value for name, value in fields.items() if value is not None and name != "exc_info"}
        self._setting.note(threading.current_thread().name, f"  log: {event} {shown}")

    debug = warning = error = info
