"""The errors of this project. A docstring says when an error is raised; its message says what to do about it."""


class OutboxError(Exception):
    """The base of every error that this project raises deliberately.

    Example:
        try:
            add(connection, GREET, {"username": "alice"}, unique_key="x" * 201)
        except OutboxError as error:
            print(error)  # unique_key has 201 characters: outbox.add takes at most 200
    """


class SettingsError(OutboxError):
    """An environment variable is missing or wrong."""


class UsageError(OutboxError):
    """A command's arguments contradict each other, or one is invalid; nothing was done."""


class NotDeadError(OutboxError):
    """A command for dead rows was given ids of rows that are not dead, or that do not exist."""


class NotMigratedError(OutboxError):
    """The database lacks migrations that this version needs."""


class UnsupportedDatabaseError(OutboxError):
    """The database's encoding is not UTF-8."""


class RightsError(OutboxError):
    """The migrating role may not create tables, or another role owns a schema or table with one of our names."""


class LockedError(OutboxError):
    """Other sessions held a table that a migration must lock; nothing of that migration was done."""


class UnsupportedRedisError(OutboxError):
    """Redis is too old, or a cluster."""


class SharedRedisError(OutboxError):
    """Another installation uses the same Redis database."""


class StartError(OutboxError):
    """A process cannot start: a port is taken, a folder is in use, a server does not start."""


class TaskError(OutboxError):
    """A task or handler is defined in a way that cannot work.

    Example:
        try:
            Task("greet", Greeting, queue="two words")
        except TaskError as error:
            print(error)  # task greet: queue 'two words' is not 1 to 50 letters, digits, '_' or '-'
    """


class PayloadError(OutboxError):
    """A payload does not fit its task's model; nothing was written.

    Example:
        try:
            add(connection, GREET, {"username": 7})
        except PayloadError as error:
            print(error)  # the payload of greet does not fit: username: Input should be a valid string
    """


class OptionError(OutboxError):
    """An option of `outbox.add` is too long; nothing was written.

    Example:
        try:
            add(connection, GREET, {"username": "alice"}, request_id="x" * 201)
        except OptionError as error:
            print(error)  # request_id has 201 characters: outbox.add takes at most 200
    """


class TimeLimitError(OutboxError):
    """An attempt's time is over, and it asked for another step: a mail, or a connection to Postgres."""


class HandlerError(OutboxError):
    """A handler returned an awaitable, a generator or a future: work that nothing would run."""


class NotNowError(OutboxError):
    """An attempt cannot do its work now for a reason that is not its row's: a server is away. It does not count."""


class SkipRetry(OutboxError):  # noqa: N818 - named as in asynq
    """Raised by a handler if no retry can help: the row is dead at once, with this text as its last error.

    Example:
        DEACTIVATE = Task("deactivate", Greeting)

        @handler(DEACTIVATE)
        def deactivate(member: Greeting, context: Context) -> None:
            if member.username == "root":
                raise SkipRetry("root cannot be deactivated")
    """
