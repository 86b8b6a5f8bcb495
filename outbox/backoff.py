"""How long to wait: before a task is tried again, and before a server that is away is tried again."""

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


def reconnect_delay(failures: int, draw: random.Random | None = None) -> float:
    """Returns the seconds until a server that is away is tried again: 0.1 s doubled up to 1 s, and jitter.

    The cap is low because the first mail after an outage waits for it; the jitter keeps processes apart.

    Args:
        failures: tries in a row that failed, from 1.
        draw: where the jitter comes from.
    """
    ceiling = min(1.0, 0.1 * 2 ** min(failures - 1, 10))
    return float(ceiling * (draw or random).uniform(0.5, 1))
