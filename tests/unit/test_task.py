"""Tasks, their payloads, and how a worker finds their handlers."""

import json
import sys
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, RootModel, field_validator

from outbox import Context, Handler, PayloadError, Task, TaskError, handler
from outbox.signup.send_verify_email import SEND_VERIFY_EMAIL, SendVerifyEmail
from outbox_worker.registry import load_registry


class Greeting(BaseModel):
    """The payload of `greet`."""

    name: str
    times: int = Field(default=1, ge=1)


GREET = Task("greet", Greeting)


@handler(GREET)
def greet(payload: Greeting, context: Context) -> None:
    """Does nothing."""


def _module(**members: object) -> ModuleType:
    module = ModuleType("handlers_of_a_test")
    vars(module).update(members)
    return module


def test_a_second_task_is_one_definition_and_one_function() -> None:
    """The registry finds the handler of a new task; nothing else registers it."""
    registry = load_registry([__name__], own=[Handler(SEND_VERIFY_EMAIL, lambda *_: None)])
    assert set(registry) == {"send_verify_email", "greet"}
    assert registry["greet"] is greet
    assert registry["greet"].task is GREET


def test_a_handler_gets_no_settings() -> None:
    """No task needs the secret key or a server's password."""
    assert {field.name for field in fields(Context)} == {"row_id", "attempt", "deadline", "database", "send"}


def test_a_handler_may_be_found_twice() -> None:
    """A handler that is imported into another module, or has two names, counts once."""
    assert load_registry([_module(a=greet, b=greet), _module(c=greet, other=42)]) == {"greet": greet}


def test_two_handlers_for_one_task_are_refused() -> None:
    """The error names the task and both modules."""
    second = Handler(GREET, lambda payload, context: None)
    with pytest.raises(TaskError, match=rf"greet has two handlers, in {__name__} and {__name__}"):
        load_registry([_module(a=greet), _module(a=second)])


@pytest.mark.parametrize("name", ["no_such_module", "outbox.no_such_module", ".relative", "a..b", ""])
def test_a_missing_module_is_a_sentence(name: str) -> None:
    """The error names the module that OUTBOX_HANDLERS names."""
    with pytest.raises(TaskError, match=f"the module {name} with handlers cannot be imported"):
        load_registry([name])


@pytest.mark.parametrize("source", ["def", "1 / 0", "import no_such_module", "from outbox import Task; Task('', 1)"])
def test_a_module_that_cannot_be_imported_is_a_sentence(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing a module runs its code, which may raise anything."""
    (tmp_path / "broken_handlers.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TaskError, match="the module broken_handlers with handlers cannot be imported: "):
        load_registry(["broken_handlers"])
    sys.modules.pop("broken_handlers", None)


@pytest.mark.parametrize(
    "options",
    [
        {"name": ""},
        {"name": "x" * 101},
        {"queue": ""},
        {"queue": "two words"},
        {"queue": "x" * 51},
        {"delay": -1},
        {"max_retries": -1},
        {"max_retries": 1001},
        {"timeout": 0},
        {"timeout": 86_401},
    ],
)
def test_a_task_that_the_table_would_refuse_cannot_be_defined(options: dict[str, Any]) -> None:
    """The definition has the table's limits, so that a mistake shows at import and not later."""
    with pytest.raises(TaskError):
        Task(**{"name": "greet", "payload": Greeting, **options})


def test_the_options_of_the_verification_mail() -> None:
    """Stored rows and the documentation depend on its name and options; other tasks have other defaults."""
    task = SEND_VERIFY_EMAIL
    assert (task.name, task.queue, task.max_retries, task.delay, task.timeout) == (
        "send_verify_email",
        "critical",
        10,
        10,
        30,
    )
    assert (GREET.queue, GREET.max_retries, GREET.delay) == ("default", 25, 0)


def test_a_payload_error_names_every_field_and_no_value() -> None:
    """It lists all violations, without the values, which may be secrets."""
    with pytest.raises(PayloadError) as caught:
        GREET.dump({"name": 12345, "times": 0})
    text = str(caught.value)
    assert "greet" in text
    assert "name: " in text
    assert "times: " in text
    assert "12345" not in text


def test_the_error_of_a_stored_payload_names_only_fields() -> None:
    """The message of an application's validator may quote the value, and the error goes into logs and the row."""

    class Picky(BaseModel):
        name: str

        @field_validator("name")
        @classmethod
        def check(cls, name: str) -> str:
            raise ValueError(f"{name} is on the list")

    with pytest.raises(PayloadError, match=r"^the payload of picky does not fit: name: value_error$"):
        Task("picky", Picky).parse('{"name": "private"}')


def test_a_model_is_checked_like_a_mapping() -> None:
    """A model that was made without validation, or changed since, is refused."""
    changed = SendVerifyEmail(username="alice")
    changed.username = None  # type: ignore[assignment]
    unchecked = SendVerifyEmail.model_construct(username=7)  # type: ignore[arg-type]
    empty = SendVerifyEmail.model_construct()  # type: ignore[call-arg]
    for payload in (changed, unchecked, empty):
        with pytest.raises(PayloadError, match="username: "):
            SEND_VERIFY_EMAIL.dump(payload)


@pytest.mark.parametrize("value", ["a\0b", "\ud800", ["x", "\0"], {"\0": 1}, float("nan"), [float("-inf")]])
def test_a_value_that_postgres_cannot_store_is_refused(value: object) -> None:
    """NUL, lone surrogates and NaN pass pydantic's Any and would break the caller's transaction."""

    class Anything(BaseModel):
        model_config = ConfigDict(ser_json_inf_nan="constants")

        value: Any

    with pytest.raises(PayloadError, match="value"):
        Task("anything", Anything).dump({"value": value})


def test_a_payload_is_an_object() -> None:
    """A model whose JSON is a list is refused before the table would refuse it."""
    with pytest.raises(PayloadError, match="payload: must be an object"):
        Task("numbers", RootModel[list[int]]).dump(RootModel([1]))


def test_a_stored_payload_can_be_parsed() -> None:
    """Models with aliases, strict types and times survive the conversion to JSON."""

    class Reminder(BaseModel):
        model_config = ConfigDict(strict=True)

        at: datetime
        address: str = Field(alias="emailAddress")

    task = Task("remind", Reminder)
    reminder = Reminder(at=datetime(2030, 1, 2, tzinfo=UTC), emailAddress="a@example.com")
    stored = task.dump(reminder)
    assert stored == {"at": "2030-01-02T00:00:00Z", "emailAddress": "a@example.com"}
    assert task.parse(json.dumps(stored)) == reminder
