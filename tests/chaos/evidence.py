"""Defines the records of a run that the judge reads. All times are in seconds since the epoch."""

from dataclasses import dataclass, field
from typing import Any

SHORTAGES = frozenset({"worker.few-descriptors", "worker.little-memory"})
"""Faults that leave a process short of a resource: it may exit with an error code."""

AWAY_WITH_BACKLOG = "mail.away-with-backlog"
MAIL_OUTAGES = frozenset({AWAY_WITH_BACKLOG, "mail.connection-limit"})
"""Outages of the mail server, on which no attempt may be spent."""

IMPORTED = "imported"


@dataclass
class SignUp:
    """One request of a client to create a user, and its answer."""

    intent: str
    """`new`, `impatient` (disconnects early), `taken username`, `taken email` or `invalid`; `imported` if no client but
    an application created the user, directly in Postgres, with a mail that is due immediately."""
    username: str
    email: str
    service: int
    sent: float
    answered: float = 0.0
    status: int | None = None
    """None if there was no answer."""
    body: str = ""
    key: str = ""
    """Its Idempotency-Key; with one, the client asks again until it has an answer."""
    is_replayed: bool = False
    """Whether the answer was marked as an earlier one."""
    must_retry: bool = False
    """Whether the answer has a Retry-After."""

    @property
    def is_final(self) -> bool:
        """Whether the answer tells the client what became of its request."""
        return self.status is not None and not self.must_retry


@dataclass
class Mail:
    """One mail that the mail server accepted."""

    recipient: str
    message_id: str
    link: str
    worker: int
    """The slot of the worker that sent it."""
    session: int
    accepted: float
    answered: float | None = None
    """When its 250 was sent; None if a fault suppressed it."""
    followed: bool = False
    """Whether the client sent another command on this session, which shows that it had read the 250."""


@dataclass
class Session:
    """One connection to the mail server."""

    number: int
    worker: int
    port: int
    """The client's port, which is the proxy's."""
    begun: float
    ended: float | None = None


@dataclass(frozen=True)
class Cut:
    """A connection to the mail server that a proxy cut."""

    port: int
    at: float


@dataclass(frozen=True)
class Overlap:
    """Two sessions that sent to one recipient at the same time."""

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
    """When its target was available again."""
    note: str = ""
    slots: tuple[str, ...] = ()
    """The affected processes, such as `worker-0`."""
    relieved: float = 0.0
    """When a shortage was over; the process recovers after that."""
    crash: str = ""
    """Why it could not be injected, or why its target did not recover."""


@dataclass
class Exit:
    """The end of a process."""

    slot: str
    module: str
    at: float
    code: int
    cause: str
    """`SIGKILL` or `SIGTERM` if the run sent it; one of `SHORTAGES` if the process ended under it; else empty."""
    tail: str = ""
    """The end of its log, if the exit was unexpected."""
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
    """The keys under which its owner can find it."""
    written: float
    sightings: list[tuple[float, str, bool]] = field(default_factory=list)
    """For each observation: the time, the key that held the job (empty for none), and whether its hash existed."""


@dataclass(frozen=True)
class HandlerRun:
    """One run of the handler for large payloads."""

    row: int
    worker: int
    at: float


@dataclass
class Evidence:
    """Everything that is known after a run."""

    seed: int
    delays: tuple[float, ...]
    """Each service's `VERIFY_EMAIL_DELAY`."""
    lease: float
    sign_ups: list[SignUp] = field(default_factory=list)
    mails: list[Mail] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    refused_addresses: dict[str, float] = field(default_factory=dict)
    """Addresses that the mail server permanently refused, and since when."""
    faults: list[Fault] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)
    users: list[User] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    log_lines: list[dict[str, Any]] = field(default_factory=list)
    """The processes' log lines, with `slot` and `at`, by time."""
    tracebacks: list[str] = field(default_factory=list)
    """Tracebacks in the processes' logs."""
    lags: list[tuple[float, float]] = field(default_factory=list)
    """Spans in which this process, through which all bytes pass, was late."""
    loaded_bombs: int = 0
    """Number of faults whose pickles were loaded or whose jobs were run."""
    foreign_jobs: list[ForeignJob] = field(default_factory=list)
    large_rows: list[int] = field(default_factory=list)
    """Ids of rows with a large payload whose commit was confirmed."""
    handler_runs: list[HandlerRun] = field(default_factory=list)
    """Runs of the handler for large payloads, by time."""
    faults_over_at: float = 0.0
    """When the last fault was over."""

    def delay_of(self, sign_up: SignUp) -> float:
        """Returns the seconds from the creation of a user until the mail is due."""
        return 0.0 if sign_up.intent == IMPORTED else self.delays[sign_up.service]
