"""What a run comes to: figures per kind of fault, as a table and as JSON."""

import importlib.metadata
import platform
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich.table import Table

from tests.chaos.duplicates import Duplicate, duplicates
from tests.chaos.evidence import IMPORTED, Evidence
from tests.chaos.judge import Failure
from tests.chaos.recovery import DEFINITION, recoveries

_PACKAGES = ("outbox-service", "psycopg", "redis", "rq", "rq-scheduler", "litestar", "uvicorn")


@dataclass
class Figures:
    """What one kind of fault did, over all its times."""

    times: int = 0
    users: set[str] = field(default_factory=set)
    orphans: int = 0
    ghosts: int = 0
    duplicates: int = 0
    seconds: list[float] = field(default_factory=list)
    """Recoveries of those that held somebody up."""

    @property
    def median(self) -> float | None:
        """Of the recoveries, in seconds."""
        return median(self.seconds) if self.seconds else None

    @property
    def worst(self) -> float | None:
        """Of the recoveries, in seconds."""
        return max(self.seconds, default=None)


@dataclass
class Report:
    """All figures of a run."""

    evidence: Evidence
    failures: list[Failure]
    duplicates: list[Duplicate]
    kinds: dict[str, Figures]
    total: Figures
    faults: list[dict[str, Any]]


def report(evidence: Evidence, failures: list[Failure]) -> Report:
    """Works out the figures."""
    kinds: dict[str, Figures] = defaultdict(Figures)
    total = Figures()
    recovered = recoveries(evidence)
    orphans = {failure.about for failure in failures if failure.check == "orphans"}
    orphaned = {attempt.username for attempt in evidence.attempts if attempt.email in orphans}
    faults = []
    for fault in evidence.faults:
        figures, recovery = kinds[fault.kind], recovered[fault.number]
        for one in (figures, total):
            one.times += 1
            one.users |= recovery.touched
            if recovery.seconds is not None:
                one.seconds.append(recovery.seconds)
        faults.append({**asdict(fault), "users": len(recovery.touched), "recovery": recovery.seconds})
    doubled = duplicates(evidence)
    for duplicate in doubled:
        if duplicate.kind:
            kinds[duplicate.kind].duplicates += 1
    for figures in kinds.values():
        figures.orphans = len(figures.users & orphaned)
    total.orphans, total.duplicates = len(orphans), len(doubled)
    total.ghosts = sum(failure.check == "ghosts" for failure in failures)
    return Report(evidence, failures, doubled, dict(sorted(kinds.items())), total, faults)


def table(of: Report) -> Table:
    """Returns the table per kind of fault."""
    made = Table(title=f"Chaos run, seed {of.evidence.seed}", caption=DEFINITION, caption_justify="left")
    made.add_column("fault")
    for name in ("times", "users touched", "orphans", "ghosts", "duplicates", "recovery median", "worst"):
        made.add_column(name, justify="right")
    for name, figures in of.kinds.items():
        made.add_row(name, *_cells(figures))
    made.add_section()
    made.add_row("all", *_cells(of.total))
    return made


def _cells(figures: Figures) -> list[str]:
    counts = (figures.times, len(figures.users), figures.orphans, figures.ghosts, figures.duplicates)
    return [*map(str, counts), _seconds(figures.median), _seconds(figures.worst)]


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s"  # noqa: RUF001 - a dash for nothing


def summary(of: Report) -> dict[str, Any]:
    """Returns the run's totals."""
    evidence = of.evidence
    rows = [row.status for row in evidence.rows]
    asked = [attempt for attempt in evidence.attempts if attempt.intent != IMPORTED]
    return {
        "users": len(evidence.users),
        "imported": len(evidence.attempts) - len(asked),
        "requests": len(asked),
        "acknowledged": sum(attempt.status == 201 for attempt in asked),
        "no answer": sum(attempt.status is None for attempt in asked),
        "answered 503": sum(attempt.status == 503 for attempt in asked),
        "refused": sum(attempt.status is not None and 400 <= attempt.status < 500 for attempt in asked),
        "mails": len(evidence.mails),
        "faults": len(evidence.faults),
        "processes ended": len(evidence.exits),
        "done": rows.count("done"),
        "dead": rows.count("dead"),
        "addresses refused for good": len(evidence.refused),
        "duplicates": len(of.duplicates),
        "duplicates unexplained": sum(not duplicate.excuse for duplicate in of.duplicates),
        "failures": len(of.failures),
        "ms that this process fell behind, at worst": round(1000 * max((e - s for s, e in evidence.lags), default=0)),
    }


def as_json(of: Report) -> dict[str, Any]:
    """Returns all of it for `results.json`."""
    return {
        "seed": of.evidence.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "machine": {"system": platform.platform()},
        "summary": summary(of),
        "kinds": {
            name: {
                "times": figures.times,
                "users": len(figures.users),
                "orphans": figures.orphans,
                "ghosts": figures.ghosts,
                "duplicates": figures.duplicates,
                "recovery median": figures.median,
                "recovery worst": figures.worst,
            }
            for name, figures in {**of.kinds, "all": of.total}.items()
        },
        "recovery": DEFINITION,
        "failures": [asdict(failure) for failure in of.failures],
        "duplicates": [asdict(duplicate) for duplicate in of.duplicates],
        "faults": of.faults,
    }
