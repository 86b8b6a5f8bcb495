"""Requests that are refused on any path: unknown paths and methods, oversized and incomplete bodies."""

import json
from collections.abc import Iterator

import pytest

from outbox.runtime.settings import ServiceSettings
from tests.conftest import Connection
from tests.support.api import PASSWORD, Api, exchange, is_problem, send_half_body, serve, user
from tests.support.waiting import eventually


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service with a database of its own."""
    with serve(service_settings) as served:
        yield served


def test_other_methods_are_refused(api: Api) -> None:
    """A method that a path does not support is a 405 that lists the supported ones; an unknown path is a 404."""
    for method in ("HEAD", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "QUERY"):
        for path in ("/v1/users", "/v1/verify_email", "/healthz"):
            response = api.client.request(method, path)
            assert response.status_code == 405, (method, path)
            assert response.headers["allow"]
            assert method == "HEAD" or is_problem(response, 405)
        assert api.client.request(method, "/nope").status_code == 404


def test_hostile_paths_are_not_found(api: Api) -> None:
    """Any unknown path is a 404 problem."""
    for path in ("/nope", "//v1/users", "/v1/users%00", "/%ff%fe", "/%ed%a0%80", "/%0d%0aX-Evil:1", "/..%2f..", "/{a}"):
        response = api.client.get(path)
        assert is_problem(response, 404), path
        assert "x-evil" not in response.headers


def test_a_trailing_slash_or_query_is_accepted(api: Api) -> None:
    """The paths of the API also work with a trailing slash and with unknown parameters."""
    for name, path in enumerate(("/v1/users/", "/v1/users?a=1&a=2&%ff", "/v1/create_user/")):
        assert api.create(f"user_{name}", path).status_code == 201, path


def test_an_oversized_body_is_refused(api: Api, connection: Connection) -> None:
    """A body over 64 KiB is a 413, with a Content-Length or in chunks; one of 64 KiB is accepted."""
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


def test_an_oversized_content_length_is_refused(api: Api) -> None:
    """A Content-Length over the limit is a 413 before the body arrives."""
    head = b"POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    assert exchange(api.port, head + b"Content-Length: 99999999\r\n\r\n").startswith(b"HTTP/1.1 413 ")


def test_a_disconnect_writes_nothing(api: Api, connection: Connection) -> None:
    """After half a body and a disconnect, nothing is written, no error is logged, and the next request is served."""
    send_half_body(api.port)

    eventually(lambda: api.events("received an HTTP request"), 5, "the request ends")
    assert connection.execute("SELECT count(*) AS users FROM users").fetchone() == {"users": 0}
    assert not api.events("request failed")
    assert PASSWORD not in api.log.getvalue()
    assert api.create().status_code == 201
