"""Rows with a large payload: each is done, and ran once, unless what explains a second mail explains a second run."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from tests.chaos.duplicates import excuse_of_worker
from tests.chaos.evidence import Evidence, Run

TASK = "take_large_payload"


def mishandled_large_rows(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Yields the rows that got lost, are done without having run, or ran twice; the others' ends are judged as any."""
    runs: dict[int, list[Run]] = defaultdict(list)
    for run in evidence.runs:
        runs[run.row].append(run)
    rows = {row.id: row for row in evidence.rows if row.task == TASK}
    for lost in sorted(set(evidence.large_rows) - rows.keys()):
        yield f"row {lost}", "was committed, and is not there"
    for row in rows.values():
        if row.status == "done" and not runs[row.id]:
            yield f"row {row.id}", "is done, and has never run"
        for one, two in pairwise(runs[row.id]):
            if not excuse_of_worker(evidence, one.worker, one.at):
                later = f"{two.at - one.at:.2f} s later again in worker-{two.worker}"
                yield f"row {row.id}", f"ran in worker-{one.worker} at {one.at:.3f}, {later}: unexplained"
