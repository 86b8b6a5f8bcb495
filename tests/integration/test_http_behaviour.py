"""What holds for every request: probes, documentation, problems, limits, request ids and log lines."""

import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import psycopg
import psycopg.sql
import pytest
from psycopg_pool.base import AttemptWithBackoff

from outbox.devstack.embedded import EmbeddedServer
from outbox.runtime import postgres
from outbox.runtime.settings import ServiceSettings
from outbox_service import pool
from outbox_service.schemas import CreateUser
from tests.conftest import Connection
from tests.support.api import PASSWORD, Api, exchange, is_problem, serve, user
from tests.support.processes import frozen
from tests.support.waiting import eventually

Outage = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service on a database of the test's own."""
    with serve(service_settings) as served:
        yield served


@pytest.fixture
def outage(server_url: str, database_url: str) -> Outage:
    """Takes the test's database away, connections and all, until the block is left."""
    name = database_url.partition("?")[0].rpartition("/")[2]
    change = psycopg.sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")

    @contextmanager
    def away() -> Iterator[None]:
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute(change.format(psycopg.sql.Identifier(name), psycopg.sql.Literal("false")))
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            try:
                yield
            finally:
                connection.execute(change.format(psycopg.sql.Identifier(name), psycopg.sql.Literal("true")))

    return away


def hang_up(port: int, body: dict[str, object]) -> None:
    """Sends a body, but less of it than was announced, and closes the connection."""
    head = b"POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as hung_up:
        hung_up.sendall(head + json.dumps(body).encode())


# Probes.


def test_a_healthy_service_is_alive_and_ready(api: Api) -> None:
    """Both probes answer 200 with a status, with nothing but Postgres running."""
    assert (api.client.get("/healthz").status_code, api.client.get("/healthz").json()) == (200, {"status": "ok"})
    assert (api.client.get("/readyz").status_code, api.client.get("/readyz").json()) == (200, {"status": "ready"})


