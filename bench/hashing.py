"""`python -m bench.hashing`: argon2 alone, with the service's parameters, on so many threads.

`service` hashes with the service's own function, `argon2-cffi` with the library of that name, which is what most would
use.
"""

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import argon2

from outbox_service.passwords import hash_password

PASSWORD = "correct horse battery"  # noqa: S105 - as bench.load's users have


def hash_alone(kind: str, threads: int, seconds: float) -> tuple[float, float]:
    """Hashes on that many threads, in a process of their own, while nothing else is measured.

    Args:
        kind: `service` or `argon2-cffi`.
        threads: how many.
        seconds: for how long.

    Returns:
        Hashes per second, and the ms of CPU that each took.
    """
    command = [sys.executable, "-m", "bench.hashing", kind, str(threads), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603
    rate, cpu = map(float, done.stdout.split())
    return rate, cpu


def _hasher(kind: str) -> Callable[[str], str]:
    if kind == "service":
        return hash_password
    return argon2.PasswordHasher.from_parameters(argon2.extract_parameters(hash_password(PASSWORD))).hash


def _hash(kind: str, threads: int, seconds: float) -> tuple[float, float]:
    hasher = _hasher(kind)
    ended: list[float] = []
    cpu = time.process_time()
    over = time.perf_counter() + seconds

    def work() -> None:
        while time.perf_counter() < over or len(ended) < 2:
            hasher(PASSWORD)
            ended.append(time.perf_counter())

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    cpu = time.process_time() - cpu
    # Without the last of each thread, beside which the others may have ended already.
    counted = [at for at in ended if at <= over]
    if len(counted) < 2:
        counted = ended
    return (len(counted) - 1) / (counted[-1] - counted[0]), cpu * 1000 / len(ended)


def main() -> None:
    """Prints the rate and the ms."""
    parser = argparse.ArgumentParser(prog="python -m bench.hashing")
    parser.add_argument("kind", choices=["service", "argon2-cffi"])
    parser.add_argument("threads", type=int)
    parser.add_argument("seconds", type=float)
    given = parser.parse_args()
    print(*_hash(given.kind, given.threads, given.seconds))  # noqa: T201 - its output


if __name__ == "__main__":
    main()
