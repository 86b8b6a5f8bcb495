"""Delays before a row is attempted or offered again, and before a server that is away is tried again."""

import random


def retry_delay(attempt: int, draw: random.Random | None = None) -> float:
    """Returns the seconds from a failed attempt to the next one.

    asynq's `DefaultRetryDelayFunc` (asynq/server.go), which follows Sidekiq's `sidekiq_retry_in`:
    n⁴ + 15 + random(0 … 30) · (n + 1), with n the retries so far. About 15 to 45 s, 16 to 76 s, 31 to 121 s …
    and four days at n = 24, twenty days in all. The random part spreads rows that failed together.

    Args:
        attempt: the attempt that failed, from 1.
        draw: the random generator.
    """
    retried = attempt - 1
    return float(retried**4 + 15 + (draw or random).uniform(0, 30) * (retried + 1))


LONGEST_UNHANDLED_DELAY = 15.0
"""Upper bound of seconds until a row that a worker cannot handle is offered again."""


def unhandled_delay(unhandled_for: float, ahead: float = 0.0, draw: random.Random | None = None) -> float:
    """Returns the seconds until a row that a worker cannot handle is offered again.

    Half the time that it has been waiting, from 0.25 s to 15 s, less a random part of up to half. So another worker
    gets it at once, and a row that no worker can handle costs little.

    Args:
        unhandled_for: seconds since the row was first given back as unhandled; 0 at the first time.
        ahead: seconds that the unhandled rows given back before it take at the pace that limits them.
        draw: the random generator.
    """
    ceiling = min(LONGEST_UNHANDLED_DELAY, max(0.25, unhandled_for / 2, ahead))
    return float(ceiling * (draw or random).uniform(0.5, 1))


def reconnect_delay(failures: int, draw: random.Random | None = None) -> float:
    """Returns the seconds until a server that is away is tried again: 0.1 s doubling up to 1 s, less jitter.

    The cap is low because the first mail after an outage waits for it; the jitter spreads the processes.

    Args:
        failures: consecutive failures, from 1.
        draw: the random generator.
    """
    ceiling = min(1.0, 0.1 * 2 ** min(failures - 1, 10))
    return float(ceiling * (draw or random).uniform(0.5, 1))
