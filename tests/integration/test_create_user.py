"""Creating a user: what is written, what is refused, and that it is all or nothing."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outbox.runtime.settings import ServiceSettings
from tests.conftest import Connection
from tests.support.api import PASSWORD, Api, is_problem, serve, user

FIELDS = ("username", "password", "full_name", "email")


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service on a database of the test's own."""
    with serve(service_settings) as served:
        yield served


def written(connection: Connection) -> tuple[int, int]:
    """Returns how many users and outbox rows there are."""
    row = connection.execute(
        "SELECT (SELECT count(*) FROM users) AS users, (SELECT count(*) FROM outbox) AS rows"
    ).fetchone()
    assert row is not None
    return row["users"], row["rows"]


# What is written.


def test_a_user_is_created_and_the_hash_stays_inside(api: Api, connection: Connection) -> None:
    """The answer is 201 with the user and no trace of the password; the database holds its argon2id hash."""
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
    """The outbox row is written by the transaction that writes the user, with the task's options and the request."""
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
    """Where the outbox row cannot be written, the user is not either, and the name is still free."""
    connection.execute("ALTER TABLE outbox ADD CONSTRAINT no_mail CHECK (false)")
    refused = api.create("alice")
    left = written(connection)
    connection.execute("ALTER TABLE outbox DROP CONSTRAINT no_mail")

    assert is_problem(refused, 500)
    assert left == (0, 0)
    assert api.create("alice").status_code == 201


def test_a_row_that_postgres_refuses_is_not_logged(api: Api, connection: Connection) -> None:
    """A constraint of a newer version is a 500; Postgres' message, which holds the hash, stays out of the log."""
    connection.execute("ALTER TABLE users ADD COLUMN tenant text NOT NULL")
    assert is_problem(api.create("alice"), 500)

    assert "argon2" not in api.log.getvalue()
    assert PASSWORD not in api.log.getvalue()
    assert 'null value in column "tenant"' in api.events("request failed")[0]["error"]


def test_a_rule_of_uniqueness_that_is_not_the_users_is_no_conflict(api: Api, connection: Connection) -> None:
    """An outbox id that is taken, as after a restore that left the sequence behind, is a 500: no user is to blame."""
    assert api.create("alice").status_code == 201
    connection.execute("SELECT setval(pg_get_serial_sequence('outbox', 'id'), 1, false)")
    assert is_problem(api.create("bob"), 500)

    assert written(connection) == (1, 1)
    (failed,) = api.events("request failed")
    assert failed["error"].startswith("RefusedError: Postgres refuses the user: ")
    assert '"outbox_pkey"' in failed["error"]
    assert "argon2" not in api.log.getvalue()
    assert api.create("bob").status_code == 201, "the sequence has gone on"


def test_both_paths_create_users(api: Api, connection: Connection) -> None:
    """The lecture's path answers as ours does."""
    ours, lectures = api.create("alice", "/v1/users"), api.create("bob", "/v1/create_user")

    assert (ours.status_code, lectures.status_code) == (201, 201)
    assert ours.json()["user"].keys() == lectures.json()["user"].keys()
    assert written(connection) == (2, 2)


# Who is first.


def test_what_is_taken_is_refused(api: Api, connection: Connection) -> None:
    """A taken username or email, in whatever case, is a 409 that names it, and leaves nothing behind."""
    assert api.create("alice", email="alice@example.com").status_code == 201

    for field, taken in {
        "username": user("alice", email="other@example.com"),
        "email": user("other", email="alice@example.com"),
        "email in other case": user("other", email="ALICE@EXAMPLE.COM"),
    }.items():
        response = api.client.post("/v1/users", json=taken)
        assert is_problem(response, 409), field
        assert response.json()["errors"] == [{"field": field.partition(" ")[0], "message": "is taken"}]
    assert written(connection) == (1, 1)
    assert api.create("other").status_code == 201


def test_of_many_at_once_one_gets_the_name(api: Api, connection: Connection) -> None:
    """Of 20 clients that want one username at the same time, one gets it and the others are told that it is taken."""
    with ThreadPoolExecutor(20) as clients:
        answers = list(clients.map(lambda number: api.create("alice", email=f"a{number}@example.com"), range(20)))

    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 19
    assert written(connection) == (1, 1)


