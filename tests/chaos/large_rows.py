"""Finds rows with a large payload that did not run exactly once, unless what excuses a second mail excuses it."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from tests.chaos.duplicates import excuse_of_worker
from tests.chaos.evidence import Evidence, HandlerRun

TASK = "take_large_payload"


def mishandled_large_rows(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Yields the rows that are lost, done without a run, or ran twice. Other checks judge their final status."""
    runs: dict[int, list[HandlerRun]] = defaultdict(list)
    for run in evidence.handler_runs:
        runs[run.row].append(run)
    rows = {row.id: row for row in evidence.rows if row.task == TASK}
    for lost in sorted(set(evidence.large_rows) - rows.keys()):
        yield f"row {lost}", "was committed, and does not exist"
    for row in rows.values():
        if row.status == "done" and not runs[row.id]:
            yield f"row {row.id}", "is done, and never ran"
        for one, two in pairwise(runs[row.id]):
            if not excuse_of_worker(evidence, one.worker, one.at):
                later = f"and again in worker-{two.worker} {two.at - one.at:.2f} s later"
                yield f"row {row.id}", f"ran in worker-{one.worker} at {one.at:.3f}, {later}: unexplained"
