"""Reports the figures of a run by kind of fault, as a table and as JSON."""

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
    """The effects of all faults of one kind."""

    times: int = 0
    users: set[str] = field(default_factory=set)
    orphans: int = 0
    ghosts: int = 0
    duplicates: int = 0
    seconds: list[float] = field(default_factory=list)
    """Recovery of each fault that delayed a mail."""

    @property
    def median(self) -> float | None:
        """Median recovery in seconds."""
        return median(self.seconds) if self.seconds else None

    @property
    def worst(self) -> float | None:
        """Longest recovery in seconds."""
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
    """Computes the figures of a run."""
    kinds: dict[str, Figures] = defaultdict(Figures)
    total = Figures()
    recovered = recoveries(evidence)
    orphans = {failure.about for failure in failures if failure.check == "orphans"}
    orphaned = {sign_up.username for sign_up in evidence.sign_ups if sign_up.email in orphans}
    faults = []
    for fault in evidence.faults:
        figures, recovery = kinds[fault.kind], recovered[fault.number]
        for one in (figures, total):
            one.times += 1
            one.users |= recovery.touched
            if recovery.seconds is not None:
                one.seconds.append(recovery.seconds)
        faults.append({**asdict(fault), "users": len(recovery.touched), "recovery": recovery.seconds})
    found_duplicates = duplicates(evidence)
    for duplicate in found_duplicates:
        if duplicate.kind:
            kinds[duplicate.kind].duplicates += 1
    for figures in kinds.values():
        figures.orphans = len(figures.users & orphaned)
    total.orphans, total.duplicates = len(orphans), len(found_duplicates)
    total.ghosts = sum(failure.check == "ghosts" for failure in failures)
    return Report(evidence, failures, found_duplicates, dict(sorted(kinds.items())), total, faults)


def table(of: Report) -> Table:
    """Returns the table of figures by kind of fault."""
    result = Table(title=f"Chaos run, seed {of.evidence.seed}", caption=DEFINITION, caption_justify="left")
    result.add_column("fault")
    for name in ("times", "users touched", "orphans", "ghosts", "duplicates", "recovery median", "worst"):
        result.add_column(name, justify="right")
    for name, figures in of.kinds.items():
        result.add_row(name, *_cells(figures))
    result.add_section()
    result.add_row("all", *_cells(of.total))
    return result


def _cells(figures: Figures) -> list[str]:
    counts = (figures.times, len(figures.users), figures.orphans, figures.ghosts, figures.duplicates)
    return [*map(str, counts), _seconds(figures.median), _seconds(figures.worst)]


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s"  # noqa: RUF001 - a dash for no value


def summary(of: Report) -> dict[str, Any]:
    """Returns the run's totals."""
    evidence = of.evidence
    rows = [row.status for row in evidence.rows]
    asked = [sign_up for sign_up in evidence.sign_ups if sign_up.intent != IMPORTED]
    return {
        "users": len(evidence.users),
        "imported": len(evidence.sign_ups) - len(asked),
        "requests": len(asked),
        "acknowledged": sum(sign_up.status == 201 for sign_up in asked),
        "no answer": sum(sign_up.status is None for sign_up in asked),
        "answered 503": sum(sign_up.status == 503 for sign_up in asked),
        "refused": sum(sign_up.status is not None and 400 <= sign_up.status < 500 for sign_up in asked),
        "clients with a key": len({sign_up.key for sign_up in asked if sign_up.key}),
        "requests repeated with a key": sum(bool(sign_up.key) for sign_up in asked)
        - len({sign_up.key for sign_up in asked if sign_up.key}),
        "answers replayed": sum(sign_up.is_replayed for sign_up in asked),
        "mails": len(evidence.mails),
        "faults": len(evidence.faults),
        "processes ended": len(evidence.exits),
        "done": rows.count("done"),
        "dead": rows.count("dead"),
        "addresses permanently refused": len(evidence.refused_addresses),
        "duplicates": len(of.duplicates),
        "duplicates unexplained": sum(not duplicate.excuse for duplicate in of.duplicates),
        "failures": len(of.failures),
        "worst lag of this process, ms": round(1000 * max((e - s for s, e in evidence.lags), default=0)),
    }


def as_json(of: Report) -> dict[str, Any]:
    """Returns the content of `results.json`."""
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
