"""The schedule tester catches every mutant, and finds nothing in the product's own statements."""

from collections.abc import Iterator

import pytest

from tests.schedules.database import Database, open_database
from tests.schedules.mutants import MUTANTS, mutated
from tests.schedules.schedule import run

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
"""The first schedules of the seed that catch each mutant. Any change to the random draws changes them:
`python -m tests.schedules --seed 7 --mutant NAME` finds the new ones."""

_MAX_TRIES = 10
"""Maximum number of runs: Postgres decides which of the sessions that wait for one lock continues first."""


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    """A Postgres for schedules."""
    with open_database() as opened:
        yield opened


def test_mutants_are_all_listed() -> None:
    """Every mutant has its schedules here."""
    assert _CATCHING.keys() == MUTANTS.keys()


@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_mutant_is_caught(mutant: str, database: Database) -> None:
    """A statement that lacks something the design relies on breaks a rule."""
    numbers = _CATCHING[mutant] * _MAX_TRIES
    with mutated(mutant):
        assert any(run(database, f"{_SEED} {number}").violations for number in numbers)


def test_statements_break_no_rule(database: Database) -> None:
    """The product's own statements pass the schedules that catch the mutants."""
    for number in sorted({number for numbers in _CATCHING.values() for number in numbers}):
        assert run(database, f"{_SEED} {number}").violations == [], f"schedule {number}"
