"""The plans that Postgres makes for the project's statements."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import psycopg
from psycopg.sql import SQL, Literal

from outbox.queries import query

MODES = ("force_custom_plan", "force_generic_plan")
"""Values of `plan_cache_mode`: a plan for these parameters, or for any."""


def plan_of(
    connection: psycopg.Connection[dict[str, Any]], name: str, parameters: Mapping[str, Any], mode: str
) -> list[dict[str, Any]]:
    """Returns the nodes of a statement's plan, prepared as psycopg does from the sixth execution on."""
    order: list[str] = []

    def number(match: re.Match[str]) -> str:
        if match[1] not in order:
            order.append(match[1])
        return f"${order.index(match[1]) + 1}"

    text = re.sub(r"%\((\w+)\)s", number, query(name))
    literals = SQL(", ").join(Literal(parameters[key]) for key in order)
    arguments = SQL("({})").format(literals) if order else SQL("")
    with connection.transaction(force_rollback=True):
        connection.execute(SQL("SET LOCAL plan_cache_mode = {}").format(Literal(mode)))
        connection.execute(SQL("PREPARE statement AS " + text))
        try:
            found = connection.execute(SQL("EXPLAIN (FORMAT JSON) EXECUTE statement{}").format(arguments)).fetchone()
        finally:
            connection.execute("DEALLOCATE statement")
    assert found is not None
    plan = found["QUERY PLAN"]
    return list(nodes((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]))


def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a node of a plan and all nodes below it."""
    yield node
    for child in node.get("Plans", []):
        yield from nodes(child)
