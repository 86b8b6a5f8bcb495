"""What a run leaves behind for the judge: plain records, all times in seconds since the epoch."""

from dataclasses import dataclass, field
from typing import Any

SHORTAGES = frozenset({"worker.few-descriptors", "worker.little-memory"})
"""Faults that leave a process short of what it needs: it may end by itself, and says so by its code."""

AWAY_WITH_BACKLOG = "mail.away-with-backlog"
MAIL_OUTAGES = frozenset({AWAY_WITH_BACKLOG, "mail.connection-limit"})
"""Faults of the mail server that are no mail's fault: they may spend no attempt."""

IMPORTED = "imported"


@dataclass
class Attempt:
    """One request of a client, and what it was told."""

    intent: str
    """`new`, `impatient` (hangs up early), `taken username`, `taken email` or `invalid`; `imported` is none of a
    client's: an application has written the user straight into Postgres, due at once."""
    username: str
    email: str
    service: int
    sent: float
    answered: float = 0.0
    status: int | None = None
    """None: no answer."""
    body: str = ""


@dataclass
class Mail:
    """One mail that the mail server has accepted."""

    recipient: str
    message_id: str
    link: str
    worker: int
    """The slot of the worker that sent it."""
    session: int
    accepted: float
    answered: float | None = None
    """When its 250 was written; None when a fault kept it back."""
    followed: bool = False
    """Whether the client said something more on this session: then it has read the 250."""


@dataclass
class Session:
    """One connection to the mail server."""

    number: int
    worker: int
    port: int
    """Its client's port, which is the proxy's."""
    begun: float
    ended: float | None = None


@dataclass(frozen=True)
class Cut:
    """A connection to the mail server that a proxy cut."""

    port: int
    at: float


@dataclass(frozen=True)
class Overlap:
    """Two sessions that were sending to one recipient at once."""

    recipient: str
    at: float
    workers: tuple[int, int]


@dataclass
class Fault:
    """One injected fault."""

    number: int
    kind: str
    targets: tuple[str, ...]
    start: float
    end: float = 0.0
    """When what it struck was there again."""
    note: str = ""
    slots: tuple[str, ...] = ()
    """The processes that it struck, as in `worker-0`."""
    relieved: float = 0.0
    """When a shortage was over; what it struck comes back after that."""
    crash: str = ""
    """Why it could not be injected, or why what it struck did not come back."""


@dataclass
class Exit:
    """The end of a process."""

    slot: str
    module: str
    at: float
    code: int
    cause: str
    """`SIGKILL` or `SIGTERM` where it was injected; one of `SHORTAGES` where the process ended under it; else empty."""
    tail: str = ""
    """The end of its log, where it was not to end like that."""
    log: str = ""
    """The name of its log."""


@dataclass(frozen=True)
class User:
    """A row of `users`."""

    username: str
    email: str
    created: float


@dataclass(frozen=True)
class Row:
    """A row of `outbox`."""

    id: int
    username: str | None
    status: str
    attempts: int
    delivery: int
    max_retries: int
    last_error: str | None
    created: float
    task: str = "send_verify_email"


@dataclass
class ForeignJob:
    """A job of another application in our Redis database."""

    id: str
    places: tuple[str, ...]
    """The keys under which its owner may find it."""
    written: float
    looks: list[tuple[float, str, bool]] = field(default_factory=list)
    """Each time that somebody looked: under which key it was, empty for none, and whether it had its hash."""


@dataclass(frozen=True)
class Run:
    """One run of a handler of the chaos run's own."""

    row: int
    worker: int
    at: float


@dataclass
class Evidence:
    """All that is known after a run."""

    seed: int
    delays: tuple[float, ...]
    """Each service's `VERIFY_EMAIL_DELAY`."""
    lease: float
    attempts: list[Attempt] = field(default_factory=list)
    mails: list[Mail] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    refused: dict[str, float] = field(default_factory=dict)
    """Addresses that the mail server refused for good, and since when."""
    faults: list[Fault] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)
    users: list[User] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    """The processes' log lines, with `slot` and `at`, by time."""
    crashes: list[str] = field(default_factory=list)
    """Tracebacks in the processes' logs."""
    lags: list[tuple[float, float]] = field(default_factory=list)
    """Spans in which this process, through which all bytes pass, fell behind."""
    bombs: int = 0
    """Pickles that somebody has loaded."""
    foreign: list[ForeignJob] = field(default_factory=list)
    large_rows: list[int] = field(default_factory=list)
    """Ids of rows with a large payload whose commit was confirmed."""
    runs: list[Run] = field(default_factory=list)
    """Of their handler, by time."""
    calm: float = 0.0
    """When the last fault was over."""

    def delay_of(self, attempt: Attempt) -> float:
        """Returns the seconds after which the mail to a user is due."""
        return 0.0 if attempt.intent == IMPORTED else self.delays[attempt.service]
