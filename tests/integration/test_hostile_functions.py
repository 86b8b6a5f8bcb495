"""Functions and operators that somebody else has put into our search_path: no statement of ours calls one."""

import re
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from outbox import postgres
from outbox.migrate import migrate
from outbox.queries import query, sql_folder
from tests.conftest import Connection
from tests.integration.test_plans import STATEMENTS
from tests.unit.test_queries import NAMES

GRAMMAR = {"coalesce", "greatest", "least", "extract", "varchar"}
"""What looks like a function, and is found by no name."""

# Each trap fits some types exactly, so that it beats a function that would have to convert them.
TRAPS = """
DO $$
DECLARE
    types text[] := '{smallint,integer,bigint,float8,text,varchar,name,jsonb,timestamptz,interval,regclass,oid}';
    body text := 'BEGIN RAISE EXCEPTION ''trap''; END';
    name text; one text; two text;
BEGIN
    FOREACH name IN ARRAY %(names)s::text[] LOOP
        FOREACH one IN ARRAY types LOOP
            EXECUTE format('CREATE FUNCTION public.%%I(%%s) RETURNS text LANGUAGE plpgsql AS %%L', name, one, body);
            FOREACH two IN ARRAY types[1:8] LOOP
                EXECUTE format('CREATE FUNCTION public.%%I(%%s, %%s) RETURNS text LANGUAGE plpgsql AS %%L',
                               name, one, two, body);
            END LOOP;
        END LOOP;
    END LOOP;
    FOREACH one IN ARRAY types LOOP
        FOREACH two IN ARRAY types LOOP
            EXECUTE format('CREATE FUNCTION public.trap(%%s, %%s) RETURNS boolean LANGUAGE plpgsql AS %%L',
                           one, two, body);
            FOREACH name IN ARRAY '{||,+,-,*,<,<=,=,<>,>,>=,!~}'::text[] LOOP
                EXECUTE format('CREATE OPERATOR public.%%s (LEFTARG = %%s, RIGHTARG = %%s, FUNCTION = public.trap)',
                               name, one, two);
            END LOOP;
        END LOOP;
    END LOOP;
END $$;
"""


def texts() -> Iterator[tuple[str, str]]:
    """Yields each file of SQL by its name, without comments and strings."""
    for path in sorted(sql_folder().rglob("*.sql")):
        text = re.sub(r"--[^\n]*", "", path.read_text(encoding="utf-8"))
        yield path.name, re.sub(r"'(?:[^']|'')*'", "''", text)


def called() -> set[str]:
    """Returns the names of all functions that our SQL calls."""
    return {name for _, text in texts() for name in re.findall(r"pg_catalog\.(\w+)\(", text)}


@pytest.mark.parametrize(("name", "text"), list(texts()), ids=[name for name, _ in texts()])
def test_functions_are_named_with_their_schema(name: str, text: str) -> None:
    """Names alone are looked up in every schema of search_path. Keywords are written with a space before a bracket.

    The parser itself makes `unnest` of several arrays calls of `pg_catalog.unnest`.
    """
    text = re.sub(r"unnest\((?=(?:[^()]|\([^()]*\))*,)", "", text)
    assert set(re.findall(r"(?<![\w.])([a-z_]\w*)\(", text)) <= GRAMMAR, name


@pytest.fixture(scope="module")
def trapped_url(create_database: Callable[[str | None], str]) -> str:
    """A database that was migrated after somebody had put traps into its schema `public`."""
    url = create_database(None)
    with psycopg.connect(url, autocommit=True) as connection:
        names = psycopg.sql.Literal(sorted(called())).as_string(connection)
        connection.execute(TRAPS.replace("%(names)s", names).replace("%%", "%").encode())
    migrate(url)
    return url


def test_a_trap_would_be_found(trapped_url: str) -> None:
    """By a name alone, as psycopg sends small numbers."""
    with psycopg.connect(trapped_url) as connection, pytest.raises(psycopg.errors.RaiseException, match="trap"):
        connection.execute("SELECT left('a'::text, %s)", [2000])


@pytest.fixture(scope="module")
def trapped(trapped_url: str) -> Iterator[Connection]:
    """A connection to it, with a row in every state."""
    with postgres.connect(trapped_url, "test") as connection:
        connection.execute(query("add_user"), USER)
        for status in ("pending", "enqueued", "running", "done", "dead", "pending"):
            past = datetime.fromisoformat("2026-01-01T00:00:00Z")
            connection.execute(
                """
                INSERT INTO outbox (task, payload, queue, status, delivery, run_at, enqueued_at, lease_until, done_at,
                                    unhandled_since, worker)
                VALUES ('t', '{"a": 1}', 'default', %s, 1, %s, %s, %s, %s, %s, 'w')
                """,
                [status, past, past, past if status == "running" else None, past if status == "done" else None, past],
            )
        yield connection


USER = {"username": "alice", "hashed_password": "hash", "full_name": "Alice", "email": "alice@example.com"}
PARAMETERS: dict[str, dict[str, Any]] = {
    **STATEMENTS,
    "rescue": {"ids": [3], "statuses": ["pending"], "delays": [0.0], "errors": ["why"]},
    "add_user": {**USER, "username": "bob", "email": "bob@example.com"},
    "add_row": {
        "task": "t",
        "payload": Jsonb({}),
        "queue": "default",
        "delay": 1,
        "max_retries": 3,
        "timeout": 30,
        "unique_key": "k",
        "request_id": "r",
    },
    "unverified_users": {
        "retention": 1.0,
        "after": "-infinity",
        "after_username": "",
        "left_out": ["bob"],
        "batch": 9,
    },
    "delete_expired_users": {"usernames": ["alice"]},
    "limit_migration": {"lock_timeout": 3},
    "record_migration": {"migration": "x"},
    "open_verifications": {"outbox_ids": [1], "usernames": ["alice"], "lifetime": 900},
    "detach_verifications": {"outbox_ids": [1], "usernames": ["alice"]},
    "find_verification": {"id": 1},
    "verify_user": USER,
    "use_verification": {"id": 1},
}


@pytest.mark.parametrize("name", NAMES)
def test_no_statement_calls_a_trap(trapped: Connection, name: str) -> None:
    """Whatever sizes numbers are sent in: small ones as psycopg sends them, and whole ones where fractions may be."""
    given = PARAMETERS.get(name, {})
    small = {key: int(value) if isinstance(value, float) else value for key, value in given.items()}
    for parameters in (given, small):
        with trapped.transaction(force_rollback=True):
            trapped.execute(query("open_verifications"), PARAMETERS["open_verifications"])
            trapped.execute(query(name), parameters)
