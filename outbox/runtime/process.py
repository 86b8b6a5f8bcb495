"""How every process starts and ends: an operator's mistake becomes a sentence on stderr and an exit code."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

import psycopg

from outbox.errors import OutboxError, SettingsError, UsageError
from outbox.runtime import logs
from outbox.runtime.log_writer import LogWriter
from outbox.runtime.redaction import one_line
from outbox.runtime.stop import ignore_signals

EXIT_SETTINGS = 2
EXIT_FAILED = 1


def run(main: Callable[[], object]) -> None:
    """Runs a process' main function and exits with its code: 2 for wrong settings or arguments, 1 for the rest."""
    try:
        main()
    except (SettingsError, UsageError) as error:
        fail(str(error), EXIT_SETTINGS)
    except OutboxError as error:
        fail(str(error), EXIT_FAILED)
    except psycopg.OperationalError as error:
        fail(f"Postgres is away or refuses: {one_line(error)}", EXIT_FAILED)
    except psycopg.errors.ReadOnlySqlTransaction as error:
        fail(f"Postgres is read-only, see DATABASE_URL: it may lead to a standby: {one_line(error)}", EXIT_FAILED)
    except psycopg.Error as error:
        fail(f"Postgres refuses, see DATABASE_URL and the rights of its user: {one_line(error)}", EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(130)


PROCESSES = ("service", "relay", "worker")


def run_process(name: str, arguments: Sequence[str] = ()) -> None:
    """Runs one of the processes, which the environment alone configures, as `run` does; arguments are a mistake."""

    def unargued() -> None:
        if arguments:  # not repeated: there may be a secret in it
            raise UsageError(
                f"outbox {name} takes no arguments: environment variables configure it, which docs/settings.md lists"
            )
        # By its name: this package, which the processes share, imports none of them.
        import_module(f"outbox_{name}.main").main()

    try:
        run(unargued)
    finally:
        ignore_signals()


def fail(sentence: str, code: int) -> None:
    """Says what is wrong, after all that was logged before, and exits."""
    logs.drain()
    write_to_stderr(f"{sentence}\n")
    sys.exit(code)


def write_to_stderr(text: str) -> None:
    """Writes a text. Waits for its reader no longer than for the reader of the log: the process must end."""
    writer = LogWriter(sys.stderr)
    writer.write(text)
    writer.drain()
