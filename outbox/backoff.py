"""How long to wait: before a task is tried or offered again, and before a server that is away is tried again."""

import random


def retry_delay(attempt: int, draw: random.Random | None = None) -> float:
    """Returns the seconds from a failed attempt to the next one.

    asynq's `DefaultRetryDelayFunc` (asynq/server.go), which follows Sidekiq's `sidekiq_retry_in`:
    n⁴ + 15 + random(0 … 30) · (n + 1), with n the retries so far. About 15 to 45 s, 16 to 76 s, 31 to 121 s …
    and four days at n = 24, twenty days in all. The random part keeps rows that failed together apart.

    Args:
        attempt: the attempt that failed, from 1.
        draw: where the random part comes from.
    """
    retried = attempt - 1
    return float(retried**4 + 15 + (draw or random).uniform(0, 30) * (retried + 1))


LONGEST_UNHANDLED_DELAY = 15.0
"""Seconds at most until a row is offered again that a worker cannot handle."""


def unhandled_delay(unhandled_for: float, ahead: float = 0.0, draw: random.Random | None = None) -> float:
    """Returns the seconds until a row is offered again that a worker cannot handle.

    Half as long as it has been waiting, from 0.25 s up to 15 s, less a random part of up to half: another worker has it
    at once, and where none can handle it, it costs little.

    Args:
        unhandled_for: seconds since it was first given back so; 0 at the first time.
        ahead: seconds that others, given back just before, want at the pace that is good for all.
        draw: where the jitter comes from.
    """
    ceiling = min(LONGEST_UNHANDLED_DELAY, max(0.25, unhandled_for / 2, ahead))
    return float(ceiling * (draw or random).uniform(0.5, 1))


def reconnect_delay(failures: int, draw: random.Random | None = None) -> float:
    """Returns the seconds until a server that is away is tried again: 0.1 s doubled up to 1 s, and jitter.

    The cap is low because the first mail after an outage waits for it; the jitter keeps processes apart.

    Args:
        failures: tries in a row that failed, from 1.
        draw: where the jitter comes from.
    """
    ceiling = min(1.0, 0.1 * 2 ** min(failures - 1, 10))
    return float(ceiling * (draw or random).uniform(0.5, 1))
