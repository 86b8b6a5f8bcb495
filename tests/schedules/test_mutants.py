"""The tester catches what it is made to catch, and finds nothing in the project's own statements."""

from collections.abc import Iterator

import pytest

from tests.schedules.mutants import MUTANTS, mutated
from tests.schedules.schedule import run
from tests.schedules.stage import Stage, stage

pytestmark = pytest.mark.once

_SEED = 7

_CATCHING = {
    "claim_judges_first": (1, 2),
    "claim_without_order": (50,),
    "claim_without_time": (3, 4),
    "complete_without_fence": (32, 50),
    "complete_without_status": (23, 109),
    "complete_without_worker": (305,),
    "publish_without_lock": (3, 5),
    "renewal_without_worker": (499,),
    "rescue_without_lease": (1, 2),
    "rescue_without_settling": (2, 50),
    "retry_without_status": (3, 12),
    "sweep_without_second_look": (50, 60),
}
"""The first schedules of the seed that catch each mutant. Whatever changes what is drawn at random, changes these:
`python -m tests.schedules --seed 7 --mutant NAME` finds the new ones."""

_TRIES = 10
"""How often these are run at most: of sessions that wait for one lock, Postgres decides which goes on first."""


@pytest.fixture(scope="module")
def opened() -> Iterator[Stage]:
    """A Postgres for schedules."""
    with stage() as made:
        yield made


def test_mutants_are_all_listed() -> None:
    """No mutant is left out here."""
    assert _CATCHING.keys() == MUTANTS.keys()


@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_mutant_is_caught(mutant: str, opened: Stage) -> None:
    """A statement that lacks what the design stands on breaks a rule."""
    numbers = _CATCHING[mutant] * _TRIES
    with mutated(mutant):
        assert any(run(opened, f"{_SEED} {number}").violations for number in numbers)


def test_statements_break_no_rule(opened: Stage) -> None:
    """The project's own statements pass the schedules that catch the mutants."""
    for number in sorted({number for numbers in _CATCHING.values() for number in numbers}):
        assert run(opened, f"{_SEED} {number}").violations == [], f"schedule {number}"
