"""Bodies that create no user: invalid fields, hostile JSON, other media types, other origins."""

import json
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outbox.runtime.settings import ServiceSettings
from tests.conftest import Connection
from tests.support.api import PASSWORD, Api, count_rows, is_problem, serve, user

FIELDS = ("username", "password", "full_name", "email")


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service with a database of its own."""
    with serve(service_settings) as served:
        yield served


def test_every_violation_is_named_at_once(api: Api, connection: Connection) -> None:
    """One answer lists all violations of a body, each with its field."""
    wrong = {"username": "Alice!", "password": "short", "full_name": "R2-D2", "email": "nobody", "is_admin": True}
    response = api.client.post("/v1/users", json=wrong)

    assert is_problem(response, 400)
    assert sorted(violation["field"] for violation in response.json()["errors"]) == sorted(wrong)
    messages = {violation["field"]: violation["message"] for violation in response.json()["errors"]}
    assert all(messages.values())
    assert messages["username"] == "must be lower-case letters, digits and '_' only"
    assert messages["full_name"] == (
        "must be letters of any script, each with at most 8 combining marks, and spaces only"
    )
    (violation,) = api.client.post("/v1/users", json=[]).json()["errors"]
    assert violation == {"field": "body", "message": "must be a JSON object"}
    missing = api.client.post("/v1/users", json={})
    assert [violation["field"] for violation in missing.json()["errors"]] == list(FIELDS)
    assert count_rows(connection) == (0, 0)


def hostile_bodies() -> dict[str, bytes]:
    """Returns hostile bodies, by a description of each."""
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
        "an empty name as a field": json.dumps(user() | {"": 1}).encode(),
        "invalid UTF-8 as a field": valid[:-1] + b', "\xff": 1}',
        "10,000 fields": json.dumps(dict.fromkeys(map(str, range(5_000)), 1)).encode(),
        "an invalid duplicate": valid[:-1] + b', "username": 5}',
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
    """Each is a 400 problem: nothing is written, and neither the answer nor the log contains the password."""
    for name, body in hostile_bodies().items():
        response = api.post(body)
        assert is_problem(response, 400), (name, response.status_code, response.text)
        assert PASSWORD not in response.text, name

    assert count_rows(connection) == (0, 0)
    assert PASSWORD not in api.log.getvalue()
    assert "hunter2" not in api.log.getvalue()
    assert not api.events("request failed")


def test_the_last_of_duplicate_fields_counts(api: Api) -> None:
    """A duplicate key bypasses no check: the value that was checked is written."""
    response = api.post(b'{"username": "root_admin", ' + json.dumps(user("alice")).encode()[1:])
    assert (response.status_code, response.json()["user"]["username"]) == (201, "alice")


def test_only_json_is_accepted(api: Api, connection: Connection) -> None:
    """A body that is not declared as JSON is a 415, even if it is JSON."""
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
    assert count_rows(connection) == (0, 0)

    for number, content_type in enumerate(("application/json; charset=utf-8", "Application/JSON", "a/b+json")):
        response = api.post(json.dumps(user(f"user_{number}")).encode(), content_type)
        assert response.status_code == 201, content_type


@pytest.mark.parametrize("path", ["/v1/users", "/v1/create_user"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_page_of_another_origin_creates_nobody(api: Api, connection: Connection, path: str, framing: str) -> None:
    """Without a preflight, a browser sends no JSON media type across origins: the answer is a 415.

    For JSON it sends a preflight, and the service's answer permits nothing.
    """
    body = json.dumps(user()).encode()
    headers = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    sent = api.client.post(path, content=body if framing == "length" else iter([body]), headers=headers)
    assert "content-type" not in sent.request.headers
    assert is_problem(sent, 415)
    assert "application/json" in sent.json()["detail"]
    assert is_problem(api.client.post(path, headers=headers), 415)

    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    allowed = api.client.options(path, headers=headers | preflight)
    assert not [name for name in allowed.headers if name.startswith("access-control-")]
    assert count_rows(connection) == (0, 0)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
user_like = st.fixed_dictionaries(
    {"password": st.just(PASSWORD)},
    optional={field: json_values | st.just(user()[field]) for field in FIELDS if field != "password"}
    | {"x": json_values},
)


def test_no_body_makes_the_service_fail(api: Api, connection: Connection) -> None:
    """Any body gets a user or a 4xx problem, and both a user and a row are written or neither."""

    @settings(max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(user_like.map(json.dumps).map(str.encode) | json_values.map(json.dumps).map(str.encode) | st.binary())
    def check(body: bytes) -> None:
        before = count_rows(connection)
        response = api.post(body)
        created = int(response.status_code == 201)
        assert created or is_problem(response, 400) or is_problem(response, 409), body
        assert PASSWORD not in response.text
        assert count_rows(connection) == (before[0] + created, before[1] + created)

    check()
    assert PASSWORD not in api.log.getvalue()
