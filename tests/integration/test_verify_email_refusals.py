"""Verification links that verify no user: used, expired, wrong, malformed, or for another address."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from outbox.runtime import postgres
from outbox.runtime.settings import ServiceSettings
from outbox_service import store
from tests.conftest import Connection
from tests.support.api import Api, is_problem, serve
from tests.support.link_answers import BROWSER, UNVERIFIED, VERIFIED, has_sentence, is_page, verification_state
from tests.support.links import JSON, PATH, Link, mailed
from tests.support.waiting import eventually


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service with a database of its own."""
    with serve(service_settings) as served:
        yield served


def test_only_a_valid_link_shows_the_account(api: Api, connection: Connection) -> None:
    """A wrong code or an expired link reveals no username and no address."""
    link, expired = mailed(connection), mailed(connection, "bob", lifetime=0)
    for query in ({**link.query, "secret_code": "0" * 64}, expired.query):
        for method in ("GET", "POST"):
            text = api.client.request(method, PATH, params=query, headers=BROWSER).text
            assert "alice" not in text
            assert "bob" not in text


def test_a_used_link_says_so(api: Api, connection: Connection) -> None:
    """The second use is a 410 that says that the address was verified, as JSON or a page, by GET or POST."""
    link = mailed(connection)
    api.client.post(PATH, params=link.query, headers=JSON)

    for method in ("GET", "POST"):
        problem = api.client.request(method, PATH, params=link.query, headers=JSON)
        page = api.client.request(method, PATH, params=link.query, headers=BROWSER)
        assert is_problem(problem, 410)
        assert problem.json()["detail"] == "this link has already been used: it verified your email address"
        assert is_page(page, 410)
        assert has_sentence(page, "This link has already been used: it verified your email address.")
        assert "<form" not in page.text
    assert verification_state(connection) == VERIFIED


def test_an_expired_link_says_so(api: Api, connection: Connection) -> None:
    """An expired link is a 410 and verifies no user."""
    link = mailed(connection, lifetime=0)

    for method in ("GET", "POST"):
        problem = api.client.request(method, PATH, params=link.query, headers=JSON)
        page = api.client.request(method, PATH, params=link.query, headers=BROWSER)
        assert is_problem(problem, 410)
        assert problem.json()["detail"] == "this link has expired, and nothing was changed"
        assert is_page(page, 410)
        assert has_sentence(page, "This link has expired, and nothing was changed.")
    assert verification_state(connection) == UNVERIFIED


def test_a_wrong_link_says_so_and_nothing_more(api: Api, connection: Connection) -> None:
    """A wrong code, another user's code and an id that does not exist all get the same 400."""
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
            problem = api.client.request(method, PATH, params=link.query, headers=JSON)
            page = api.client.request(method, PATH, params=link.query, headers=BROWSER)
            assert is_problem(problem, 400), link
            assert problem.json()["detail"] == "this link is not valid: copy the whole link from the mail"
            assert is_page(page, 400), link
            assert has_sentence(page, "This link is not valid: copy the whole link from the mail.")
    assert not any(row["is_email_verified"] or row["is_used"] for row in verification_state(connection))


def test_a_wrong_code_does_not_reveal_that_a_link_was_used(api: Api, connection: Connection) -> None:
    """Only a client with the right code learns that a link was used or has expired."""
    used, expired = mailed(connection), mailed(connection, "bob", lifetime=0)
    api.client.post(PATH, params=used.query, headers=JSON)

    for link in (used, expired):
        assert is_problem(api.client.get(PATH, params=Link(link.email_id, "0" * 64).query, headers=JSON), 400)


def test_a_mangled_link_is_a_problem_or_a_page(api: Api, connection: Connection) -> None:
    """A link that was truncated or altered in the mail is a 400, as a problem or a page."""
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
            problem = api.client.request(method, f"{PATH}?{query}", headers=JSON)
            page = api.client.request(method, f"{PATH}?{query}", headers=BROWSER)
            assert is_problem(problem, 400), (method, query)
            assert "secret_code=" not in problem.text
            assert is_page(page, 400), (method, query)
            assert has_sentence(page, "This link is not valid: copy the whole link from the mail.")
    assert verification_state(connection) == UNVERIFIED
    assert not api.events("request failed")


def test_a_code_of_another_key_is_wrong(service_settings: ServiceSettings, connection: Connection) -> None:
    """A new SECRET_KEY invalidates every older link."""
    link = mailed(connection)
    with serve(service_settings.model_copy(update={"secret_key": "another secret key of 32 characters"})) as api:
        assert is_problem(api.client.get(PATH, params=link.query, headers=JSON), 400)
    assert verification_state(connection) == UNVERIFIED


@pytest.mark.parametrize("accept", [JSON, BROWSER])
def test_a_link_to_an_address_that_was_changed_verifies_nobody(
    api: Api, connection: Connection, accept: dict[str, str]
) -> None:
    """The answer says so, and the link is not spent: the address may be changed back."""
    link = mailed(connection)
    connection.execute("UPDATE users SET email = 'other@example.com'")
    for method in ("GET", "POST"):
        response = api.client.request(method, PATH, params=link.query, headers=accept)
        assert response.status_code == 410
        assert "his link is for an address that is no longer the account" in response.text
    assert verification_state(connection) == UNVERIFIED

    connection.execute("UPDATE users SET email = 'alice@example.com'")
    assert api.client.post(PATH, params=link.query, headers=JSON).json() == {"is_verified": True}
    assert verification_state(connection) == VERIFIED


def test_an_address_that_changes_during_the_request_spends_no_link(
    api: Api, connection: Connection, database_url: str
) -> None:
    """The address changes between the read of the link and its use: no user is verified, and the answer is 410."""
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
                what="the request waits for the user's row",
            )
        assert answer.result(10).status_code == 410
    assert verification_state(connection) == UNVERIFIED


def test_a_valid_link_that_could_not_be_used_is_not_called_used(
    api: Api, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the address changes and changes back during the request, the answer does not say that it was verified."""

    async def use_nothing(*_: object) -> bool:
        return False

    monkeypatch.setattr(store, "_use_link", use_nothing)
    problem = api.client.post(PATH, params=mailed(connection).query, headers=JSON)

    assert is_problem(problem, 410)
    assert "nothing was changed" in problem.json()["detail"]
    assert verification_state(connection) == UNVERIFIED


def test_a_wrong_code_takes_no_lock(api: Api, connection: Connection) -> None:
    """A request with a wrong code does not wait for a locked verification, and locks none."""
    link = mailed(connection)
    connection.execute("BEGIN")
    connection.execute("SELECT FROM verify_emails JOIN users USING (username) FOR UPDATE")
    wrong = [Link(link.email_id, "0" * 64)] * 20
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda link: api.client.get(PATH, params=link.query, headers=JSON), wrong))
    connection.execute("ROLLBACK")

    assert [answer.status_code for answer in answers] == [400] * 20
    assert max(answer.elapsed.total_seconds() for answer in answers) < 5
    locks = "SELECT xmax::text FROM verify_emails UNION ALL SELECT xmax::text FROM users"
    before = connection.execute(locks).fetchall()
    assert api.client.get(PATH, params=wrong[0].query, headers=JSON).status_code == 400
    assert connection.execute(locks).fetchall() == before
