"""Verification links that are valid: opening one, its button, and where its code is not found."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from outbox.runtime.settings import ServiceSettings
from outbox.signup.secret_code import secret_code
from tests.conftest import Connection
from tests.support.api import Api, serve
from tests.support.link_answers import BROWSER, UNVERIFIED, VERIFIED, has_sentence, is_page, verification_state
from tests.support.links import JSON, PATH, Link, mailed
from tests.support.processes import SECRET_KEY
from tests.support.waiting import eventually

SCANNER = {"Accept": "*/*"}


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service with a database of its own."""
    with serve(service_settings) as served:
        yield served


def test_a_json_client_verifies_by_opening_the_link(api: Api, connection: Connection) -> None:
    """GET with `Accept: application/json` verifies this user and no other."""
    link = mailed(connection)
    mailed(connection, "bob")

    response = api.client.get(PATH, params=link.query, headers=JSON)

    assert (response.status_code, response.json()) == (200, {"is_verified": True})
    assert response.headers["cache-control"] == "no-store"
    assert verification_state(connection) == [
        *VERIFIED,
        {"username": "bob", "is_email_verified": False, "is_used": False},
    ]


def test_opening_the_link_in_a_browser_changes_nothing(api: Api, connection: Connection) -> None:
    """A browser or mail scanner gets a page with a button, however often it asks; the user is not verified."""
    link = mailed(connection)

    for accept in (BROWSER, SCANNER, BROWSER, {"Accept": "text/html, application/json"}, {"Accept": ""}):
        response = api.client.get(PATH, params=link.query, headers=accept)
        assert is_page(response, 200), accept
        assert '<form method="post"><button>' in response.text
        assert link.code not in response.text
        assert has_sentence(
            response,
            "Click the button to verify alice@example.com as the address of the account alice."
            " If you did not sign up, close this page: someone else has the password of this account.",
        )
    assert verification_state(connection) == UNVERIFIED


def test_an_address_is_escaped_in_the_page(api: Api, connection: Connection) -> None:
    """Markup in an address is shown and not interpreted."""
    connection.execute("INSERT INTO users VALUES ('eve', 'hash', 'Eve', %s)", ["<b>\"'&@example.com"])
    row = connection.execute(
        "INSERT INTO verify_emails (outbox_id, username, email, expired_at)"
        " SELECT 1, username, email, now() + interval '1 min' FROM users RETURNING id"
    ).fetchone()
    assert row is not None
    code = secret_code(SECRET_KEY, row["id"], "eve", "<b>\"'&@example.com")
    page = api.client.get(PATH, params=Link(row["id"], code).query, headers=BROWSER)
    assert "&lt;b&gt;&quot;&#x27;&amp;@example.com" in page.text
    assert "<b>" not in page.text


def test_the_button_verifies(api: Api, connection: Connection) -> None:
    """The button's request, a form's POST to the URL of the page, verifies the user and returns a page that says so."""
    link = mailed(connection)

    response = api.client.post(PATH, params=link.query, headers=BROWSER, data={})

    assert is_page(response, 200)
    assert has_sentence(response, "Your email address is verified.")
    assert "<form" not in response.text
    assert verification_state(connection) == VERIFIED


def test_a_json_client_may_post_too(api: Api, connection: Connection) -> None:
    """POST with `Accept: application/json` verifies and answers JSON."""
    response = api.client.post(PATH, params=mailed(connection).query, headers=JSON)
    assert (response.status_code, response.json()) == (200, {"is_verified": True})
    assert verification_state(connection) == VERIFIED


def test_of_many_at_once_one_uses_the_link(api: Api, connection: Connection) -> None:
    """Of 10 concurrent clients with the same link, one uses it and the others get a 410."""
    link = mailed(connection)
    with ThreadPoolExecutor(10) as clients:
        answers = list(clients.map(lambda _: api.client.post(PATH, params=link.query, headers=JSON), range(10)))

    assert sorted(answer.status_code for answer in answers) == [200] + [410] * 9
    assert verification_state(connection) == VERIFIED


def test_the_code_is_in_no_log(api: Api, connection: Connection) -> None:
    """Neither a valid nor a malformed link leaves its code in the log, even if '?' arrives as a part of the path."""
    link = mailed(connection)
    for mark in ("?", "%3F", "%253F", "%3f", "&", ";"):
        for headers in (JSON, BROWSER):
            api.client.get(f"{PATH}{mark}email_id={link.email_id}&secret_code={link.code}", headers=headers)
            api.client.get(f"{PATH}{mark}email_id=x&secret_code={link.code}", headers=headers)

    assert len(api.events("received an HTTP request")) == 24
    assert link.code not in api.log.getvalue()


def test_the_database_holds_no_code(connection: Connection) -> None:
    """A copy of the database opens no link."""
    columns = connection.execute(
        "SELECT column_name FROM information_schema.columns WHERE table_name = 'verify_emails' ORDER BY column_name"
    ).fetchall()
    assert [column["column_name"] for column in columns] == [
        "created_at",
        "email",
        "expired_at",
        "id",
        "is_used",
        "outbox_id",
        "username",
    ]


def test_a_link_may_be_opened_while_its_user_is_deleted(api: Api, connection: Connection) -> None:
    """Verifying and deleting lock in the same order: they do not deadlock, and no outage is reported."""
    link = mailed(connection)
    connection.execute("BEGIN")
    connection.execute("SELECT FROM users FOR UPDATE")
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(api.client.get, PATH, params=link.query, headers=JSON)
        waiting = "SELECT FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted"
        eventually(lambda: connection.execute(waiting).fetchall(), 10, "the request waits")
        connection.execute("DELETE FROM users")
        connection.execute("COMMIT")

        assert answer.result().status_code == 400
    assert not api.events("statement refused")
    assert not api.events("Postgres is away")
