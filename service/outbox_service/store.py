"""The service's statements in Postgres: creates users, verifies addresses, checks readiness."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import LiteralString, NamedTuple

import psycopg
from psycopg.rows import class_row, scalar_row
from psycopg_pool import AsyncConnectionPool

import outbox
from outbox.errors import OutboxError
from outbox.queries import query
from outbox.row import named
from outbox.runtime import logs, postgres, schema
from outbox.runtime.outage import Outage
from outbox.runtime.redaction import one_line
from outbox.runtime.settings import ServiceSettings
from outbox.signup.secret_code import is_secret_code
from outbox.signup.send_verify_email import SEND_VERIFY_EMAIL, SendVerifyEmail
from outbox_service.idempotency import IdempotencyKey, KeyInUseError, StoredAnswer
from outbox_service.notifier import RelayNotifier
from outbox_service.pool import AsyncConnection, check_writable
from outbox_service.schemas import CreateUser, User, UserCreated

_FIELD_OF_CONSTRAINT = {"users_pkey": "username", "users_email_key": "email"}
"""The field that is taken, by the violated constraint. No other violation is the client's fault."""


class TakenError(OutboxError):
    """Another user has this username or email."""

    def __init__(self, field: str) -> None:
        super().__init__(f"this {field} is taken")
        self.field = field


class RefusedError(OutboxError):
    """Postgres refuses a row that this version considers valid.

    The database has a rule that this version does not know, or the sequence gave the outbox row an id that is taken, as
    after a restore that left the sequence behind.
    """


class LinkState(Enum):
    """The state of a verification link."""

    VALID = "valid"
    WRONG = "wrong"
    """There is no such verification, or the secret code is not its code."""
    OUTDATED = "outdated"
    """The user's address has changed since the mail."""
    USED = "used"
    """The link verified the user's address earlier."""
    EXPIRED = "expired"


class OpenedLink(NamedTuple):
    """A link's state, and its account. Only a client with the right code may see the account."""

    state: LinkState
    username: str
    email: str


class _VerificationRow(NamedTuple):
    """A row of the statement `find_verification`."""

    id: int
    username: str
    email: str
    is_used: bool
    is_expired: bool
    is_current: bool
    """Whether the verification is for the user's present address."""


