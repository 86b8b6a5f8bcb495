"""Functions and operators that another role put into our search_path: none of our statements calls one."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.types.json import Jsonb

from outbox.queries import query, sql_folder
from outbox.runtime import postgres
from outbox.runtime.migrations import migrate
from tests.conftest import Connection
from tests.support.parse_trees import inexact_operators, parse_trees
from tests.support.statements import NAMES, STATEMENTS

GRAMMAR = {"coalesce", "greatest", "least", "extract", "varchar"}
"""Keywords that look like functions and are not looked up by name."""

# Each trap fits some types exactly, so that Postgres prefers it to a function that needs a conversion. Operators are
# tested for all types further down.
TRAPS = """
DO $$
DECLARE
    types text[] := '{smallint,integer,bigint,float8,text,varchar,name,jsonb,timestamptz,interval,regclass,oid,
                      information_schema.sql_identifier}';
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
        EXECUTE format('CREATE FUNCTION public.trap(%%s, %%s) RETURNS boolean LANGUAGE plpgsql AS %%L', one, one, body);
        FOREACH name IN ARRAY '{||,+,-,*,<,<=,=,<>,>,>=,~,!~}'::text[] LOOP
            EXECUTE format('CREATE OPERATOR public.%%s (LEFTARG = %%s, RIGHTARG = %%s, FUNCTION = public.trap)',
                           name, one, one);
        END LOOP;
    END LOOP;
