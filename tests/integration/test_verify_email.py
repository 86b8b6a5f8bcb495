"""The link in the mail: whom it verifies, and all that it must not do."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from outbox.runtime import postgres
from outbox.runtime.settings import ServiceSettings
from outbox.signup.secret_code import secret_code
from tests.conftest import Connection
from tests.support.api import Api, is_problem, serve
from tests.support.links import JSON, PATH, Link, mailed
from tests.support.processes import SECRET_KEY
from tests.support.waiting import eventually

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
SCANNER = {"Accept": "*/*"}


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service on a database of the test's own."""
    with serve(service_settings) as served:
        yield served


def state(connection: Connection) -> list[dict[str, Any]]:
    """Returns who is verified and which links are used."""
    return connection.execute(
        "SELECT username, is_email_verified, is_used FROM users JOIN verify_emails USING (username) ORDER BY username"
    ).fetchall()


def is_page(response: httpx.Response, status: int) -> bool:
    """Whether a response is a page that keeps the code to itself and does nothing but post to this service."""
    headers = response.headers
    return bool(
        response.status_code == status
        and headers["content-type"] == "text/html; charset=utf-8"
        and headers["cache-control"] == "no-store"
        and headers["referrer-policy"] == "no-referrer"
        and headers["x-robots-tag"] == "noindex"
        and "default-src 'none'" in headers["content-security-policy"]
        and "form-action 'self'" in headers["content-security-policy"]
        and "frame-ancestors 'none'" in headers["content-security-policy"]
        and "<h1>" in response.text
        and "<script" not in response.text
    )


UNTOUCHED = [{"username": "alice", "is_email_verified": False, "is_used": False}]
VERIFIED = [{"username": "alice", "is_email_verified": True, "is_used": True}]


def test_a_json_client_verifies_by_opening_the_link(api: Api, connection: Connection) -> None:
    """GET with `Accept: application/json` verifies the user, and nobody else."""
    link = mailed(connection)
    mailed(connection, "bob")

    response = api.client.get(PATH, params=link.query, headers=JSON)

    assert (response.status_code, response.json()) == (200, {"is_verified": True})
    assert response.headers["cache-control"] == "no-store"
    assert state(connection) == [*VERIFIED, {"username": "bob", "is_email_verified": False, "is_used": False}]


def test_opening_the_link_in_a_browser_changes_nothing(api: Api, connection: Connection) -> None:
    """A browser or a mail scanner gets a page with a button, however often it comes; the user is not verified."""
    link = mailed(connection)

    for accept in (BROWSER, SCANNER, BROWSER, {"Accept": "text/html, application/json"}, {"Accept": ""}):
        response = api.client.get(PATH, params=link.query, headers=accept)
        assert is_page(response, 200), accept
        assert '<form method="post"><button>' in response.text
        assert link.code not in response.text
        assert "the account alice gets the confirmed address alice@example.com" in response.text
        assert "If you did not sign up, close this page" in response.text
    assert state(connection) == UNTOUCHED


def test_an_account_is_named_to_who_has_the_code_alone(api: Api, connection: Connection) -> None:
    """Whoever guesses ids learns no username and no address, nor does who opens a link that is over."""
    link, over = mailed(connection), mailed(connection, "bob", lifetime=0)
    for query in ({**link.query, "secret_code": "0" * 64}, over.query):
        for method in ("GET", "POST"):
            told = api.client.request(method, PATH, params=query, headers=BROWSER).text
            assert "alice" not in told
            assert "bob" not in told


def test_an_address_is_text_in_the_page(api: Api, connection: Connection) -> None:
    """Markup in an address is shown, not run."""
    connection.execute("INSERT INTO users VALUES ('eve', 'hash', 'Eve', %s)", ["<b>\"'&@example.com"])
    found = connection.execute(
        "INSERT INTO verify_emails (outbox_id, username, email, expired_at)"
        " SELECT 1, username, email, now() + interval '1 min' FROM users RETURNING id"
    ).fetchone()
    assert found is not None
    code = secret_code(SECRET_KEY, found["id"], "eve", "<b>\"'&@example.com")
    shown = api.client.get(PATH, params=Link(found["id"], code).query, headers=BROWSER)
    assert "&lt;b&gt;&quot;&#x27;&amp;@example.com" in shown.text
    assert "<b>" not in shown.text


def test_the_button_verifies(api: Api, connection: Connection) -> None:
    """What the button sends, a form's POST to the page's own address, verifies the user and says so on a page."""
    link = mailed(connection)

    response = api.client.post(PATH, params=link.query, headers=BROWSER, data={})

    assert is_page(response, 200)
    assert "your email address is verified" in response.text
    assert "<form" not in response.text
    assert state(connection) == VERIFIED


