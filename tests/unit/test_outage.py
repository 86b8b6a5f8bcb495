"""Outages: their log lines, the text of errors, and which Redis servers are supported."""

import threading

import pytest
from structlog.testing import capture_logs

from outbox.errors import UnsupportedRedisError
from outbox.runtime.outage import Outage
from outbox.runtime.redaction import one_line
from outbox.runtime.redis_connection import check_server


def test_an_outage_is_one_line_at_each_end() -> None:
    """However many tries fail, the log says once that the server is away, and once that it is back."""
    with capture_logs() as lines:
        outage = Outage("Redis")
        assert outage.back() is False
        for _ in range(5):
            outage.away(ConnectionError("refused"))
        assert [outage.back(), outage.back()] == [True, False]
    assert [line["event"] for line in lines] == ["Redis is away", "Redis is back"]
    assert lines[0]["error"] == "ConnectionError: refused"


def test_threads_share_an_outage() -> None:
    """Threads that notice the outage at the same time log one line."""
    outage = Outage("Postgres")
    barrier = threading.Barrier(8)

    def fail_and_recover() -> None:
        barrier.wait(10)
        for _ in range(100):
            outage.away(OSError("away"))
        barrier.wait(10)
        outage.back()

    with capture_logs() as lines:
        threads = [threading.Thread(target=fail_and_recover) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert [line["event"] for line in lines] == ["Postgres is away", "Postgres is back"]


def test_an_error_is_one_line_that_postgres_can_store() -> None:
    """Line breaks, NUL and lone surrogates are replaced, and the length is limited."""
    text = one_line(ValueError("a\nb\0c\ud800" + "x" * 1000))
    assert text.startswith("ValueError: a b\ufffdc?xxx")
    assert len(text) == 500
    text.encode()
    assert one_line(KeyError()) == "KeyError"


@pytest.mark.parametrize("version", ["6.2.0", "6.2.14", "7.0.0", "8.4.0-rc1", "10.0"])
def test_redis_6_2_or_newer_is_supported(version: str) -> None:
    """Versions are compared as numbers, not as text."""
    check_server(version, "standalone")


@pytest.mark.parametrize("version", ["6.0.16", "5.0.7", "2.8", "0", ""])
def test_an_older_redis_is_refused(version: str) -> None:
    """The sentence names the actual version and the required one."""
    with pytest.raises(UnsupportedRedisError, match=r"too old: REDIS_URL must name version 6\.2 or newer"):
        check_server(version, "standalone")


@pytest.mark.parametrize("mode", ["cluster", "sentinel"])
def test_a_cluster_or_sentinel_is_refused(mode: str) -> None:
    """RQ needs a single server; the sentence says what REDIS_URL names instead."""
    with pytest.raises(UnsupportedRedisError, match=f"names a Redis {mode}"):
        check_server("7.2.4", mode)
