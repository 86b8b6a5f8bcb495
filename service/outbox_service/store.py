"""What the service reads from Postgres and writes to it."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import psycopg
from psycopg_pool import AsyncConnectionPool

import outbox
from outbox.errors import OutboxError
from outbox.queries import query
from outbox.runtime import logs, postgres
from outbox.runtime.outage import Outage
from outbox.runtime.redaction import one_line
from outbox.runtime.settings import ServiceSettings
from outbox.signup.secret_code import is_secret_code
from outbox.signup.send_verify_email import SEND_VERIFY_EMAIL, SendVerifyEmail
from outbox_service.notifier import RelayNotifier
from outbox_service.pool import AsyncConnection, check_writable
from outbox_service.schemas import CreateUser, User

_FIELD_OF_CONSTRAINT = {"users_pkey": "username", "users_email_key": "email"}
"""What is taken, by the constraint that says so; a violation of any other is not the user's doing."""


class TakenError(OutboxError):
    """Another user has this username or email."""

    def __init__(self, field: str) -> None:
        super().__init__(f"this {field} is taken")
        self.field = field


class RefusedError(OutboxError):
    """Postgres refuses a row that this version thinks is good.

    It has a rule that this version does not know, or has given an outbox row an id that is taken, as after a restore
    that left the sequence behind.
    """


class Verification(Enum):
    """What a link turns out to be."""

    VALID = "valid"
    WRONG = "wrong"
    OUTDATED = "outdated"
    """The user's address was changed since."""
    USED = "used"
    EXPIRED = "expired"


class Opened(NamedTuple):
    """A link that was opened, and the account that it is for, which is for who has the right code alone."""

    found: Verification
    username: str
    email: str


@dataclass(frozen=True)
class Store:
    """The service's database."""

    pool: AsyncConnectionPool[AsyncConnection]
    notifier: RelayNotifier
    settings: ServiceSettings
    outage: Outage

    @asynccontextmanager
    async def _connection(self, wait: float | None = None) -> AsyncGenerator[AsyncConnection]:
        """Lends a connection, after `wait` seconds at most, and takes note of whether Postgres is away."""
        try:
            async with self.pool.connection(wait) as connection:
                try:
                    yield connection
                except psycopg.errors.ReadOnlySqlTransaction:
                    await connection.close()  # the next one may lead to a new primary
                    raise
        except postgres.AWAY as error:
            if postgres.is_outage(error):
                self.outage.away(error)
            else:
                logs.get().warning("statement refused", error=one_line(error))
            raise
        self.outage.back()

    async def create_user(self, user: CreateUser, hashed_password: str, request_id: str) -> User:
        """Writes the user and the outbox row of the verification mail, in one transaction.

        Raises:
            TakenError: the username or email is another user's; nothing was written.
            RefusedError: Postgres refuses one of the two rows; nothing was written.
            psycopg.OperationalError: Postgres is away. Nothing was written, unless the connection broke in the
                very moment of the commit; then either both rows are there or none is.
        """
        try:
            async with self._connection() as connection, connection.transaction():
                cursor = await connection.execute(
                    query("add_user"),
                    {
                        "username": user.username,
                        "hashed_password": hashed_password,
                        "full_name": user.full_name,
                        "email": user.email,
                    },
                    binary=True,  # a time's text depends on the session's DateStyle
                )
                row = await cursor.fetchone()
                await outbox.add(
                    connection,
                    SEND_VERIFY_EMAIL,
                    SendVerifyEmail(username=user.username),
                    delay=self.settings.verify_email_delay,
                    request_id=request_id,
                )
        except psycopg.IntegrityError as error:
            if field := _FIELD_OF_CONSTRAINT.get(error.diag.constraint_name or ""):
                raise TakenError(field) from None
            # The error's own text has the refused row in it, hash and all, and would end up in the log.
            raise RefusedError(f"Postgres refuses the user: {error.diag.message_primary}") from None
        self.notifier.notify_soon()
        return User.model_validate(row)

    async def verify(self, email_id: int, code: str, *, use: bool) -> Opened:
        """Looks at a link and, if it is valid and `use` says so, verifies its user.

        Args:
            email_id: which verification.
            code: the link's secret code.
            use: False only looks.

        Raises:
            psycopg.OperationalError: Postgres is away.
        """
        async with self._connection() as connection:
            found, row = await self._judge(connection, email_id, code)
            if use and found is Verification.VALID and not await _use(connection, row):
                # The user, the address or the link has changed since.
                found, row = await self._judge(connection, email_id, code)
                found = Verification.USED if found is Verification.VALID else found
            return Opened(found, row["username"], row["email"])

    async def _judge(
        self, connection: AsyncConnection, email_id: int, code: str
    ) -> tuple[Verification, dict[str, Any]]:
        cursor = await connection.execute(query("find_verification"), {"id": email_id})
        row = await cursor.fetchone()
        # A made-up row for an id that does not exist, so that the answer takes as long.
        found = row or {"id": email_id, "username": "", "email": ""}
        is_right = is_secret_code(code, self.settings.secret_key, found["id"], found["username"], found["email"])
        if row is None or not is_right:
            return Verification.WRONG, found
        if not row["is_current"]:
            return Verification.OUTDATED, found
        if row["is_used"]:
            return Verification.USED, found
        return Verification.EXPIRED if row["is_expired"] else Verification.VALID, found

    async def check_ready(self) -> None:
        """Checks that Postgres answers and may be written to, and that its database is in UTF-8 and migrated.

        Raises:
            UnsupportedDatabaseError: it is not in UTF-8.
            NotMigratedError: it lacks migrations.
            psycopg.Error, psycopg_pool.PoolTimeout: it does not answer, or is read-only.
        """
        async with self._connection(wait=0.8) as connection:
            await check_writable(connection)
            postgres.check_encoding(connection)
            try:
                cursor = await connection.execute(query("applied_migrations"))
            except psycopg.errors.UndefinedTable:
                postgres.check_applied(set())
            else:
                postgres.check_applied({row["migration_id"] for row in await cursor.fetchall()})


async def _use(connection: AsyncConnection, row: dict[str, Any]) -> bool:
    """Verifies the user and spends the link, and returns whether both could be done; else nothing is written."""
    async with connection.transaction():
        verified = await connection.execute(query("verify_user"), row)
        used = await connection.execute(query("use_verification"), row)
        is_done = verified.rowcount == used.rowcount == 1
        if not is_done:
            raise psycopg.Rollback
    return is_done
