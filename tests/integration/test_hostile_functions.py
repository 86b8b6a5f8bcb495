"""Functions and operators that somebody else has put into our search_path: no statement of ours calls one."""

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
"""What looks like a function, and is found by no name."""

# Each trap fits some types exactly, so that it beats a function that would have to convert them. Operators are tested
# for all types further down.
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


@pytest.mark.parametrize(
    "statement",
    ["SELECT left('a'::text, %s)", "SELECT %s FROM information_schema.schemata WHERE schema_name = 'public'"],
    ids=["function", "operator"],
)
def test_a_trap_would_be_found(trapped_url: str, statement: LiteralString) -> None:
    """By a name alone, as psycopg sends small numbers; by a type that Postgres has made no operator for."""
    with psycopg.connect(trapped_url) as connection, pytest.raises(psycopg.errors.RaiseException, match="trap"):
        connection.execute(statement, [2000])


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


@pytest.fixture(scope="module")
def clean(create_database: Callable[[str | None], str], template: str) -> Iterator[Connection]:
    """A connection to a migrated database without traps."""
    with postgres.connect(create_database(template), "test") as connection:
        yield connection


def sized(value: Any, number: int) -> Any:
    """Returns a parameter with this number instead of each of its own."""
    if isinstance(value, list):
        return [sized(one, number) for one in value]
    return number if isinstance(value, int | float) else value


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_made_for_the_types_that_they_get(clean: Connection, name: str) -> None:
    """Then nobody can make one that fits better, whatever size psycopg sends a number in: it takes the smallest."""
    given = PARAMETERS.get(name, {})
    with parse_trees(clean) as trees:
        for number in (None, 1, 2**20, 2**40):
            parameters = {key: value if number is None else sized(value, number) for key, value in given.items()}
            with suppress(psycopg.DataError, psycopg.IntegrityError), clean.transaction(force_rollback=True):
                clean.execute(query(name), parameters)
    assert len(trees) >= 4 * 3, "a transaction's beginning, its statement and its end"
    assert [operator for tree in trees for operator in inexact_operators(clean, tree)] == []


def test_what_migrations_leave_behind_has_such_operators_too(clean: Connection) -> None:
    """The checks, defaults and indexes, which run at every write, and what records the migrations."""
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
def test_a_looser_operator_would_be_found(clean: Connection, expression: LiteralString, operator: str) -> None:
    """One that Postgres chooses though it has to convert an operand, or that takes operands of any type."""
    with parse_trees(clean) as trees:
        clean.execute(f"SELECT {expression}")
    assert operator in inexact_operators(clean, trees[0])
