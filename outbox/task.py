"""The definition of a task, shared by the code that adds rows and by the worker."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError

from outbox.errors import PayloadError, TaskError

P = TypeVar("P", bound=BaseModel)


QUEUE_NAME = re.compile("[A-Za-z0-9_-]{1,50}")
"""Matches the names that a queue may have."""


@dataclass(frozen=True)
class Task(Generic[P]):
    """A kind of work: a name, the model of its payload, and its defaults.

    Example:
        class Greeting(BaseModel):
            username: str

        GREET = Task("greet", Greeting, queue="critical", max_retries=5)
    """

    name: str
    """Its name in rows and in the registry; never change it while rows with it may exist."""
    payload: type[P]
    """The pydantic model that every payload must fit."""
    queue: str = "default"
    """One of the queues in `OUTBOX_QUEUES`."""
    delay: float = 0
    """Seconds between the commit and the first attempt."""
    max_retries: int = 25
    """Upper bound of attempts after the first."""
    timeout: int = 30
    """Time limit of one attempt in seconds."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= 100:
            raise TaskError(f"a task's name has 1 to 100 characters, not {len(self.name)}: {self.name!r}")
        if not QUEUE_NAME.fullmatch(self.queue):
            raise TaskError(f"task {self.name}: queue {self.queue!r} is not 1 to 50 letters, digits, '_' or '-'")
        if self.delay < 0 or not 0 <= self.max_retries <= 1000 or not 1 <= self.timeout <= 86_400:
            raise TaskError(f"task {self.name}: delay must be 0 s or more, max_retries 0 to 1000, timeout 1 to 86400 s")

    def parse(self, stored: str) -> P:
        """Parses a stored payload, which is JSON, into the task's model.

        Raises:
            PayloadError: it does not fit. The text names each field and the kind of its violation. It quotes no value,
                because it is stored and logged, and the payload may be private.
        """
        try:
            return self.payload.model_validate_json(stored)
        except ValidationError as error:
            raise self._error(_kinds(error)) from None

    def dump(self, payload: P | Mapping[str, object]) -> dict[str, object]:
        """Converts a payload into the JSON to store, which Postgres accepts and `parse` can read.

        Raises:
            PayloadError: it does not fit. The text names each field.
        """
        # A model may have been changed since it was validated, or made without validation.
        given = payload.model_dump(by_alias=True, warnings=False) if isinstance(payload, BaseModel) else payload
        try:
            stored = self.payload.model_validate(given).model_dump(mode="json", by_alias=True)
        except ValidationError as error:
            raise self._error(_violations(error)) from None
        except PydanticSerializationError as error:
            raise self._error(str(error)) from None
        if not isinstance(stored, dict):
            raise self._error("payload: must be an object")
        if violations := [f"{field}: {why}" for field, why in _unstorable(stored, "")]:
            raise self._error("; ".join(violations))
        self.parse(json.dumps(stored))
        return stored

    def _error(self, violations: str) -> PayloadError:
        return PayloadError(f"the payload of {self.name} does not fit: {violations}")


_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def _unstorable(value: object, field: str) -> Iterator[tuple[str, str]]:
    """Yields each field that Python's JSON allows and `jsonb` does not, and why."""
    match value:
        case str() if _UNSTORABLE.search(value):
            yield field or "payload", "must not contain NUL or half of a surrogate pair"
        case float() if not math.isfinite(value):
            yield field or "payload", "must be a finite number"
        case dict():
            for name, member in value.items():
                yield from _unstorable(name, field)
                yield from _unstorable(member, f"{field}.{name}".lstrip("."))
        case list():
            for index, member in enumerate(value):
                yield from _unstorable(member, f"{field}.{index}")


def _kinds(error: ValidationError) -> str:
    violations = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{_field(violation['loc'])}: {violation['type']}" for violation in violations)


def _violations(error: ValidationError) -> str:
    return "; ".join(
        f"{_field(violation['loc'])}: {violation['msg']}"
        for violation in error.errors(include_url=False, include_input=False)
    )


def _field(path: Sequence[int | str]) -> str:
    return ".".join(map(str, path)) or "payload"
