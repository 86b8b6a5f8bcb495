"""An address belongs to one user, in any case of its letters and with any collation of the database."""

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
    """A migrated database in UTF-8. `lower` of the collation C changes ASCII letters only."""
    if request.param != "C":
        yield request.getfixturevalue("database_url")
        return
    identifier = psycopg.sql.Identifier(name := f"outbox_test_{secrets.token_hex(6)}")
    with psycopg.connect(server_url, autocommit=True) as connection:
        # The server may have another default provider; Postgres 14 has only one.
        provider = psycopg.sql.SQL("LOCALE_PROVIDER libc" if connection.info.server_version >= 150_000 else "")
        create = psycopg.sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C' {}")
        connection.execute(create.format(identifier, provider))
        migrate(with_database(server_url, name))
        yield with_database(server_url, name)
        connection.execute(psycopg.sql.SQL("DROP DATABASE {} WITH (FORCE)").format(identifier))


@pytest.fixture
def api(url: str) -> Iterator[Api]:
    """A service with that database."""
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
"""Pairs of addresses that differ only in case or in Unicode composition."""


def test_an_address_in_another_case_is_taken(api: Api, url: str) -> None:
    """It gets a 409 with any collation of the database, at every try."""
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
    """An ASCII local part keeps its case; any other address is stored, shown and used in lower case."""
    typed = ["Alice@Example.com", "ÉLODIE.B@Example.com"]
    shown = [api.create(f"user_{n}", email=email).json()["user"]["email"] for n, email in enumerate(typed)]

    assert shown == ["Alice@example.com", "élodie.b@example.com"]
    with postgres.connect(url, "test") as connection:
        stored = connection.execute("SELECT email FROM users ORDER BY username").fetchall()
    assert [row["email"] for row in stored] == shown
