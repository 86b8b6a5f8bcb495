"""`python -m bench.hashing`: argon2 alone, with the service's parameters, on so many threads."""

import argparse
import asyncio
import subprocess
import sys
import threading
import time

import argon2

from service.passwords import Passwords

PASSWORD = "correct horse battery"  # noqa: S105 - as bench.load's users have


def hash_alone(threads: int, seconds: float) -> tuple[float, float]:
    """Hashes on that many threads, in a process of their own, while nothing else is measured.

    Returns:
        Hashes per second, and the ms of CPU that each took.
    """
    command = [sys.executable, "-m", "bench.hashing", str(threads), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603
    rate, cpu = map(float, done.stdout.split())
    return rate, cpu


def _hasher() -> argon2.PasswordHasher:
    """Returns a hasher with the parameters that a hash of the service has."""
    passwords = Passwords(queue=1)
    try:
        hashed = asyncio.run(passwords.hash(PASSWORD))
    finally:
        passwords.close()
    return argon2.PasswordHasher.from_parameters(argon2.extract_parameters(hashed))


def _hash(threads: int, seconds: float) -> tuple[float, float]:
    hasher = _hasher()
    ended: list[float] = []
    cpu = time.process_time()
    over = time.perf_counter() + seconds

    def work() -> None:
        while time.perf_counter() < over or len(ended) < 2:
            hasher.hash(PASSWORD)
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
    parser.add_argument("threads", type=int)
    parser.add_argument("seconds", type=float)
    given = parser.parse_args()
    print(*_hash(given.threads, given.seconds))  # noqa: T201 - its output


if __name__ == "__main__":
    main()
