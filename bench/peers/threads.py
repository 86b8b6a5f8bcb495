"""`python -m bench.peers.threads THREADS SLEEPS`: threads that only sleep, 50 ms at a time.

No worker on this machine can be faster: a sleep takes longer than 50 ms by the time that the kernel needs to wake the
thread.
"""

import sys
import threading
import time

from bench.peers.functions import sleep


def _sleep_often(sleeps: int) -> None:
    for _ in range(sleeps):
        sleep()


def main() -> None:
    """Prints the sleeps per second of all threads."""
    threads, sleeps = map(int, sys.argv[1:])
    sleepers = [threading.Thread(target=_sleep_often, args=[sleeps]) for _ in range(threads)]
    begun = time.perf_counter()
    for sleeper in sleepers:
        sleeper.start()
    for sleeper in sleepers:
        sleeper.join()
    print(threads * sleeps / (time.perf_counter() - begun))  # noqa: T201 - the result


if __name__ == "__main__":
    main()
