"""Verification mails, from Redis to a mail server.

Users and rows are in Postgres and the jobs in Redis before the workers begin, all at the same moment. The handler
`send_verify_email` then reads the user, writes the verification, composes the mail and sends it over SMTP, with the
default settings of the worker. Timed by the clock of Postgres, from the transaction that claims the first row until
every row is done and committed. The mail server discards all mail: Postfix's smtp-sink if it is installed, else
`bench/sink.py`; the results name it. It runs on the same machine, as do Postgres and Redis. There are no peers, because
no other library sends these mails; the rate of one worker shows what the second adds.
"""

from bench.figure import OURS, Figure
from bench.rows import hand_over, time_workers
from bench.sink import open_sink
from bench.testbed import Bench
from outbox.signup.send_verify_email import SEND_VERIFY_EMAIL
from tests.support.processes import add_users

_ONE, _TWO = "one worker", "two workers"


def measure(bench: Bench) -> list[Figure]:
    """Returns the figures of this part."""
    mails = bench.size(6_000, 50)
    with open_sink() as sink:
        both = bench.measure_in_turn(
            "mails",
            "verification mails",
            "mails/s",
            {
                _TWO: lambda: _sent_per_second(bench, sink.url, 2, mails),
                _ONE: lambda: _sent_per_second(bench, sink.url, 1, mails),
            },
        )
        extra = {"mail server": sink.kind}
    return [
        Figure("mails", f"verification mails, {workers}", "mails/s", True, {OURS: both.samples[workers]}, target, extra)  # noqa: FBT003
        for workers, target in ((_TWO, "at least 2,300"), (_ONE, None))
    ]


def _sent_per_second(bench: Bench, smtp_url: str, workers: int, mails: int) -> float:
    bench.reset()
    with bench.connect() as connection:
        add_users(connection, [f"user_{number}" for number in range(mails)])
        connection.execute("ANALYZE")
    hand_over(bench, SEND_VERIFY_EMAIL.queue)
    return mails / time_workers(bench, SEND_VERIFY_EMAIL.queue, workers, SMTP_URL=smtp_url)
