"""The hints that the service sends to the relays."""

import time

from outbox.queries import query
from outbox.runtime.settings import ServiceSettings
from tests.conftest import Connection
from tests.support.api import serve


def _count_hints(connection: Connection, seconds: float, stop_after: int | None = None) -> int:
    return sum(1 for _ in connection.notifies(timeout=seconds, stop_after=stop_after))


def _with_delay(settings: ServiceSettings, delay: float) -> ServiceSettings:
    return settings.model_copy(update={"verify_email_delay": delay})


def test_a_due_row_gets_a_hint_at_once(service_settings: ServiceSettings, connection: Connection) -> None:
    """Without a delay, a hint follows each user's commit."""
    connection.execute(query("listen"))
    with serve(_with_delay(service_settings, 0)) as api:
        for number in range(3):
            assert api.create(f"alice_{number}").status_code == 201
            assert _count_hints(connection, 5, stop_after=1) == 1


def test_delayed_rows_share_a_hint(service_settings: ServiceSettings, connection: Connection) -> None:
    """With a delay of 10 s, the first of many commits gets a hint at once, and the others share one within a second."""
    connection.execute(query("listen"))
    with serve(_with_delay(service_settings, 10)) as api:
        first = time.monotonic()
        assert api.create("alice").status_code == 201
        assert _count_hints(connection, 5, stop_after=1) == 1
        for number in range(5):
            assert api.create(f"alice_{number}").status_code == 201
        seconds = int(time.monotonic() - first)
        assert 1 <= _count_hints(connection, 2) <= 1 + seconds


def test_a_refused_user_sends_no_hint(service_settings: ServiceSettings, connection: Connection) -> None:
    """A rolled back transaction sends no hint."""
    connection.execute(query("listen"))
    with serve(_with_delay(service_settings, 0)) as api:
        assert api.create("alice").status_code == 201
        assert _count_hints(connection, 5, stop_after=1) == 1
        assert api.create("alice").status_code == 409
        assert _count_hints(connection, 0.3) == 0
