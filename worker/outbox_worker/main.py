"""Runs `outbox worker`: one worker process, configured by the environment and stopped by SIGTERM."""

import logging
import os
import traceback

from outbox.errors import SettingsError, TaskError
from outbox.runtime import encryption, logs, open_files, process, redis_connection
from outbox.runtime.settings import WorkerSettings
from outbox.runtime.stop import Stop
from outbox_worker.handlers import registry
from outbox_worker.worker import Worker

_RESERVE = 40
"""File descriptors for the worker's own connections to Postgres and Redis, the log, and files that handlers open."""


def main() -> None:
    """Runs a worker until SIGTERM, SIGINT or RQ's shutdown command; a second signal gives up the handlers that run."""
    settings = WorkerSettings.from_environment()
    redis_connection.check_url(settings.redis_url)
    logs.configure("worker", settings.log_level, settings.log_format)
    encryption.warn_about_plain_text(
        settings.database_url, redis_url=settings.redis_url, smtp_server=settings.smtp_server
    )
    try:
        handlers = registry(settings)
    except TaskError as error:
        raise SettingsError(f"OUTBOX_HANDLERS is wrong: {error}") from error
    open_files.raise_limit(
        # Cancelling a handler's statement takes a second connection.
        2 * settings.handler_connections + settings.mail_connections,
        _RESERVE,
        "OUTBOX_HANDLER_CONNECTIONS and OUTBOX_MAIL_CONNECTIONS",
    )
    stop = Stop()
    stop.listen()
    worker = Worker(settings, handlers, stop)
    try:
        process.run(worker.run)
    except BaseException as error:
        if not worker.has_unended_handlers:
            raise
        if not isinstance(error, SystemExit):
            process.write_to_stderr(traceback.format_exc())
        logging.shutdown()
        os._exit(process.EXIT_FAILED)
    if worker.has_unended_handlers:
        logging.shutdown()
        os._exit(0)  # the interpreter would wait for threads that the handler has started
