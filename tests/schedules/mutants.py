"""Defines mutants: each removes one thing that the design relies on. The tester must catch all of them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest.mock import patch

import outbox_relay.rescue
from outbox import queries

Mutant = Callable[[], AbstractContextManager[object]]


def _rewritten(statement: str, old: str, new: str) -> Mutant:
    """Returns a mutant that replaces a part of a statement's text."""

    def mutant() -> AbstractContextManager[object]:
        text = queries.query(statement)
        assert text.count(old) == 1, f"{statement} must contain this once: {old!r}"
        return patch.dict(queries._statements(), {statement: text.replace(old, new)})

    return mutant


def _both(first: Mutant, second: Mutant) -> Mutant:
    @contextmanager
    def mutant() -> Iterator[None]:
        with first(), second():
            yield

    return mutant


MUTANTS: dict[str, Mutant] = {
    "complete_without_fence": _rewritten(
        "complete",
        "JOIN locked USING (id, delivery)",
        "JOIN (SELECT id, before, worker FROM locked) AS locked USING (id)",
    ),
    "complete_without_worker": _rewritten("complete", " AND worker = %(worker)s", ""),
    "complete_without_status": _rewritten("complete", "before = 'running'", "true"),
    "renewal_without_worker": _rewritten("renew_leases", " AND worker = %(worker)s", ""),
    "sweep_without_second_look": _rewritten(
        "sweep", "USING (id, delivery)\n    WHERE status = 'enqueued'", "USING (id)"
    ),
    "publish_without_lock": _rewritten("publish", "FOR NO KEY UPDATE SKIP LOCKED", ""),
    # The sleep follows each lock of a row that a relay has just committed, so that two claims that wait for the relay
    # continue side by side, even on a busy machine.
    "claim_without_order": _rewritten(
        "claim", "ORDER BY id", "AND pg_sleep(0.02)::text IS NOT NULL\n    ORDER BY md5(id || %(worker)s)"
    ),
    "claim_judges_first": _rewritten(
        "claim", "WHERE id = ANY (%(ids)s)\n", "WHERE id = ANY (%(ids)s) AND status IN ('enqueued', 'running')\n"
    ),
    "claim_without_time": _rewritten(
        "claim", "status = 'enqueued' AND run_at <= pg_catalog.now()", "status = 'enqueued'"
    ),
    "rescue_without_lease": _both(
        _rewritten(
            "find_work", "WHERE status = 'running' AND lease_until < pg_catalog.now()", "WHERE status = 'running'"
        ),
        _rewritten(
            "expired_leases",
            "\n  AND (lease_until < pg_catalog.now()"
            " OR lease_until > pg_catalog.now() + %(impossible_lease)s::float8 * interval '1 s')",
            "",
        ),
    ),
    "rescue_without_settling": lambda: patch.object(outbox_relay.rescue, "SETTLING_TIME", 0.0),
    "retry_without_status": _rewritten("retry_dead", " AND status = 'dead'", ""),
}


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Applies a mutant during the block; none if `name` is None."""
    with MUTANTS[name]() if name else nullcontext():
        yield
