"""Requests to stop: early, repeated, and from a burst of signals."""

import signal
import subprocess
import sys
import time

import pytest

from outbox.runtime.stop import SAME_SIGNAL_TIME, Stop
from tests.support.waiting import eventually

LOOP = """
from outbox.runtime.stop import Stop, ignore_signals
stop = Stop()
stop.listen()
print("listens", flush=True)
while not stop.is_requested():  # nearly always holds the locks that a request takes
    stop.wait(0.0001)
    stop.is_hurried()
while {more}:
    stop.wait(0.0001)
    stop.request()
ignore_signals()
print("ends", flush=True)
for _ in range(200_000):
    pass
"""


@pytest.mark.parametrize("more", ["not stop.is_hurried()", "False"], ids=["until it hurries", "at the first"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_burst_of_signals_stops_a_process_cleanly(more: str, number: signal.Signals) -> None:
    """A signal during a wait, a request or the shutdown of the interpreter neither deadlocks nor kills it."""
    command = [sys.executable, "-c", LOOP.format(more=more)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "listens\n"
        ends = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < ends:
            process.send_signal(number)
            time.sleep(0.0005)
        process.kill()
        assert process.communicate() == ("ends\n", "")
        assert process.returncode == 0


def test_a_stop_may_be_requested_before_a_wait_and_twice() -> None:
    """A later wait returns at once, and the first request counts."""
    stop = Stop()
    assert not stop.wait(0)
    stop.request()
    first = stop.requested_at
    stop.request()
    assert stop.wait(10)
    assert (stop.is_requested(), stop.is_hurried()) == (True, False)
    assert stop.requested_at == first


def test_a_second_signal_hurries_unless_it_is_the_same_keystroke(monkeypatch: pytest.MonkeyPatch) -> None:
    """One Ctrl-C may arrive twice. A request without a signal does not count as the first signal."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = Stop()
    stop.request()
    now[0] += 10
    stop.record_signal()
    now[0] += SAME_SIGNAL_TIME
    stop.record_signal()
    assert not stop.is_hurried()
    now[0] += 0.1
    stop.record_signal()
    assert stop.is_hurried()


def test_a_signal_calls_the_callback() -> None:
    """The callback runs after the stop is requested."""
    stop, calls = Stop(), list[bool]()
    before = signal.getsignal(signal.SIGUSR1)
    try:
        stop.listen(lambda: calls.append(stop.is_requested()), signals=[signal.SIGUSR1])
        signal.raise_signal(signal.SIGUSR1)
        eventually(lambda: calls == [True], 5)
    finally:
        signal.signal(signal.SIGUSR1, before)
