"""Each process with a role that has only the grants in the documentation."""

import re
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from outbox.devstack.embedded import EmbeddedServer
from tests.support.mailbox import Mailbox, link_in
from tests.support.processes import Stack
from tests.support.waiting import eventually

ROLES = ("outbox_service", "outbox_relay", "outbox_worker")
DOCS = Path("docs/deploy.md")


@pytest.fixture(scope="module")
def url_of(file_postgres: EmbeddedServer) -> Callable[[str], str]:
    """Returns a database's URL for a role with the documented grants."""
    (granted,) = re.findall(r"```sql\n(GRANT USAGE.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    with psycopg.connect(file_postgres.url, autocommit=True) as connection:
        for role in ROLES:
            connection.execute(f"CREATE ROLE {role} LOGIN".encode())
        connection.execute(granted.encode())
    return lambda role: file_postgres.url.replace("outbox@", f"{role}@")


def test_all_three_work_with_the_documented_grants(
    url_of: Callable[[str], str], stack: Stack, mailbox: Mailbox
) -> None:
    """Sign-up, hand-over, mail and verification work, and no log line says that a right is missing."""
    processes = [stack.run(role.removeprefix("outbox_"), DATABASE_URL=url_of(role)) for role in ROLES]

    assert stack.create_user("alice")[0] == 201
    mail = eventually(lambda: mailbox.to("alice@example.com"), 10, "the mail")[0]
    assert stack.get(link_in(mail).removeprefix(stack.url))[0] == 200
    assert stack.get("/readyz")[0] == 200
    with psycopg.connect(url_of("outbox_relay")) as connection:
        done = "DELETE FROM outbox WHERE status = 'done' RETURNING id"
        eventually(lambda: connection.execute(done).fetchall(), 10, "the row is done, and can be deleted")
    assert [line for process in processes for line in process.text().splitlines() if "denied" in line] == []


@pytest.mark.parametrize(
    ("role", "statement"),
    [
        ("outbox_service", "SELECT hashed_password FROM users"),
        ("outbox_service", "SELECT payload FROM outbox"),
        ("outbox_service", "UPDATE users SET hashed_password = 'x'"),
        ("outbox_service", "DELETE FROM users"),
        ("outbox_relay", "SELECT FROM users"),
        ("outbox_relay", "SELECT FROM verify_emails"),
        ("outbox_relay", "INSERT INTO outbox (task, payload) VALUES ('t', '{}')"),
        ("outbox_worker", "SELECT hashed_password FROM users"),
        ("outbox_worker", "UPDATE users SET email = 'x@example.com'"),
        ("outbox_worker", "DELETE FROM outbox"),
        ("outbox_worker", "CREATE TABLE mine ()"),
    ],
)
def test_a_role_may_do_nothing_else(url_of: Callable[[str], str], role: str, statement: str) -> None:
    """An attacker who controls a process has only the rights of its role."""
    with psycopg.connect(url_of(role)) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(statement.encode())
