"""One way to stop: asked for early, twice, and by a storm of signals, it is the same request."""

import signal
import subprocess
import sys
import time

import pytest

from outbox.runtime.stop import AGAIN, Stop
from tests.support.waiting import eventually

LOOP = """
from outbox.runtime.stop import Stop, ignore_signals
stop = Stop()
stop.listen()
print("listens", flush=True)
while not stop.is_requested():  # takes the locks that a request takes, most of the time
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
def test_a_storm_of_signals_ends_a_process_in_order(more: str, number: signal.Signals) -> None:
    """It neither deadlocks nor dies of a signal that strikes at any moment of a wait, a request or its end."""
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


def test_a_request_may_come_first_and_twice() -> None:
    """Whoever waits afterwards does not wait, and the first request is the one that counts."""
    stop = Stop()
    assert not stop.wait(0)
    stop.request()
    first = stop.requested_at
    stop.request()
    assert stop.wait(10)
    assert (stop.is_requested(), stop.is_hurried()) == (True, False)
    assert stop.requested_at == first


def test_a_second_signal_hurries_unless_it_is_the_same_keystroke(monkeypatch: pytest.MonkeyPatch) -> None:
    """One Ctrl-C may arrive twice. A request that was no signal does not make the first signal the second."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = Stop()
    stop.request()
    now[0] += 10
    stop.signalled()
    now[0] += AGAIN
    stop.signalled()
    assert not stop.is_hurried()
    now[0] += 0.1
    stop.signalled()
    assert stop.is_hurried()


def test_signals_call_what_is_to_follow() -> None:
    """As the service does, whose loop has a flag of its own."""
    stop, seen = Stop(), list[bool]()
    before = signal.getsignal(signal.SIGUSR1)
    try:
        stop.listen(lambda: seen.append(stop.is_requested()), signals=[signal.SIGUSR1])
        signal.raise_signal(signal.SIGUSR1)
        eventually(lambda: seen == [True], 5)
    finally:
        signal.signal(signal.SIGUSR1, before)
