"""Start and exit of every process: an operator's mistake becomes a sentence on stderr and an exit code."""

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
    """Runs a main function; exits with 2 for wrong settings or arguments and with 1 for other known errors."""
    try:
        main()
    except (SettingsError, UsageError) as error:
        fail(str(error), EXIT_SETTINGS)
    except OutboxError as error:
        fail(str(error), EXIT_FAILED)
    except psycopg.OperationalError as error:
        fail(f"Postgres is away or refuses: {one_line(error)} (see DATABASE_URL)", EXIT_FAILED)
    except psycopg.errors.ReadOnlySqlTransaction as error:
        fail(f"Postgres is read-only, see DATABASE_URL: it may lead to a standby: {one_line(error)}", EXIT_FAILED)
    except psycopg.Error as error:
        fail(f"Postgres refuses, see DATABASE_URL and the rights of its user: {one_line(error)}", EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(130)


PROCESSES = ("service", "relay", "worker")
"""In the order in which they are stopped: first no new rows, then no new jobs."""


def run_process(name: str, arguments: Sequence[str] = ()) -> None:
    """Runs one of the processes as `run` does. Only the environment configures it, so arguments are refused."""

    def main() -> None:
        if arguments:  # not quoted: an argument may hold a secret
            raise UsageError(
                f"outbox {name} takes no arguments: environment variables configure it, which docs/settings.md lists"
            )
        # Imported by name: this package must not import the processes that share it.
        import_module(f"outbox_{name}.main").main()

    try:
        run(main)
    finally:
        ignore_signals()


def fail(sentence: str, code: int) -> None:
    """Writes a sentence to stderr, after the lines logged so far, and exits."""
    logs.flush()
    write_to_stderr(f"{sentence}\n")
    sys.exit(code)


def write_to_stderr(text: str) -> None:
    """Writes a text to stderr, and gives up if it is not read for as long as the log would wait."""
    writer = LogWriter(sys.stderr)
    writer.write(text)
    writer.wait_until_written()