def test_without_postgres_the_service_lives_and_says_to_come_back(
    service_settings: ServiceSettings,
    outage: Outage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While Postgres is away: 503 problems with Retry-After, alive but not ready; when it is back, users again."""
    monkeypatch.setattr(pool, "POOL_TIMEOUT", 0.3)
    with serve(service_settings) as api:
        assert api.create("before").status_code == 201

        with outage():
            refused, ready, alive = api.create("while"), api.client.get("/readyz"), api.client.get("/healthz")

        assert is_problem(refused, 503)
        assert is_problem(ready, 503)
        assert int(refused.headers["retry-after"]) > 0
        assert int(ready.headers["retry-after"]) > 0
        assert alive.status_code == 200
        assert PASSWORD not in api.log.getvalue()
        eventually(lambda: api.create("after").status_code == 201, 5, "the service recovers")


def test_the_service_is_back_soon_after_a_long_outage(
    service_settings: ServiceSettings,
    outage: Outage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long Postgres was away, users can be created within seconds of its return."""
    # A long outage in short: the pool's second wait is as long as its backoff is after two minutes.
    monkeypatch.setattr(AttemptWithBackoff, "DELAY_BACKOFF", 60)
    monkeypatch.setattr(pool, "POOL_TIMEOUT", 0.3)
    with serve(service_settings) as api:
        with outage():
            tries = [api.create("while").status_code for _ in range(6)]

        assert tries == [503] * 6
        eventually(lambda: api.create("after").status_code == 201, 4, "the service recovers")


def test_a_postgres_that_hangs_holds_up_no_request(
    service_settings: ServiceSettings, own_postgres: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests in flight and new ones are answered with 503 when Postgres keeps its connections and says nothing."""
    monkeypatch.setattr(postgres, "ANSWER_LIMIT", 0.5)
    monkeypatch.setattr(pool, "POOL_TIMEOUT", 0.3)
    with serve(service_settings.model_copy(update={"database_url": own_postgres.url})) as api:
        assert api.create("before").status_code == 201

        with frozen(own_postgres):
            refused, ready, alive = api.create("while"), api.client.get("/readyz"), api.client.get("/healthz")

        assert is_problem(refused, 503)
        assert is_problem(ready, 503)
        assert alive.status_code == 200
        eventually(lambda: api.create("after").status_code in (201, 409), 10, "the service recovers")


def test_a_browser_reads_a_page_when_postgres_is_away(
    service_settings: ServiceSettings,
    outage: Outage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A person who opens the link in an outage gets a page that says so, with 503 and Retry-After."""
    monkeypatch.setattr(pool, "POOL_TIMEOUT", 0.1)
    with serve(service_settings) as api, outage():
        link = "/v1/verify_email?email_id=1&secret_code=abc"
        response = api.client.get(link, headers={"Accept": "text/html"})

    assert response.status_code == 503
    assert response.headers["content-type"].startswith("text/html")
    assert "The database is away" in response.text
    assert "retry-after" in response.headers


def test_a_database_that_is_not_migrated_is_not_ready(create_database: Callable[[str | None], str]) -> None:
    """Readiness and creation answer 503 with the sentence that names the command."""
    settings = ServiceSettings(database_url=create_database(None), secret_key="k" * 32)
    with serve(settings) as api:
        for response in (api.client.get("/readyz"), api.create()):
            assert is_problem(response, 503)
            assert "not migrated" in response.json()["detail"]
            assert "run 'outbox migrate'" in response.json()["detail"]


def test_a_database_that_is_not_in_utf8_is_not_ready(foreign_url: str) -> None:
    """Where Postgres was away when the service started, readiness says what is wrong."""
    with serve(ServiceSettings(database_url=foreign_url, secret_key="k" * 32)) as api:
        response = api.client.get("/readyz")
    assert is_problem(response, 503)
    assert "ENCODING 'UTF8'" in response.json()["detail"]


# Documentation.


def test_the_documentation_has_an_example_for_every_answer(api: Api) -> None:
    """OpenAPI names the contract's paths, and shows an example of every answer, of the status it stands under."""
    documented = api.client.get("/schema/openapi.json").json()

    assert documented["paths"].keys() == {"/v1/users", "/v1/create_user", "/v1/verify_email", "/healthz", "/readyz"}
    answers = {
        (path, method, status): answer
        for path, operations in documented["paths"].items()
        for method, operation in operations.items()
        for status, answer in operation["responses"].items()
    }
    assert {status for path, _, status in answers if path == "/v1/users"} == {"201", "400", "409", "413", "415", "503"}
    for (path, method, status), answer in answers.items():
        for content in answer["content"].values():
            assert content["examples"], (path, method, status)
            for example in content["examples"].values():
                assert example["value"].get("status", status) in {int(status), status, "ok", "ready"}
                assert "hash" not in json.dumps(example)


def test_the_documentation_has_the_rules_of_every_field(api: Api) -> None:
    """OpenAPI gives each field's length, pattern and description, as the validation has them."""
    documented = api.client.get("/schema/openapi.json").json()["components"]["schemas"]["CreateUser"]["properties"]
    for field, rules in CreateUser.model_json_schema()["properties"].items():
        del rules["title"]
        assert documented[field] == rules, field


def test_the_documentation_can_be_read(api: Api) -> None:
    """The documentation's page answers."""
    response = api.client.get("/schema")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")


@pytest.mark.parametrize("path", ["openapi.yaml", "openapi.yml", "swagger", "elements", "rapidoc", "scalar"])
def test_the_documentation_has_one_page_and_one_format(api: Api, path: str) -> None:
    """YAML took twenty times as long as any other answer that needs no password's hash."""
    assert api.client.get(f"/schema/{path}").status_code == 404


# Problems and limits.


def test_a_long_method_is_cut_in_the_log(api: Api) -> None:
    """A line is no longer than that of a method that there is."""
    assert api.client.request("A" * 60_000, "/healthz").status_code == 405
    (line,) = api.events("received an HTTP request")
    assert line["method"] == "A" * 20


def test_other_methods_are_refused(api: Api) -> None:
    """A method that a path does not have is a 405 that names those it has; an unknown path is a 404."""
    for method in ("HEAD", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "QUERY"):
        for path in ("/v1/users", "/v1/verify_email", "/healthz"):
            response = api.client.request(method, path)
            assert response.status_code == 405, (method, path)
            assert response.headers["allow"]
            assert method == "HEAD" or is_problem(response, 405)
        assert api.client.request(method, "/nope").status_code == 404


def test_hostile_paths_are_not_found(api: Api) -> None:
    """Whatever a path is made of, it is a 404 problem."""
    for path in ("/nope", "//v1/users", "/v1/users%00", "/%ff%fe", "/%ed%a0%80", "/%0d%0aX-Evil:1", "/..%2f..", "/{a}"):
        response = api.client.get(path)
        assert is_problem(response, 404), path
        assert "x-evil" not in response.headers


def test_a_trailing_slash_or_query_does_no_harm(api: Api) -> None:
    """The paths of the contract work with a slash behind them, and with parameters that nobody asked for."""
    for name, path in enumerate(("/v1/users/", "/v1/users?a=1&a=2&%ff", "/v1/create_user/")):
        assert api.create(f"user_{name}", path).status_code == 201, path


def test_an_oversized_body_is_refused(api: Api, connection: Connection) -> None:
    """Over 64 KiB is a 413, whether the length is announced or the body comes in chunks; 64 KiB is not."""
    limit = 64 * 1024
    body = json.dumps(user()).encode()

    assert api.post(body + b" " * (limit - len(body))).status_code == 201
    refused = api.post(b" " * (limit + 1))
    assert is_problem(refused, 413)
    assert refused.json()["detail"] == "the body must not be over 64 KiB"
    assert is_problem(api.post(iter([b" " * limit, b" "])), 413)
    assert is_problem(api.post(iter([b" " * 1_000_000] * 5)), 413)
    assert connection.execute("SELECT count(*) AS users FROM users").fetchone() == {"users": 1}
    assert api.create("bob").status_code == 201


def test_a_body_that_is_only_announced_is_refused(api: Api) -> None:
    """A length over the limit is a 413 without waiting for the body."""
    head = b"POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    assert exchange(api.port, head + b"Content-Length: 99999999\r\n\r\n").startswith(b"HTTP/1.1 413 ")


def test_a_client_that_hangs_up_does_no_harm(api: Api, connection: Connection) -> None:
    """Half a body and then nothing: nothing is written, no error is logged, and the next request is served."""
    hang_up(api.port, user())

    eventually(lambda: api.events("received an HTTP request"), 5, "the request ends")
    assert connection.execute("SELECT count(*) AS users FROM users").fetchone() == {"users": 0}
    assert not api.events("request failed")
    assert PASSWORD not in api.log.getvalue()
    assert api.create().status_code == 201


# Request ids and log lines.


def test_every_response_has_a_request_id(api: Api, connection: Connection) -> None:
    """Good or bad, each response carries an id of its own, and the log line of its request has the same."""
    connection.execute("ALTER TABLE outbox DROP COLUMN request_id")
    responses = {
        200: api.client.get("/healthz"),
        400: api.create("x"),
        404: api.client.get("/nope"),
        405: api.client.get("/v1/users"),
        413: api.post(b" " * 70_000),
        415: api.post(b"<a/>", "text/xml"),
        500: api.create(),
    }

    assert {status: response.status_code for status, response in responses.items()} == {s: s for s in responses}
    ids = [response.headers["x-request-id"] for response in responses.values()]
    assert len(set(ids)) == len(ids)
    logged = [line["request_id"] for line in api.events("received an HTTP request")]
    assert sorted(logged) == sorted(ids)
    assert is_problem(responses[500], 500)
    assert "column" not in responses[500].text
    assert [line["request_id"] for line in api.events("request failed")] == [ids[-1]]


def test_a_sane_request_id_is_taken_over(api: Api) -> None:
    """A caller's own id comes back and is logged."""
    sent = "Trace-1.2_3" + "x" * 89
    response = api.client.get("/healthz", headers={"X-Request-ID": sent})

    assert response.headers.get_list("x-request-id") == [sent]
    assert api.events("received an HTTP request")[0]["request_id"] == sent


def test_a_hostile_request_id_is_replaced(api: Api) -> None:
    """An id that is not safe to log and to store is not taken over."""
    hostile = [b"", b"a b", b"a\tb", b"\xff\xfe", b"x" * 101, b"x" * 5_000, b"{}", b"%0a", b"a,b"]
    answered = [api.client.get("/healthz", headers={b"X-Request-ID": sent}).headers["x-request-id"] for sent in hostile]

    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in answered)
    assert [line["request_id"] for line in api.events("received an HTTP request")] == answered


def test_a_request_id_cannot_add_a_header(api: Api) -> None:
    """A newline in an id gets nowhere, folded or not."""
    for newline in (b"\r\n ", b"\n ", b"\r", b"\0"):
        head = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        answer = exchange(api.port, head + b"X-Request-ID: a" + newline + b"X-Evil: 1\r\n\r\n")
        assert b"x-evil" not in answer.lower()
        assert answer.split(b" ")[1] in {b"200", b"400"}


def test_a_request_is_one_log_line(api: Api) -> None:
    """Each request is logged once, with its method, path without query, status code and duration."""
    api.client.get("/healthz?password=hunter2")
    api.create()

    lines = api.events("received an HTTP request")
    assert [(line["method"], line["path"], line["status_code"]) for line in lines] == [
        ("GET", "/healthz", 200),
        ("POST", "/v1/users", 201),
    ]
    assert all(0 < line["duration"] < 10 for line in lines)
    assert "hunter2" not in api.log.getvalue()


def test_a_client_that_hangs_up_is_no_failure_of_the_service(api: Api) -> None:
    """A request that never came in full is logged as 499, which is no status that the service answers with."""
    hang_up(api.port, user())

    (line,) = eventually(lambda: api.events("received an HTTP request"), 5, "the request ends")
    assert (line["method"], line["path"], line["status_code"]) == ("POST", "/v1/users", 499)


def test_no_path_makes_the_log_unreadable(api: Api) -> None:
    """A path with newlines stays on its one line, and a long one is cut."""
    api.client.get("/%0a%7B%22event%22:1%7D")
    api.client.get("/" + "a" * 30_000)

    lines = api.log.getvalue().splitlines()
    assert len(lines) == len(api.events("received an HTTP request")) == 2
    assert max(map(len, lines)) < 1_000
