"""Outages of the mail server that are no mail's fault: no attempt may be spent on them."""

import asyncio
import time

import psycopg

from tests.chaos.evidence import AWAY_WITH_BACKLOG, IMPORTED, Attempt
from tests.chaos.faults import Act, Kind

_BACKLOG = 5000
_CROWD = 200
"""Users: enough that the workers want all the connections that they may have."""
_AWAY = 60.0
"""Seconds."""
_PAUSE = 0.5

# One statement, which may be said again where Postgres did not say whether it was done.
_IMPORT = """
WITH imported AS (
    INSERT INTO users (username, hashed_password, full_name, email)
    SELECT name, 'none', 'An Imported User', name || '@example.com' FROM unnest(%s::text[]) AS name
    ON CONFLICT DO NOTHING
    RETURNING username
)
INSERT INTO outbox (task, payload, queue, max_retries, timeout)
SELECT 'send_verify_email', jsonb_build_object('username', username), 'critical', 10, 30 FROM imported
"""


async def _take_away(act: Act) -> None:
    """Lets nobody reach the mail server while an application imports users."""
    proxies, way = act.stage.proxies["mail"], act.draw.choice(("refused", "reset"))
    act.fault.note = f"connections are {way}"
    try:
        for proxy in proxies:
            if way == "refused":
                proxy.close()
            else:
                proxy.resets = True
                proxy.cut()
        await _import_users(act, _BACKLOG)
        await act.hold(_AWAY, _AWAY)
    finally:
        for proxy in proxies:
            proxy.resets = False
            await proxy.open()


async def _import_users(act: Act, count: int) -> None:
    names = [f"import_{act.fault.number}_{number}" for number in range(count)]
    users = [Attempt(IMPORTED, name, f"{name}@example.com", 0, time.time()) for name in names]
    act.stage.imported += users
    while True:
        try:
            async with act.stage.postgres.connection() as connection:
                await connection.execute(_IMPORT, [names])
        except psycopg.OperationalError:  # another fault's
            await asyncio.sleep(_PAUSE)
        else:
            break
    for user in users:
        user.answered, user.status = time.time(), 201


async def _limit_connections(act: Act) -> None:
    """Takes only so many connections at a time, over all workers, and answers 421 to others, while many are wanted."""
    mail, most = act.stage.mail, act.draw.randint(1, 6)
    act.fault.note = f"{most} connections"
    mail.limit(most)
    try:
        await _import_users(act, _CROWD)
        await act.hold(5, 20)
    finally:
        mail.most = None


KINDS = (Kind(AWAY_WITH_BACKLOG, _take_away), Kind("mail.connection-limit", _limit_connections))
