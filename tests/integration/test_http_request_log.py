"""Request ids and the log line of each request."""

import re
from collections.abc import Iterator

import pytest

from outbox.runtime.settings import ServiceSettings
from tests.conftest import Connection
from tests.support.api import Api, exchange, is_problem, send_half_body, serve
from tests.support.waiting import eventually


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service with a database of its own."""
    with serve(service_settings) as served:
        yield served


def test_every_response_has_a_request_id(api: Api, connection: Connection) -> None:
    """Each response, of any status, has a unique id, and so has the log line of its request."""
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


def test_a_valid_request_id_is_kept(api: Api) -> None:
    """A client's id is returned and logged."""
    sent = "Trace-1.2_3" + "x" * 89
    response = api.client.get("/healthz", headers={"X-Request-ID": sent})

    assert response.headers.get_list("x-request-id") == [sent]
    assert api.events("received an HTTP request")[0]["request_id"] == sent


def test_a_hostile_request_id_is_replaced(api: Api) -> None:
    """An id that is not safe to log and store is replaced."""
    hostile = [b"", b"a b", b"a\tb", b"\xff\xfe", b"x" * 101, b"x" * 5_000, b"{}", b"%0a", b"a,b"]
    answered = [api.client.get("/healthz", headers={b"X-Request-ID": sent}).headers["x-request-id"] for sent in hostile]

    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in answered)
    assert [line["request_id"] for line in api.events("received an HTTP request")] == answered


def test_a_request_id_cannot_add_a_header(api: Api) -> None:
    """A newline in an id, folded or not, adds no header."""
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


def test_a_disconnect_is_logged_as_499(api: Api) -> None:
    """A request that never arrived in full is logged as 499, a status that the service never sends."""
    send_half_body(api.port)

    (line,) = eventually(lambda: api.events("received an HTTP request"), 5, "the request ends")
    assert (line["method"], line["path"], line["status_code"]) == ("POST", "/v1/users", 499)


def test_no_path_makes_the_log_unreadable(api: Api) -> None:
    """A path with newlines stays on one line, and a long one is cut."""
    api.client.get("/%0a%7B%22event%22:1%7D")
    api.client.get("/" + "a" * 30_000)

    lines = api.log.getvalue().splitlines()
    assert len(lines) == len(api.events("received an HTTP request")) == 2
    assert max(map(len, lines)) < 1_000


def test_a_long_method_is_cut_in_the_log(api: Api) -> None:
    """An invalid method does not lengthen the log line."""
    assert api.client.request("A" * 60_000, "/healthz").status_code == 405
    (line,) = api.events("received an HTTP request")
    assert line["method"] == "A" * 20
