"""The API's documentation: OpenAPI and its page."""

import json
from collections.abc import Iterator

import pytest

from outbox.runtime.settings import ServiceSettings
from outbox_service.schemas import CreateUser
from tests.support.api import Api, serve


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service with a database of its own."""
    with serve(service_settings) as served:
        yield served


def test_the_documentation_has_an_example_for_every_answer(api: Api) -> None:
    """OpenAPI has the paths of the API, and an example with the right status for every answer."""
    documented = api.client.get("/schema/openapi.json").json()

    assert documented["paths"].keys() == {"/v1/users", "/v1/create_user", "/v1/verify_email", "/healthz", "/readyz"}
    answers = {
        (path, method, status): answer
        for path, operations in documented["paths"].items()
        for method, operation in operations.items()
        for status, answer in operation["responses"].items()
    }
    statuses = {status for path, _, status in answers if path == "/v1/users"}
    assert statuses == {"201", "400", "409", "413", "415", "422", "503"}
    for (path, method, status), answer in answers.items():
        for content in answer["content"].values():
            assert content["examples"], (path, method, status)
            for example in content["examples"].values():
                assert example["value"].get("status", status) in {int(status), status, "ok", "ready"}
                assert "hash" not in json.dumps(example)


def test_the_documentation_has_the_rules_of_every_field(api: Api) -> None:
    """OpenAPI has each field's length, pattern and description as the validation has them."""
    documented = api.client.get("/schema/openapi.json").json()["components"]["schemas"]["CreateUser"]["properties"]
    for field, rules in CreateUser.model_json_schema()["properties"].items():
        del rules["title"]
        assert documented[field] == rules, field


def test_the_documentation_is_a_page(api: Api) -> None:
    """The documentation is an HTML page."""
    response = api.client.get("/schema")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")


@pytest.mark.parametrize("path", ["openapi.yaml", "openapi.yml", "swagger", "elements", "rapidoc", "scalar"])
def test_the_documentation_has_one_page_and_one_format(api: Api, path: str) -> None:
    """YAML took twenty times as long as any other answer without a password hash."""
    assert api.client.get(f"/schema/{path}").status_code == 404
