"""The `outbox` command."""

from pathlib import Path
from typing import Any

import click

from outbox.cli.dead_commands import dead
from outbox.devstack.binaries import EXTRA_MISSING
from outbox.errors import StartError
from outbox.runtime import logs
from outbox.runtime.migrations import migrate as apply_migrations
from outbox.runtime.process import run_process
from outbox.runtime.settings import DatabaseSettings


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="outbox-service")
def outbox() -> None:
    """A transactional outbox: creates users and loses no mail."""


@outbox.command()
def migrate() -> None:
    """Bring the database in DATABASE_URL to the schema of this version. Safe to run repeatedly and concurrently."""
    settings = DatabaseSettings.from_environment()
    logs.configure("outbox", settings.log_level, settings.log_format)
    apply_migrations(settings.database_url)


def _add_process(name: str, summary: str) -> None:
    @outbox.command(name, help=f"{summary} Environment variables configure it; docs/settings.md lists them.")
    def process() -> None:
        run_process(name)


_add_process("service", "Run the API until SIGTERM.")
_add_process("relay", "Run a relay, which hands rows over to Redis, until SIGTERM.")
_add_process("worker", "Run a worker, which handles rows, until SIGTERM.")


class _Folder(click.Path):
    """A path that must not be empty, because an empty path means the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the path."""
        if value == "":
            self.fail("it is empty; name a folder ('.' is the current folder).", param, ctx)
        return super().convert(value, param, ctx)


@outbox.command(short_help="Run everything on this machine, for development.")
@click.option(
    "--data",
    type=_Folder(file_okay=False, readable=False, path_type=Path),
    default=Path(".outbox"),
    show_default=True,
    metavar="FOLDER",
    help="Folder for the database, the mails and the secret key.",
)
def up(data: Path) -> None:
    """Run everything on this machine, for development: service, relay, worker and their servers.

    Starts an embedded Postgres, Redis and mail catcher for each of DATABASE_URL, REDIS_URL and SMTP_URL that is not
    set. Ctrl-C stops everything; a second Ctrl-C hurries.
    """
    # Imported here, because production installs have no development extra.
    try:
        from outbox.devstack import stack  # noqa: PLC0415 - as above
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in {"aiosmtpd", "psutil"}:
            raise
        raise StartError(EXTRA_MISSING) from None
    stack.run(data)


outbox.add_command(dead)
