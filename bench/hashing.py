"""`python -m bench.hashing`: measures argon2 alone, with the service's parameters, on a number of threads.

`service` hashes with the service's own function, `argon2-cffi` with the library of that name, the common choice.
"""

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import argon2

from outbox_service.passwords import hash_password

PASSWORD = "correct horse battery"  # noqa: S105 - the password in bench.load


def measure_hashing(kind: str, threads: int, seconds: float) -> tuple[float, float]:
    """Measures hashing in a process of its own.

    Args:
        kind: `service` or `argon2-cffi`.
        threads: number of threads.
        seconds: measured time.

    Returns:
        Hashes per second, and CPU milliseconds per hash.
    """
    command = [sys.executable, "-m", "bench.hashing", kind, str(threads), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603
    rate, cpu = map(float, done.stdout.split())
    return rate, cpu


def _hasher(kind: str) -> Callable[[str], str]:
    if kind == "service":
        return hash_password
    return argon2.PasswordHasher.from_parameters(argon2.extract_parameters(hash_password(PASSWORD))).hash


def _measure(kind: str, threads: int, seconds: float) -> tuple[float, float]:
    hash_once = _hasher(kind)
    ended: list[float] = []
    cpu = time.process_time()
    ends_at = time.perf_counter() + seconds

    def work() -> None:
        while time.perf_counter() < ends_at or len(ended) < 2:
            hash_once(PASSWORD)
            ended.append(time.perf_counter())

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    cpu = time.process_time() - cpu
    # The last hash of each thread does not count: other threads may have stopped before it ends.
    counted = [at for at in ended if at <= ends_at]
    if len(counted) < 2:
        counted = ended
    return (len(counted) - 1) / (counted[-1] - counted[0]), cpu * 1000 / len(ended)


def main() -> None:
    """Prints hashes per second and CPU milliseconds per hash."""
    parser = argparse.ArgumentParser(prog="python -m bench.hashing")
    parser.add_argument("kind", choices=["service", "argon2-cffi"])
    parser.add_argument("threads", type=int)
    parser.add_argument("seconds", type=float)
    arguments = parser.parse_args()
    print(*_measure(arguments.kind, arguments.threads, arguments.seconds))  # noqa: T201 - the result


if __name__ == "__main__":
    main()
