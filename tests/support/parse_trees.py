"""Reads Postgres' parse trees: which operators an expression uses, and whether they match its types exactly."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import psycopg

Node = list[Any]
"""A node, or a list in a node, of Postgres' text format for trees (`pg_node_tree`): strings and nodes."""

_IMPLICIT = "2"
"""Postgres' CoercionForm COERCE_IMPLICIT_CAST."""


@contextmanager
def parse_trees(connection: psycopg.Connection[Any]) -> Iterator[list[str]]:
    """Yields a list that collects the tree of each statement that the connection parses during the block."""
    trees: list[str] = []

    def keep(notice: psycopg.errors.Diagnostic) -> None:
        if notice.message_primary == "parse tree:" and notice.message_detail:
            trees.append(notice.message_detail)

    connection.add_notice_handler(keep)
    connection.execute("SET client_min_messages = log")
    connection.execute("SET debug_print_parse = on")
    try:
        yield trees
    finally:
        connection.execute("RESET debug_print_parse")
        connection.execute("RESET client_min_messages")
        connection.remove_notice_handler(keep)


def inexact_operators(connection: psycopg.Connection[Any], tree: str) -> list[str]:
    """Returns the operators of a tree that do not match the types of their operands exactly.

    Postgres would choose another role's operator instead if it were defined for exactly these types.
    """
    converting, operators = set[int](), set[int]()
    for node in _nodes(_parsed(tree)):
        numbers, operands = _operation(node)
        operators.update(numbers)
        if any(_is_converted(operand) for operand in operands):
            converting.update(numbers)
    rows = connection.execute(
        """
        SELECT oid::regoperator::text AS name
        FROM pg_operator
        WHERE oid = ANY (%s::oid[])
           OR oid = ANY (%s::oid[]) AND EXISTS (SELECT FROM pg_type WHERE typtype = 'p' AND oid IN (oprleft, oprright))
        """,
        [list(converting), list(operators)],
    )
    return [row["name"] for row in rows]


def _parsed(tree: str) -> Node:
    root: Node = []
    open_nodes = [root]
    for token in re.findall(r"[{}()]|(?:\\.|[^\s{}()\\])+", tree):
        if token in "{(":
            node: Node = []
            open_nodes[-1].append(node)
            open_nodes.append(node)
        elif token in "})":
            open_nodes.pop()
        else:
            open_nodes[-1].append(token)
    assert open_nodes == [root], "the tree is complete"
    return root


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for child in node:
        if isinstance(child, list):
            yield from _nodes(child)


def _operation(node: Node) -> tuple[list[int], Node]:
    """Returns the OIDs of a node's operators, and their operands."""
    if ":opno" in node:
        return [int(_field(node, ":opno"))], _field(node, ":args")
    if ":opnos" in node:
        return [int(number) for number in _field(node, ":opnos")[1:]], _field(node, ":largs") + _field(node, ":rargs")
    return [], []


def _field(node: Node, name: str) -> Any:
    return node[node.index(name) + 1]


def _is_converted(operand: Node) -> bool:
    return any(
        isinstance(name, str) and name.startswith(":") and name.endswith("format") and value == _IMPLICIT
        for name, value in pairwise(operand)
    )
