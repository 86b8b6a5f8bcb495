"""A request with an Idempotency-Key can be repeated: the same answer, and nothing is done twice."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from outbox.runtime import postgres
from outbox.runtime.settings import RelaySettings, ServiceSettings
from outbox_relay import answer_retention
from outbox_service import passwords
from tests.conftest import Connection
from tests.support.api import Api, count_rows, is_problem, serve, user
from tests.support.waiting import eventually

KEY = "8e03978e-40d5-43dd-bc93-6894a57f9324"
KEYS = ["x", "x" * 255, f'"{"x" * 255}"', r'"with spaces, \"quotes\" and \\"', "!#%&'()*+,-./:;<=>?@[]^_`{|}~", 'a"b']
NOT_KEYS = ["", '"', '""', '"a', "a b", "é", '"é"', r'"a\b"', '"a";q=1', "a, b", "x" * 256, f'"{"x" * 256}"']


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service with a database of its own."""
    with serve(service_settings) as served:
        yield served


@pytest.fixture
def other(database_url: str) -> Iterator[Connection]:
    """A second connection: another request's."""
    with postgres.connect(database_url, "other") as opened:
        yield opened


def create(api: Api, key: str = KEY, name: str = "alice", path: str = "/v1/users", **changes: object) -> httpx.Response:
    """Posts a user with a key."""
    return api.client.post(path, json=user(name, **changes), headers={"Idempotency-Key": key})


def is_replayed(response: httpx.Response) -> bool:
    """Returns whether an answer is marked as an earlier one."""
    return str(response.headers.get("Idempotency-Replayed")) == "true"


@pytest.mark.parametrize("path", ["/v1/users", "/v1/create_user"])
def test_a_repeated_request_gets_the_same_answer(api: Api, connection: Connection, path: str) -> None:
    """Status and body are the same, byte for byte, and there is one user and one row."""
    first, second = create(api, path=path), create(api, path=path)
    assert (first.status_code, is_replayed(first)) == (201, False)
    assert (second.status_code, second.content, is_replayed(second)) == (201, first.content, True)
    assert second.headers["Content-Type"] == first.headers["Content-Type"] == "application/json"
    assert count_rows(connection) == (1, 1)


def test_the_answer_with_a_key_is_that_without(api: Api) -> None:
    """Only the names differ."""
    plain, keyed = api.create("alice"), create(api, name="carol")
    assert plain.headers["Content-Type"] == keyed.headers["Content-Type"]
    assert plain.json()["user"].keys() == keyed.json()["user"].keys()
    assert list(plain.json()["user"]) == list(keyed.json()["user"])


def test_the_answer_outlives_the_user(api: Api, connection: Connection) -> None:
    """It is the same after the user is verified, renamed or deleted."""
    first = create(api)
    connection.execute("UPDATE users SET is_email_verified = true, full_name = 'Carol'")
    assert create(api).content == first.content
    connection.execute("DELETE FROM users")
    repeated = create(api)
    assert (repeated.status_code, repeated.content) == (201, first.content)
    assert count_rows(connection) == (0, 1)


def test_the_answer_is_written_with_the_user_and_the_row(api: Api, connection: Connection) -> None:
    """All three are of one transaction."""
    create(api)
    found = connection.execute(
        "SELECT users.xmin = outbox.xmin AND outbox.xmin = keys.xmin AS together"
        " FROM users CROSS JOIN outbox CROSS JOIN idempotency_keys AS keys"
    ).fetchall()
    assert found == [{"together": True}]


@pytest.mark.parametrize(
    "changes",
    [{"password": "another password"}, {"name": "carol"}, {"path": "/v1/create_user"}, {"full_name": "Al Li"}],
)
def test_a_key_is_for_one_request(api: Api, connection: Connection, changes: dict[str, str]) -> None:
    """Another body or path with the same key is refused."""
    create(api)
    refused = create(api, **changes)
    assert is_problem(refused, 422)
    assert "Idempotency-Key was used for another request" in refused.json()["detail"]
    assert count_rows(connection) == (1, 1)


def test_the_text_of_the_body_does_not_matter(api: Api) -> None:
    """The order of its fields and its spaces may differ, and the key may be quoted or not."""
    first = create(api, key=f'"{KEY}"')
    reordered = dict(reversed(user("alice").items()))
    second = api.client.post("/v1/users", json=reordered, headers={"Idempotency-Key": KEY})
    assert (second.status_code, second.content) == (201, first.content)


def test_a_refused_request_leaves_its_key_unused(api: Api, connection: Connection) -> None:
    """The corrected request may use it, whatever refused the first."""
    api.create("alice")
    assert create(api, email="not an address").status_code == 400
    assert create(api).status_code == 409
    assert connection.execute("SELECT FROM idempotency_keys").fetchall() == []
    assert create(api, name="carol").status_code == 201


