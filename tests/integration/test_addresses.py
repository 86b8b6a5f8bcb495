"""One address, one user: whatever case it is typed in, and whatever collation the database has."""

import secrets
from collections.abc import Iterator

import psycopg
import psycopg.sql
import pytest

from outbox.runtime import postgres
from outbox.runtime.migrations import migrate
from outbox.runtime.settings import ServiceSettings
from tests.support.api import Api, is_problem, serve
from tests.support.servers import with_database


@pytest.fixture(params=["the server's", "C"])
def url(request: pytest.FixtureRequest, server_url: str) -> Iterator[str]:
    """A migrated database in UTF-8. C is the collation whose `lower` knows no letters but those of ASCII."""
    if request.param != "C":
        yield request.getfixturevalue("database_url")
        return
    name = psycopg.sql.Identifier(created := f"outbox_test_{secrets.token_hex(6)}")
    with psycopg.connect(server_url, autocommit=True) as connection:
        # The server's own provider may be another; Postgres 14 has but one.
        provider = psycopg.sql.SQL("LOCALE_PROVIDER libc" if connection.info.server_version >= 150_000 else "")
        create = psycopg.sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C' {}")
        connection.execute(create.format(name, provider))
        migrate(with_database(server_url, created))
        yield with_database(server_url, created)
        connection.execute(psycopg.sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@pytest.fixture
def api(url: str) -> Iterator[Api]:
    """A service on that database."""
    with serve(ServiceSettings(database_url=url, secret_key="k" * 32)) as served:
        yield served


SAME = [
    ("alice@example.com", "ALICE@Example.COM"),
    ("élodie@example.com", "Élodie@example.com"),
    ("E\u0301RIC@example.com", "\u00e9ric@example.com"),
    ("БОРИС@example.com", "борис@example.com"),
    ("Δημήτρης@example.com", "ΔΗΜΉΤΡΗΣ@example.com"),
    ("STRAẞE@example.com", "straße@example.com"),
    ("\u0130lker@example.com", "i\u0307lker@example.com"),
    ("Ünal.B+Tag@EXÄMPLE.com", "üNAL.b+tag@exämple.com"),
    ("a@xn--exmple-cua.com", "A@Exämple.com"),
]
"""Addresses that differ in case or in how they are composed."""


def test_an_address_in_another_case_is_taken(api: Api, url: str) -> None:
    """Whatever the collation of the database, it is a 409, and stays one however often it is tried."""
    for number, (first, second) in enumerate(SAME):
        assert api.create(f"first_{number}", email=first).status_code == 201, first
        for email in (first, second):
            response = api.create(f"second_{number}", email=email)
            assert is_problem(response, 409), email
            assert response.json()["errors"] == [{"field": "email", "message": "is taken"}]

    with postgres.connect(url, "test") as connection:
        users = connection.execute("SELECT count(*) AS users FROM users").fetchone()
    assert users == {"users": len(SAME)}


def test_the_answer_shows_the_address_that_the_mail_goes_to(api: Api, url: str) -> None:
    """ASCII before the @ stays as it was typed; any other address is stored, shown and written to in lower case."""
    typed = ["Alice@Example.com", "ÉLODIE.B@Example.com"]
    shown = [api.create(f"user_{n}", email=email).json()["user"]["email"] for n, email in enumerate(typed)]

    assert shown == ["Alice@example.com", "élodie.b@example.com"]
    with postgres.connect(url, "test") as connection:
        stored = connection.execute("SELECT email FROM users ORDER BY username").fetchall()
    assert [row["email"] for row in stored] == shown