def test_too_many_at_once_are_sent_away(service_settings: ServiceSettings, connection: Connection) -> None:
    """With the queue for hashes full: 503 with Retry-After and nothing written; when it has drained, users again."""
    with serve(service_settings.model_copy(update={"hash_queue": 1})) as api, ThreadPoolExecutor(30) as clients:
        answers = list(clients.map(lambda number: api.create(f"user_{number}"), range(60)))
        after = api.create("after")

    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {201, 503}
    refused = [answer for answer in answers if answer.status_code == 503]
    assert all(is_problem(answer, 503) and int(answer.headers["retry-after"]) > 0 for answer in refused)
    assert after.status_code == 201
    assert written(connection) == (statuses.count(201) + 1,) * 2


# What is refused.


def test_every_violation_is_named_at_once(api: Api, connection: Connection) -> None:
    """All that is wrong with a body is said in one answer, each with its field."""
    wrong = {"username": "Alice!", "password": "short", "full_name": "R2-D2", "email": "nobody", "is_admin": True}
    response = api.client.post("/v1/users", json=wrong)

    assert is_problem(response, 400)
    assert sorted(violation["field"] for violation in response.json()["errors"]) == sorted(wrong)
    messages = {violation["field"]: violation["message"] for violation in response.json()["errors"]}
    assert all(messages.values())
    assert messages["username"] == "must be lower-case letters, digits and '_' alone"
    assert messages["full_name"] == (
        "must be letters of any script, with 8 combining marks each at most, and spaces alone"
    )
    (violation,) = api.client.post("/v1/users", json=[]).json()["errors"]
    assert violation == {"field": "body", "message": "must be a JSON object"}
    missing = api.client.post("/v1/users", json={})
    assert [violation["field"] for violation in missing.json()["errors"]] == list(FIELDS)
    assert written(connection) == (0, 0)


def test_names_of_any_script_are_kept_as_they_are(api: Api, connection: Connection) -> None:
    """Letters of any script, with their combining marks, come back from the database unchanged."""
    names = ["नरेन्द्र मोदी", "محمد علي", "王小明", "Zoe\u0308 Lu\u0301", "Ελένη", "𐌰𐌱𐌲", "Nguyễn Văn A"]
    for number, name in enumerate(names):
        response = api.create(f"user_{number}", full_name=name)
        assert (response.status_code, response.json()["user"]["full_name"]) == (201, name)

    kept = connection.execute("SELECT full_name FROM users ORDER BY username").fetchall()
    assert [row["full_name"] for row in kept] == names


def hostile_bodies() -> dict[str, bytes]:
    """Returns bodies that nobody sends by mistake, by what is wrong with them."""
    valid = json.dumps(user()).encode()
    bodies = {
        "empty": b"",
        "cut": valid[:-1],
        "two": valid + valid,
        "not JSON": b"username=alice&password=hunter2+hunter2",
        "byte order mark": b"\xef\xbb\xbf" + valid,
        "UTF-16": json.dumps(user()).encode("utf-16"),
        "single quotes": valid.replace(b'"', b"'"),
        "NaN": b'{"username": NaN}',
        "Infinity": b'{"username": 1e999}',
        "5,000 digits": b'{"username": ' + b"9" * 5_000 + b"}",
        "open arrays": b"[" * 60_000,
        "closed arrays": b"[" * 30_000 + b"]" * 30_000,
        "objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        "a surrogate as a field": json.dumps(user() | {"\ud800": 1}).encode(),
        "NUL as a field": json.dumps(user() | {"\0": 1}).encode(),
        "no name as a field": json.dumps(user() | {"": 1}).encode(),
        "invalid UTF-8 as a field": valid[:-1] + b', "\xff": 1}',
        "10,000 fields": json.dumps(dict.fromkeys(map(str, range(5_000)), 1)).encode(),
        "a duplicate that is wrong": valid[:-1] + b', "username": 5}',
    }
    for depth in (500, 990, 1_000, 5_000):
        bodies[f"{depth} arrays in a field"] = valid[:-1] + b', "x":' + b"[" * depth + b"]" * depth + b"}"
    for body in ([], [user()], None, "text", 1, True, 1.5):
        bodies[f"a {type(body).__name__}"] = json.dumps(body).encode()
    for field in FIELDS:
        for value in (None, 5, -1, 10**400, 1.5, True, [], ["a"], {}, {"$ne": 1}, "", "a\0b@example.com", "\ud800" * 9):
            bodies[f"{field}: {value!r:.20}"] = json.dumps(user() | {field: value}).encode()
        bodies[f"{field}: 10,000 characters"] = json.dumps(user() | {field: "a" * 10_000}).encode()
        raw = json.dumps(user() | {field: "SPOT"}).encode()
        bodies[f"{field}: invalid UTF-8"] = raw.replace(b"SPOT", b"abc\xff\xfedef")
        bodies[f"{field}: a raw surrogate"] = raw.replace(b"SPOT", b"abc\xed\xa0\x80def")
        if field != "password":
            bodies[f"{field}: SQL"] = json.dumps(user() | {field: "x'); DROP TABLE users; --"}).encode()
    return bodies


