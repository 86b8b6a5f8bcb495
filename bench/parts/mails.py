"""Verification mails, from Redis to a mail server.

Users and their rows are in Postgres and the jobs in Redis before the workers begin, all at the same moment; then
`send_verify_email` reads the user, writes the verification, composes the mail and sends it over SMTP, with the default
settings of the worker. Timed from the transaction that claims the first row until every row is marked done and
committed, by Postgres' clock. The mail server throws everything away: postfix' smtp-sink where it is
installed, else `bench/sink.py`; which one it was is in the results. It runs on the same machine, as do Postgres and
Redis. Nobody else sends these mails, so there are no peers; the figure of one worker shows what a second adds.
"""

from bench.measure import OURS, Figure
from bench.rows import hand_over, seconds_to_work_off
from bench.sink import open_sink
from bench.stage import Bench
from outbox.signup.send_verify_email import SEND_VERIFY_EMAIL
from tests.support.processes import add_users

_ONE, _TWO = "one worker", "two workers"


def measure(bench: Bench) -> list[Figure]:
    """Measures the part."""
    mails = bench.size(6_000, 50)
    with open_sink() as sink:
        both = bench.in_turn(
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
    bench.fresh()
    with bench.connect() as connection:
        add_users(connection, [f"user_{number}" for number in range(mails)])
        connection.execute("ANALYZE")
    hand_over(bench, SEND_VERIFY_EMAIL.queue)
    return mails / seconds_to_work_off(bench, SEND_VERIFY_EMAIL.queue, workers, SMTP_URL=smtp_url)