@pytest.mark.parametrize("key", NOT_KEYS)
def test_a_value_that_is_not_a_key_is_refused(api: Api, connection: Connection, key: str) -> None:
    """One sentence says what to send, and nothing is written."""
    headers = [(b"Idempotency-Key", key.encode())]
    refused = api.client.post("/v1/users", json=user("alice"), headers=headers)
    assert is_problem(refused, 400)
    assert "Idempotency-Key must be one string of 1 to 255 printable ASCII characters" in refused.json()["detail"]
    assert count_rows(connection) == (0, 0)


def test_two_keys_are_refused(api: Api) -> None:
    """It cannot be known which one the client means."""
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    assert is_problem(api.client.post("/v1/users", json=user("alice"), headers=headers), 400)


@pytest.mark.parametrize("key", KEYS)
def test_all_printable_characters_may_be_in_a_key(api: Api, key: str) -> None:
    """Up to 255 of them."""
    assert create(api, key=key).status_code == 201
    assert is_replayed(create(api, key=key))


def test_a_repetition_costs_no_hash(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing a password is the most expensive part of a sign-up."""
    create(api)
    monkeypatch.setattr(passwords, "hash_password", None)  # a call would fail
    assert create(api).status_code == 201


def hold_key(other: Connection) -> None:
    """Writes the key, as another request does in its transaction."""
    other.execute("INSERT INTO idempotency_keys (key, fingerprint) VALUES (%s, '')", [KEY])


def count_waiting(connection: Connection) -> int:
    """Returns the number of sessions that wait for a lock."""
    return len(connection.execute("SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'").fetchall())


def test_a_second_request_waits_for_the_first(api: Api, connection: Connection, other: Connection) -> None:
    """It gets the answer of the first, although both began before the user existed."""
    with ThreadPoolExecutor(2) as threads:
        with other.transaction():
            other.execute("LOCK TABLE outbox IN SHARE MODE")  # the first has written its key, and waits here
            first = threads.submit(create, api)
            eventually(lambda: count_waiting(connection) == 1, 10, "the first request waits for the table")
            second = threads.submit(create, api)
            eventually(lambda: count_waiting(connection) == 2, 10, "the second request waits for the first")
        answers = [first.result(10), second.result(10)]
    assert [(answer.status_code, is_replayed(answer)) for answer in answers] == [(201, False), (201, True)]
    assert answers[0].content == answers[1].content
    assert count_rows(connection) == (1, 1)


def test_a_second_request_does_the_work_of_one_that_failed(api: Api, connection: Connection, other: Connection) -> None:
    """The key is free again when the transaction of the first is rolled back."""
    with ThreadPoolExecutor(1) as threads:
        with other.transaction(force_rollback=True):
            hold_key(other)
            second = threads.submit(create, api)
            eventually(lambda: count_waiting(connection) == 1, 10, "the second request waits")
        answer = second.result(10)
    assert (answer.status_code, is_replayed(answer)) == (201, False)


def test_a_second_request_waits_5_s_at_most(api: Api, other: Connection, connection: Connection) -> None:
    """Then the answer asks for a later try, and nothing is written."""
    with other.transaction():
        hold_key(other)
        refused = create(api)
    assert is_problem(refused, 409)
    assert refused.headers["Retry-After"] == "1"
    assert count_rows(connection) == (0, 0)


def test_many_equal_requests_create_one_user(service_settings: ServiceSettings, connection: Connection) -> None:
    """However many arrive at once, all that are answered with 201 have the same body."""
    settings = service_settings.model_copy(update={"hash_queue": 1000})
    with serve(settings) as api, ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(lambda _: create(api), range(256)))
    assert {answer.status_code for answer in answers} <= {201, 409, 503}
    assert len({answer.content for answer in answers if answer.status_code == 201}) == 1
    assert [is_replayed(answer) for answer in answers if answer.status_code == 201].count(False) == 1
    assert count_rows(connection) == (1, 1)


def test_answers_are_deleted_after_their_retention(
    api: Api, connection: Connection, relay_settings: RelaySettings
) -> None:
    """From then on the key is unknown. Younger answers stay."""
    settings = relay_settings.model_copy(update={"idempotency_retention": 3600.0})
    create(api, key="old")
    create(api, key="new", name="carol")
    connection.execute("UPDATE idempotency_keys SET created_at = now() - interval '2 hours' WHERE key = 'old'")
    assert answer_retention.delete_old_answers(connection, settings) is None
    assert connection.execute("SELECT key FROM idempotency_keys").fetchall() == [{"key": "new"}]


def test_answers_are_deleted_in_batches(
    connection: Connection, relay_settings: RelaySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full batch is followed by the next at once."""
    monkeypatch.setattr(answer_retention, "BATCH", 2)
    connection.execute(
        "INSERT INTO idempotency_keys (key, fingerprint, created_at)"
        " SELECT n::text, '', now() - interval '2 days' FROM generate_series(1, 3) AS n"
    )
    assert answer_retention.delete_old_answers(connection, relay_settings) == 0.0
    assert answer_retention.delete_old_answers(connection, relay_settings) is None
    assert connection.execute("SELECT FROM idempotency_keys").fetchall() == []