def test_hostile_bodies_are_refused(api: Api, connection: Connection) -> None:
    """Each is a 400 problem: nothing is written, and neither the answer nor the log repeats the password."""
    for what, body in hostile_bodies().items():
        response = api.post(body)
        assert is_problem(response, 400), (what, response.status_code, response.text)
        assert PASSWORD not in response.text, what

    assert written(connection) == (0, 0)
    assert PASSWORD not in api.log.getvalue()
    assert "hunter2" not in api.log.getvalue()
    assert not api.events("request failed")


def test_sql_in_a_password_is_only_a_password(api: Api, connection: Connection) -> None:
    """A password may be anything; it is hashed and never read as SQL."""
    assert api.create("alice", password="'; DROP TABLE users; --").status_code == 201
    assert written(connection) == (1, 1)


def test_of_a_field_given_twice_the_last_counts(api: Api) -> None:
    """A duplicate key is no way around a check: what was checked is what is written."""
    response = api.post(b'{"username": "root_admin", ' + json.dumps(user("alice")).encode()[1:])
    assert (response.status_code, response.json()["user"]["username"]) == (201, "alice")


def test_only_json_is_taken(api: Api, connection: Connection) -> None:
    """A body that is not declared to be JSON is a 415, even where it would be JSON."""
    body = json.dumps(user()).encode()
    for content_type in (
        "text/plain",
        "text/plain; a=application/json",
        "text/plain, application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "/",
        "+json",
        "",
        "; charset=utf-8",
    ):
        assert is_problem(api.post(body, content_type), 415), content_type
    assert written(connection) == (0, 0)

    for number, content_type in enumerate(("application/json; charset=utf-8", "Application/JSON", "a/b+json")):
        response = api.post(json.dumps(user(f"user_{number}")).encode(), content_type)
        assert response.status_code == 201, content_type


@pytest.mark.parametrize("path", ["/v1/users", "/v1/create_user"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_page_of_another_origin_creates_nobody(api: Api, connection: Connection, path: str, framing: str) -> None:
    """What a browser sends across origins without asking has no JSON media type, or none at all: it is a 415.

    For all else it asks first, and the service's answer does not permit it.
    """
    body = json.dumps(user()).encode()
    headers = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    sent = api.client.post(path, content=body if framing == "length" else iter([body]), headers=headers)
    assert "content-type" not in sent.request.headers
    assert is_problem(sent, 415)
    assert "application/json" in sent.json()["detail"]
    assert is_problem(api.client.post(path, headers=headers), 415)

    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    asked = api.client.options(path, headers=headers | asks)
    assert not [name for name in asked.headers if name.startswith("access-control-")]
    assert written(connection) == (0, 0)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
almost_users = st.fixed_dictionaries(
    {"password": st.just(PASSWORD)},
    optional={field: anything | st.just(user()[field]) for field in FIELDS if field != "password"} | {"x": anything},
)


def test_no_body_makes_the_service_fail(api: Api, connection: Connection) -> None:
    """Whatever is sent, the answer is a user or a 4xx problem, with a user and a row written or neither."""

    @settings(max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(almost_users.map(json.dumps).map(str.encode) | anything.map(json.dumps).map(str.encode) | st.binary())
    def check(body: bytes) -> None:
        before = written(connection)
        response = api.post(body)
        created = int(response.status_code == 201)
        assert created or is_problem(response, 400) or is_problem(response, 409), body
        assert PASSWORD not in response.text
        assert written(connection) == (before[0] + created, before[1] + created)

    check()
    assert PASSWORD not in api.log.getvalue()