@dataclass(frozen=True)
class Store:
    """The service's database."""

    pool: AsyncConnectionPool[AsyncConnection]
    notifier: RelayNotifier
    settings: ServiceSettings
    outage: Outage

    @asynccontextmanager
    async def _connection(self, wait: float | None = None) -> AsyncGenerator[AsyncConnection]:
        """Yields a connection within `wait` seconds, and records whether Postgres is away."""
        try:
            async with self.pool.connection(wait) as connection:
                try:
                    yield connection
                except psycopg.errors.ReadOnlySqlTransaction:
                    await connection.close()  # a new connection may reach a new primary
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
            TakenError: another user has the username or email; nothing was written.
            RefusedError: Postgres refuses one of the two rows; nothing was written.
            psycopg.OperationalError: Postgres is away. Nothing was written, unless the connection broke during the
                commit; then either both rows exist or neither does.
        """
        async with self._sign_up() as connection:
            created = await _insert(connection, query("add_user"), _columns(user, hashed_password))
            assert created is not None
            await self._add_mail(connection, user, request_id)
        self.notifier.notify_soon()
        return created

    async def create_user_once(
        self, user: CreateUser, hashed_password: str, request_id: str, key: IdempotencyKey
    ) -> StoredAnswer | None:
        """Writes as `create_user` does, and the answer under the key in the same transaction.

        Returns:
            The answer; None if the key is taken, and then nothing was written.

        Raises:
            KeyInUseError: another transaction has written the key, and has not ended in time; nothing was written.
            TakenError, RefusedError, psycopg.OperationalError: as `create_user` does.
        """
        async with self._sign_up() as connection:
            await connection.execute(query("limit_key_wait"))
            columns = {**_columns(user, hashed_password), "key": key.value, "fingerprint": key.fingerprint}
            try:
                created = await _insert(connection, query("add_user_once"), columns)
            except psycopg.errors.LockNotAvailable:
                raise KeyInUseError(
                    "another request with this Idempotency-Key, or for this user, has not ended: try again in a moment"
                ) from None
            if created is None:
                return None
            await self._add_mail(connection, user, request_id)
            answer = StoredAnswer(key.fingerprint, 201, UserCreated(user=created).model_dump_json())
            stored = {"key": key.value, "status_code": answer.status_code, "body": answer.body}
            await connection.execute(query("store_answer"), stored)
        self.notifier.notify_soon()
        return answer

    async def find_answer(self, key: IdempotencyKey) -> StoredAnswer | None:
        """Returns the answer that is stored under a key.

        Raises:
            psycopg.OperationalError: Postgres is away.
        """
        async with self._connection() as connection:
            cursor = connection.cursor(row_factory=named(StoredAnswer))
            await cursor.execute(query("find_answer"), {"key": key.value})
            return await cursor.fetchone()

    @asynccontextmanager
    async def _sign_up(self) -> AsyncGenerator[AsyncConnection]:
        """Yields a connection in a transaction that writes a user, and converts its errors."""
        try:
            async with self._connection() as connection, connection.transaction():
                yield connection
        except psycopg.IntegrityError as error:
            if field := _FIELD_OF_CONSTRAINT.get(error.diag.constraint_name or ""):
                raise TakenError(field) from None
            # The error's detail contains the refused row with its hash, and would be logged.
            raise RefusedError(f"Postgres refuses the user: {error.diag.message_primary}") from None

    async def _add_mail(self, connection: AsyncConnection, user: CreateUser, request_id: str) -> None:
        await outbox.add(
            connection,
            SEND_VERIFY_EMAIL,
            SendVerifyEmail(username=user.username),
            delay=self.settings.verify_email_delay,
            request_id=request_id,
        )

    async def open_link(self, email_id: int, code: str, *, use: bool) -> OpenedLink:
        """Returns a link's state, and verifies its user if the link is valid and `use` is set.

        Args:
            email_id: the id of the verification.
            code: the link's secret code.
            use: False only reads.

        Raises:
            psycopg.OperationalError: Postgres is away.
        """
        async with self._connection() as connection:
            state, row = await self._read_link(connection, email_id, code)
            if use and state is LinkState.VALID and not await _use_link(connection, row):
                # The user, the address or the link changed since it was read.
                state, row = await self._read_link(connection, email_id, code)
                if state is LinkState.VALID:  # the address was changed and changed back: the link was not used
                    state = LinkState.OUTDATED
            return OpenedLink(state, row.username, row.email)

    async def _read_link(
        self, connection: AsyncConnection, email_id: int, code: str
    ) -> tuple[LinkState, _VerificationRow]:
        cursor = connection.cursor(row_factory=named(_VerificationRow))
        await cursor.execute(query("find_verification"), {"id": email_id})
        found = await cursor.fetchone()
        # The code is compared even if the id does not exist, so that the answer takes as long.
        row = found or _VerificationRow(email_id, "", "", is_used=False, is_expired=False, is_current=False)
        is_right = is_secret_code(code, self.settings.secret_key, row.id, row.username, row.email)
        if found is None or not is_right:
            return LinkState.WRONG, row
        if not row.is_current:
            return LinkState.OUTDATED, row
        if row.is_used:
            return LinkState.USED, row
        return LinkState.EXPIRED if row.is_expired else LinkState.VALID, row

    async def check_ready(self) -> None:
        """Checks that Postgres answers and accepts writes, and that its database is in UTF-8 and migrated.

        Raises:
            UnsupportedDatabaseError: the database is not in UTF-8.
            NotMigratedError: it lacks migrations.
            psycopg.Error, psycopg_pool.PoolTimeout: Postgres does not answer, or is read-only.
        """
        async with self._connection(wait=0.8) as connection:
            await check_writable(connection)
            schema.check_encoding(connection)
            cursor = connection.cursor(row_factory=scalar_row)
            try:
                await cursor.execute(query("applied_migrations"))
            except psycopg.errors.UndefinedTable:
                schema.check_applied(set())
            else:
                schema.check_applied(set(await cursor.fetchall()))


def _columns(user: CreateUser, hashed_password: str) -> dict[str, object]:
    return {
        "username": user.username,
        "hashed_password": hashed_password,
        "full_name": user.full_name,
        "email": user.email,
    }


async def _insert(connection: AsyncConnection, statement: LiteralString, columns: dict[str, object]) -> User | None:
    # Binary, because the text of a timestamp depends on the session's DateStyle.
    cursor = connection.cursor(binary=True, row_factory=class_row(User))
    await cursor.execute(statement, columns)
    return await cursor.fetchone()


async def _use_link(connection: AsyncConnection, row: _VerificationRow) -> bool:
    """Verifies the user and spends the link in one transaction; returns whether it did both, else neither."""
    async with connection.transaction():
        verified = await connection.execute(query("verify_user"), {"username": row.username, "email": row.email})
        used = await connection.execute(query("use_verification"), {"id": row.id})
        is_done = verified.rowcount == used.rowcount == 1
        if not is_done:
            raise psycopg.Rollback
    return is_done
