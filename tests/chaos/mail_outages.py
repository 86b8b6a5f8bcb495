"""Injects outages of the mail server, on which no attempt may be spent."""

import asyncio
import time

import psycopg

from tests.chaos.evidence import AWAY_WITH_BACKLOG, IMPORTED, SignUp
from tests.chaos.faults import Injection, Kind

_BACKLOG = 5000
"""Users."""
_CROWD = 200
"""Users: enough for the workers to use all their connections."""
_AWAY = 60.0
"""Seconds."""
_PAUSE = 0.5

# One statement, which can be repeated if its answer is lost.
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


async def _take_away(injection: Injection) -> None:
    """Makes the mail server unreachable while an application imports users."""
    proxies, way = injection.system.proxies["mail"], injection.draw.choice(("refused", "reset"))
    injection.fault.note = f"connections are {way}"
    try:
        for proxy in proxies:
            if way == "refused":
                proxy.close()
            else:
                proxy.resets_connections = True
                proxy.cut()
        await _import_users(injection, _BACKLOG)
        await injection.hold(_AWAY, _AWAY)
    finally:
        for proxy in proxies:
            proxy.resets_connections = False
            await proxy.open()


async def _import_users(injection: Injection, count: int) -> None:
    names = [f"import_{injection.fault.number}_{number}" for number in range(count)]
    users = [SignUp(IMPORTED, name, f"{name}@example.com", 0, time.time()) for name in names]
    injection.system.imported += users
    while True:
        try:
            async with injection.system.postgres.connection() as connection:
                await connection.execute(_IMPORT, [names])
        except psycopg.OperationalError:  # another fault affects Postgres
            await asyncio.sleep(_PAUSE)
        else:
            break
    for user in users:
        user.answered, user.status = time.time(), 201


async def _limit_connections(injection: Injection) -> None:
    """Limits the connections of all workers together, answers 421 above that, and imports users to need more."""
    mail, limit = injection.system.mail, injection.draw.randint(1, 6)
    injection.fault.note = f"{limit} connections"
    mail.limit_connections(limit)
    try:
        await _import_users(injection, _CROWD)
        await injection.hold(5, 20)
    finally:
        mail.connection_limit = None


KINDS = (Kind(AWAY_WITH_BACKLOG, _take_away), Kind("mail.connection-limit", _limit_connections))
