"""`python -m bench.peers.threads THREADS NAPS`: threads that do nothing but wait 50 ms, one nap after the other.

What no worker on this machine can surpass: a nap takes longer than it says, by what the kernel takes to wake a thread.
"""

import sys
import threading
import time

from bench.peers.functions import nap


def _sleep(naps: int) -> None:
    for _ in range(naps):
        nap()


def main() -> None:
    """Prints how many naps all threads took together per second."""
    threads, naps = map(int, sys.argv[1:])
    sleepers = [threading.Thread(target=_sleep, args=[naps]) for _ in range(threads)]
    begun = time.perf_counter()
    for sleeper in sleepers:
        sleeper.start()
    for sleeper in sleepers:
        sleeper.join()
    print(threads * naps / (time.perf_counter() - begun))  # noqa: T201 - its output


if __name__ == "__main__":
    main()