END $$;
"""


def texts() -> Iterator[tuple[str, str]]:
    """Yields the name and text of each SQL file, without comments and strings."""
    for path in sorted(sql_folder().rglob("*.sql")):
        text = re.sub(r"--[^\n]*", "", path.read_text(encoding="utf-8"))
        yield path.name, re.sub(r"'(?:[^']|'')*'", "''", text)


def called_functions() -> set[str]:
    """Returns the names of all functions that our SQL calls."""
    return {name for _, text in texts() for name in re.findall(r"pg_catalog\.(\w+)\(", text)}


@pytest.mark.parametrize(("name", "text"), list(texts()), ids=[name for name, _ in texts()])
def test_functions_are_named_with_their_schema(name: str, text: str) -> None:
    """A bare name is looked up in every schema of search_path. Keywords have a space before the bracket.

    The parser turns `unnest` of several arrays into calls of `pg_catalog.unnest`.
    """
    text = re.sub(r"unnest\((?=(?:[^()]|\([^()]*\))*,)", "", text)
    assert set(re.findall(r"(?<![\w.])([a-z_]\w*)\(", text)) <= GRAMMAR, name


@pytest.fixture(scope="module")
def trapped_url(create_database: Callable[[str | None], str]) -> str:
    """A database that was migrated after another role had put traps into its schema `public`."""
    url = create_database(None)
    with psycopg.connect(url, autocommit=True) as connection:
        names = psycopg.sql.Literal(sorted(called_functions())).as_string(connection)
        connection.execute(TRAPS.replace("%(names)s", names).replace("%%", "%").encode())
    migrate(url)
    return url


@pytest.mark.parametrize(
    "statement",
    ["SELECT left('a'::text, %s)", "SELECT %s FROM information_schema.schemata WHERE schema_name = 'public'"],
    ids=["function", "operator"],
)
def test_a_trap_works(trapped_url: str, statement: LiteralString) -> None:
    """A bare name finds it if psycopg sends a small number; so does a type without operators of its own."""
    with psycopg.connect(trapped_url) as connection, pytest.raises(psycopg.errors.RaiseException, match="trap"):
        connection.execute(statement, [2000])


@pytest.fixture(scope="module")
def trapped(trapped_url: str) -> Iterator[Connection]:
    """A connection to that database, with a row in every status."""
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
    "add_user_once": {**USER, "username": "bob", "email": "bob@example.com", "key": "k", "fingerprint": b"f"},
    "store_answer": {"key": "k", "status_code": 201, "body": "{}"},
    "find_answer": {"key": "k"},
    "delete_old_answers": {"retention": 1.0, "batch": 9},
    "verify_user": USER,
    "use_verification": {"id": 1},
}


@pytest.mark.parametrize("name", NAMES)
def test_no_statement_calls_a_trap(trapped: Connection, name: str) -> None:
    """With numbers of any size, and with integers in place of floats, because psycopg sends the smallest type."""
    given = PARAMETERS.get(name, {})
    small = {key: int(value) if isinstance(value, float) else value for key, value in given.items()}
    for parameters in (given, small):
        with trapped.transaction(force_rollback=True):
            trapped.execute(query("open_verifications"), PARAMETERS["open_verifications"])
            trapped.execute(query(name), parameters)


@pytest.fixture(scope="module")
def clean(create_database: Callable[[str | None], str], template: str) -> Iterator[Connection]:
    """A connection to a migrated database without traps."""
    with postgres.connect(create_database(template), "test") as connection:
        yield connection


def sized(value: Any, number: int) -> Any:
    """Returns a parameter with each of its numbers replaced."""
    if isinstance(value, list):
        return [sized(element, number) for element in value]
    return number if isinstance(value, int | float) else value


@pytest.mark.parametrize("name", NAMES)
def test_operators_fit_their_types_exactly(clean: Connection, name: str) -> None:
    """So no role can define one that fits better, whichever size psycopg sends a number in."""
    given = PARAMETERS.get(name, {})
    with parse_trees(clean) as trees:
        for number in (None, 1, 2**20, 2**40):
            parameters = {key: value if number is None else sized(value, number) for key, value in given.items()}
            with suppress(psycopg.DataError, psycopg.IntegrityError), clean.transaction(force_rollback=True):
                clean.execute(query(name), parameters)
    assert len(trees) >= 4 * 3, "the begin, statement and end of each transaction"
    assert [operator for tree in trees for operator in inexact_operators(clean, tree)] == []


def test_operators_of_the_schema_fit_their_types_exactly(clean: Connection) -> None:
    """Checks, defaults and indexes run at every write; the statements that record migrations are tested too."""
    stored = """
        SELECT conbin::text AS tree FROM pg_constraint WHERE connamespace = current_schema()::regnamespace
        UNION ALL SELECT adbin::text FROM pg_attrdef
        UNION ALL SELECT unnest(ARRAY[indexprs::text, indpred::text]) FROM pg_index
    """
    stored_trees = [row["tree"] for row in clean.execute(stored) if row["tree"]]
    with parse_trees(clean) as trees:
        clean.execute((sql_folder() / "records.sql").read_bytes())
    assert sum(":opno" in tree for tree in stored_trees) > 15
    assert [operator for tree in [*stored_trees, *trees] for operator in inexact_operators(clean, tree)] == []


@pytest.mark.parametrize(
    ("expression", "operator"),
    [
        ("'a'::varchar = 'b'", "=(text,text)"),
        ("'a'::information_schema.sql_identifier = 'b'", "=(name,name)"),
        ("1 = 1.5", "=(numeric,numeric)"),
        ("1 = ANY ('{1.5}'::numeric[])", "=(numeric,numeric)"),
        ("(1::bigint, 'a'::varchar) < (2, 'b')", "<(text,text)"),
        ("'a'::varchar IS DISTINCT FROM 'b'", "=(text,text)"),
        ("ARRAY[1] || ARRAY[2]", "||(anycompatiblearray,anycompatiblearray)"),
        ("'1' || 1", "||(text,anynonarray)"),
    ],
)
def test_an_inexact_operator_is_found(clean: Connection, expression: LiteralString, operator: str) -> None:
    """An operator that needs a conversion of an operand, or that accepts operands of any type."""
    with parse_trees(clean) as trees:
        clean.execute(f"SELECT {expression}")
    assert operator in inexact_operators(clean, trees[0])
