"""Creating a user: the rows that are written, in one transaction or not at all, and who gets a name."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from outbox.runtime.settings import ServiceSettings
from tests.conftest import Connection
from tests.support.api import PASSWORD, Api, count_rows, is_problem, serve, user


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service with a database of its own."""
    with serve(service_settings) as served:
        yield served


def test_a_user_is_created_and_the_hash_stays_inside(api: Api, connection: Connection) -> None:
    """The answer is 201 with the user and without the password; the database holds its argon2id hash."""
    response = api.create("alice_1", full_name="Alice Liddell", email="Alice@Example.com")

    assert response.status_code == 201
    answer = response.json()
    assert answer.keys() == {"user"}
    assert {name: answer["user"][name] for name in ("username", "full_name", "email", "is_email_verified")} == {
        "username": "alice_1",
        "full_name": "Alice Liddell",
        "email": "Alice@example.com",
        "is_email_verified": False,
    }
    assert answer["user"].keys() - {"username", "full_name", "email", "is_email_verified"} == {
        "created_at",
        "password_changed_at",
    }
    assert "argon2" not in response.text
    row = connection.execute("SELECT hashed_password FROM users WHERE username = 'alice_1'").fetchone()
    assert row is not None
    assert row["hashed_password"].startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert PASSWORD not in api.log.getvalue()
    assert "argon2" not in api.log.getvalue()


def test_the_user_and_the_mail_are_one_transaction(service_settings: ServiceSettings, connection: Connection) -> None:
    """The transaction that writes the user writes the outbox row, with the task's options and the request id."""
    with serve(service_settings.model_copy(update={"verify_email_delay": 7})) as api:
        body = user("alice")
        response = api.client.post("/v1/users", json=body, headers={"X-Request-ID": "trace-1"})
    assert response.status_code == 201

    row = connection.execute(
        """
        SELECT task, payload, queue, status, delivery, attempts, max_retries, timeout, request_id, unique_key,
               extract(epoch FROM run_at - outbox.created_at)::int AS delay, outbox.xmin = users.xmin AS together
        FROM outbox CROSS JOIN users
        """
    ).fetchone()
    assert row == {
        "task": "send_verify_email",
        "payload": {"username": "alice"},
        "queue": "critical",
        "status": "pending",
        "delivery": 0,
        "attempts": 0,
        "max_retries": 10,
        "timeout": 30,
        "request_id": "trace-1",
        "unique_key": None,
        "delay": 7,
        "together": True,
    }


def test_without_the_mail_there_is_no_user(api: Api, connection: Connection) -> None:
    """If the outbox row cannot be written, neither is the user, and the name stays free."""
    connection.execute("ALTER TABLE outbox ADD CONSTRAINT no_mail CHECK (false)")
    refused = api.create("alice")
    counts = count_rows(connection)
    connection.execute("ALTER TABLE outbox DROP CONSTRAINT no_mail")

    assert is_problem(refused, 500)
    assert counts == (0, 0)
    assert api.create("alice").status_code == 201


def test_a_row_that_postgres_refuses_is_not_logged(api: Api, connection: Connection) -> None:
    """A violated constraint of a newer version is a 500; Postgres' detail, which holds the hash, is not logged."""
    connection.execute("ALTER TABLE users ADD COLUMN tenant text NOT NULL")
    assert is_problem(api.create("alice"), 500)

    assert "argon2" not in api.log.getvalue()
    assert PASSWORD not in api.log.getvalue()
    assert 'null value in column "tenant"' in api.events("request failed")[0]["error"]


def test_a_unique_violation_of_another_table_is_no_conflict(api: Api, connection: Connection) -> None:
    """A taken outbox id, as after a restore that left the sequence behind, is a 500 and not a 409."""
    assert api.create("alice").status_code == 201
    connection.execute("SELECT setval(pg_get_serial_sequence('outbox', 'id'), 1, false)")
    assert is_problem(api.create("bob"), 500)

    assert count_rows(connection) == (1, 1)
    (failed,) = api.events("request failed")
    assert failed["error"].startswith("RefusedError: Postgres refuses the user: ")
    assert '"outbox_pkey"' in failed["error"]
    assert "argon2" not in api.log.getvalue()
    assert api.create("bob").status_code == 201, "the sequence has advanced"


def test_both_paths_create_users(api: Api, connection: Connection) -> None:
    """`/v1/create_user` answers as `/v1/users` does."""
    first, second = api.create("alice", "/v1/users"), api.create("bob", "/v1/create_user")

    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["user"].keys() == second.json()["user"].keys()
    assert count_rows(connection) == (2, 2)


def test_names_of_any_script_are_kept_as_they_are(api: Api, connection: Connection) -> None:
    """Letters of any script, with their combining marks, come back from the database unchanged."""
    full_names = ["नरेन्द्र मोदी", "محمد علي", "王小明", "Zoe\u0308 Lu\u0301", "Ελένη", "𐌰𐌱𐌲", "Nguyễn Văn A"]
    for number, name in enumerate(full_names):
        response = api.create(f"user_{number}", full_name=name)
        assert (response.status_code, response.json()["user"]["full_name"]) == (201, name)

    kept = connection.execute("SELECT full_name FROM users ORDER BY username").fetchall()
    assert [row["full_name"] for row in kept] == full_names


def test_sql_in_a_password_is_not_interpreted(api: Api, connection: Connection) -> None:
    """A password may contain SQL; it is only hashed."""
    assert api.create("alice", password="'; DROP TABLE users; --").status_code == 201
    assert count_rows(connection) == (1, 1)


def test_what_is_taken_is_refused(api: Api, connection: Connection) -> None:
    """A taken username or email, in any case, is a 409 that names the field, and nothing is written."""
    assert api.create("alice", email="alice@example.com").status_code == 201

    for field, taken in {
        "username": user("alice", email="other@example.com"),
        "email": user("other", email="alice@example.com"),
        "email in other case": user("other", email="ALICE@EXAMPLE.COM"),
    }.items():
        response = api.client.post("/v1/users", json=taken)
        assert is_problem(response, 409), field
        assert response.json()["errors"] == [{"field": field.partition(" ")[0], "message": "is taken"}]
    assert count_rows(connection) == (1, 1)
    assert api.create("other").status_code == 201


def test_one_of_many_concurrent_clients_gets_the_name(api: Api, connection: Connection) -> None:
    """Of 20 concurrent clients with the same username, one gets 201 and the others get 409."""
    with ThreadPoolExecutor(20) as clients:
        answers = list(clients.map(lambda number: api.create("alice", email=f"a{number}@example.com"), range(20)))

    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 19
    assert count_rows(connection) == (1, 1)


def test_too_many_requests_at_once_are_refused(service_settings: ServiceSettings, connection: Connection) -> None:
    """While the queue for hashes is full: 503 with Retry-After and nothing written. Then users can be created again."""
    with serve(service_settings.model_copy(update={"hash_queue": 1})) as api, ThreadPoolExecutor(30) as clients:
        answers = list(clients.map(lambda number: api.create(f"user_{number}"), range(60)))
        after = api.create("after")

    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {201, 503}
    refused = [answer for answer in answers if answer.status_code == 503]
    assert all(is_problem(answer, 503) and int(answer.headers["retry-after"]) > 0 for answer in refused)
    assert after.status_code == 201
    assert count_rows(connection) == (statuses.count(201) + 1,) * 2