def test_a_json_client_may_post_too(api: Api, connection: Connection) -> None:
    """POST with `Accept: application/json` verifies and answers JSON."""
    response = api.client.post(PATH, params=mailed(connection).query, headers=JSON)
    assert (response.status_code, response.json()) == (200, {"is_verified": True})
    assert state(connection) == VERIFIED


def test_of_many_at_once_one_uses_the_link(api: Api, connection: Connection) -> None:
    """Of 10 clients with the same link at the same time, one uses it, and the others are told that it is used."""
    link = mailed(connection)
    with ThreadPoolExecutor(10) as clients:
        answers = list(clients.map(lambda _: api.client.post(PATH, params=link.query, headers=JSON), range(10)))

    assert sorted(answer.status_code for answer in answers) == [200] + [410] * 9
    assert state(connection) == VERIFIED


def test_a_used_link_says_so(api: Api, connection: Connection) -> None:
    """The second use is a 410, as a problem or on a page, by GET or POST."""
    link = mailed(connection)
    api.client.post(PATH, params=link.query, headers=JSON)

    for method in ("GET", "POST"):
        told = api.client.request(method, PATH, params=link.query, headers=JSON)
        shown = api.client.request(method, PATH, params=link.query, headers=BROWSER)
        assert is_problem(told, 410)
        assert "used already" in told.json()["detail"]
        assert is_page(shown, 410)
        assert "used already" in shown.text
        assert "<form" not in shown.text
    assert state(connection) == VERIFIED


def test_an_expired_link_says_so(api: Api, connection: Connection) -> None:
    """A link after its time is a 410 and verifies nobody."""
    link = mailed(connection, lifetime=0)

    for method in ("GET", "POST"):
        told = api.client.request(method, PATH, params=link.query, headers=JSON)
        shown = api.client.request(method, PATH, params=link.query, headers=BROWSER)
        assert is_problem(told, 410)
        assert "expired" in told.json()["detail"]
        assert is_page(shown, 410)
        assert "expired" in shown.text
    assert state(connection) == UNTOUCHED


def test_a_wrong_link_says_so_and_nothing_more(api: Api, connection: Connection) -> None:
    """A wrong code, another user's, and an id that does not exist are told apart by nobody: 400, the same words."""
    alice, bob = mailed(connection), mailed(connection, "bob")
    wrong = [
        Link(alice.email_id, "0" * 64),
        Link(alice.email_id, bob.code),
        Link(bob.email_id, alice.code),
        Link(alice.email_id, alice.code[:-1]),
        Link(alice.email_id, alice.code + "0"),
        Link(alice.email_id, alice.code.upper()),
        Link(alice.email_id, "\0"),
        Link(alice.email_id, "ü' OR 1=1 --"),
        Link(999_999, alice.code),
        Link(2**63 - 1, alice.code),
    ]

    for link in wrong:
        for method in ("GET", "POST"):
            told = api.client.request(method, PATH, params=link.query, headers=JSON)
            shown = api.client.request(method, PATH, params=link.query, headers=BROWSER)
            assert is_problem(told, 400), link
            assert told.json()["detail"] == "this link is not valid: copy it from the mail as a whole"
            assert is_page(shown, 400), link
            assert "This link is not valid: copy it from the mail as a whole." in shown.text
    assert not any(row["is_email_verified"] or row["is_used"] for row in state(connection))


def test_a_wrong_code_does_not_tell_that_a_link_was_used(api: Api, connection: Connection) -> None:
    """Whether a link was used or has expired is for who has the code."""
    used, expired = mailed(connection), mailed(connection, "bob", lifetime=0)
    api.client.post(PATH, params=used.query, headers=JSON)

    for link in (used, expired):
        assert is_problem(api.client.get(PATH, params=Link(link.email_id, "0" * 64).query, headers=JSON), 400)


def test_a_mangled_link_is_a_problem_or_a_page(api: Api, connection: Connection) -> None:
    """A link that lost or changed a part in the mail is a 400 that a client, or a person, can read."""
    mailed(connection)
    big = "9" * 6_000
    for query in (
        "",
        "email_id=1",
        "secret_code=a",
        "email_id=&secret_code=",
        "email_id=x&secret_code=a",
        "email_id=0&secret_code=a",
        "email_id=-1&secret_code=a",
        "email_id=9223372036854775808&secret_code=a",
        f"email_id={big}&secret_code=a",
        f"email_id=1&secret_code={big}",
        "email_id=NaN&secret_code=a",
        "email_id=1;secret_code=a",
        "email_id=1&amp;secret_code=a",
        "email_id[]=1&secret_code[]=a",
        "email_id=1&email_id=2&secret_code=a&secret_code=b",
        "email_id=1&secret_code=%ff%00%ed%a0%80",
        "&".join(f"a{number}=1" for number in range(5_000)),
    ):
        for method in ("GET", "POST"):
            told = api.client.request(method, f"{PATH}?{query}", headers=JSON)
            shown = api.client.request(method, f"{PATH}?{query}", headers=BROWSER)
            assert is_problem(told, 400), (method, query)
            assert "secret_code=" not in told.text
            assert is_page(shown, 400), (method, query)
            assert "This link is not valid: copy it from the mail as a whole." in shown.text
    assert state(connection) == UNTOUCHED
    assert not api.events("request failed")


