"""The errors of the project. An error's docstring says when it is raised; its text says what to do about it."""


class OutboxError(Exception):
    """The base of every error that this project raises on purpose."""


class SettingsError(OutboxError):
    """An environment variable is missing or wrong."""


class UsageError(OutboxError):
    """A command's arguments do not go together, or one of them cannot be; nothing was done."""


class NotDeadError(OutboxError):
    """A command for dead rows was given ids of rows that are not dead, or that do not exist."""


class NotMigratedError(OutboxError):
    """The database lacks migrations that this version needs."""


class UnsupportedDatabaseError(OutboxError):
    """The database's encoding is not UTF-8."""


class RightsError(OutboxError):
    """The role that migrates the database may create no tables in it; nothing was done."""


class LockedError(OutboxError):
    """Others did not let go of a table that a migration needs for itself; nothing of that migration was done."""


class UnsupportedRedisError(OutboxError):
    """Redis is too old, or a cluster."""


class SharedRedisError(OutboxError):
    """Another installation uses the same Redis database."""


class StartError(OutboxError):
    """A process cannot start: a port is taken, a folder is in use, a server does not come up."""


class TaskError(OutboxError):
    """A task or handler is defined in a way that cannot work."""


class PayloadError(OutboxError):
    """A payload does not fit its task's model; nothing was written."""


class OptionError(OutboxError):
    """An option of `outbox.add` is too long; nothing was written."""


class TimeLimitError(OutboxError):
    """An attempt's time is over, and a step of it would begin: a mail, or a connection to Postgres."""


class HandlerError(OutboxError):
    """A handler returned an awaitable, a generator or a future: work that nobody does."""


class NotNowError(OutboxError):
    """An attempt cannot do its work now, through no fault of its row: a server is away. It does not count."""


class SkipRetry(OutboxError):  # noqa: N818 - the field's own word for it, as in asynq
    """Raised by a handler for what no retry can mend: the row is dead at once, with this text as its last error."""