def test_a_code_of_another_key_is_wrong(service_settings: ServiceSettings, connection: Connection) -> None:
    """A new SECRET_KEY makes every older link worthless."""
    link = mailed(connection)
    with serve(service_settings.model_copy(update={"secret_key": "another secret key of 32 characters"})) as api:
        assert is_problem(api.client.get(PATH, params=link.query, headers=JSON), 400)
    assert state(connection) == UNTOUCHED


def test_the_code_is_in_no_log(api: Api, connection: Connection) -> None:
    """Neither a good nor a bad link leaves its code in the log, not even where '?' came as a part of the path."""
    link = mailed(connection)
    for mark in ("?", "%3F", "%253F", "%3f", "&", ";"):
        for headers in (JSON, BROWSER):
            api.client.get(f"{PATH}{mark}email_id={link.email_id}&secret_code={link.code}", headers=headers)
            api.client.get(f"{PATH}{mark}email_id=x&secret_code={link.code}", headers=headers)

    assert len(api.events("received an HTTP request")) == 24
    assert link.code not in api.log.getvalue()


def test_the_database_holds_no_code(connection: Connection) -> None:
    """What leaks with the database opens no link."""
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


@pytest.mark.parametrize("accept", [JSON, BROWSER])
def test_a_link_to_an_address_that_was_changed_verifies_nobody(
    api: Api, connection: Connection, accept: dict[str, str]
) -> None:
    """It says so, and is not spent: the address may be changed back."""
    link = mailed(connection)
    connection.execute("UPDATE users SET email = 'other@example.com'")
    for method in ("GET", "POST"):
        response = api.client.request(method, PATH, params=link.query, headers=accept)
        assert response.status_code == 410
        assert "another address" in response.text
    assert state(connection) == UNTOUCHED

    connection.execute("UPDATE users SET email = 'alice@example.com'")
    assert api.client.post(PATH, params=link.query, headers=JSON).json() == {"is_verified": True}
    assert state(connection) == VERIFIED


def test_an_address_that_is_changed_at_the_same_moment_spends_no_link(
    api: Api, connection: Connection, database_url: str
) -> None:
    """The change comes between the look at the link and its use: nobody is verified, and the link says so."""
    link = mailed(connection)
    with postgres.connect(database_url, "test") as other, ThreadPoolExecutor(1) as thread:
        with other.transaction():
            other.execute("UPDATE users SET email = 'other@example.com'")
            answer = thread.submit(api.client.post, PATH, params=link.query, headers=JSON)
            eventually(
                lambda: connection.execute(
                    "SELECT FROM pg_stat_activity"
                    " WHERE application_name = 'outbox service' AND wait_event_type = 'Lock'"
                ).fetchall(),
                what="it waits for the user's row",
            )
        assert answer.result(10).status_code == 410
    assert state(connection) == UNTOUCHED


def test_a_wrong_code_waits_for_nobody_and_keeps_nobody_waiting(api: Api, connection: Connection) -> None:
    """Who has no right code locks nothing: neither a verification that somebody uses, nor others' ways to it."""
    link = mailed(connection)
    connection.execute("BEGIN")
    connection.execute("SELECT FROM verify_emails JOIN users USING (username) FOR UPDATE")
    wrong = [Link(link.email_id, "0" * 64)] * 20
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda link: api.client.get(PATH, params=link.query, headers=JSON), wrong))
    connection.execute("ROLLBACK")

    assert [answer.status_code for answer in answers] == [400] * 20
    assert max(answer.elapsed.total_seconds() for answer in answers) < 5
    written = "SELECT xmax::text FROM verify_emails UNION ALL SELECT xmax::text FROM users"
    before = connection.execute(written).fetchall()
    assert api.client.get(PATH, params=wrong[0].query, headers=JSON).status_code == 400
    assert connection.execute(written).fetchall() == before


def test_a_link_that_is_opened_while_its_user_is_deleted(api: Api, connection: Connection) -> None:
    """Verifying and deleting lock in the same order: neither is the other's deadlock, and nothing is "away"."""
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
