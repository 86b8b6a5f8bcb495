"""Starts the servers and processes of `outbox up`, restarts what dies, and stops everything in reverse order."""

import json
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path

import psutil

from outbox.devstack.child_process import POLL, Supervisor
from outbox.devstack.data_folder import DataFolder, locked_folder
from outbox.devstack.embedded import EmbeddedServer, embedded_postgres, embedded_redis
from outbox.devstack.environment import (
    UpSettings,
    find_free_address,
    is_set,
    local_url,
    process_environment,
    read_settings,
)
from outbox.devstack.log_stream import Stream
from outbox.devstack.mail_catcher import catch_mails
from outbox.devstack.processes import Program, Restarter
from outbox.errors import StartError
from outbox.runtime import logs
from outbox.runtime.migrations import migrate
from outbox.runtime.process import PROCESSES
from outbox.runtime.stop import Stop

_READY_LIMIT = 30.0
"""Seconds until the service must be ready."""
_CHECK_INTERVAL = 0.1
"""Seconds between two checks of the processes."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, SIGTERM or a closed terminal: the first requests a stop, the second to hurry."""


class _Stopped(Exception):  # noqa: N818 - not an error
    """This process was asked to stop."""


def run(path: Path) -> None:
    """Runs everything until this process is asked to stop.

    Args:
        path: the data folder.

    Raises:
        SettingsError: a variable is wrong.
        StartError: a server or process cannot start.
        psycopg.OperationalError: the Postgres that the user's DATABASE_URL names is unavailable.
    """
    settings = read_settings()
    with ExitStack() as stack:
        stop = Stop()
        stop.listen(signals=_SIGNALS)
        stream = Stream(sys.stdout, as_json=settings.log_json, on_broken=stop.request)
        folder = stack.enter_context(locked_folder(path))
        stack.enter_context(redirect_stdout(stream.writer("up")))
        logs.configure("up", settings.log_level, "json")
        try:
            with ExitStack() as children:
                _start_and_watch(children, settings, folder, stream, stop)
        except _Stopped:
            logs.get().info("stopped")
        except OSError as error:
            # The disk is full, or files in the data folder belong to another user.
            raise StartError(f"the data folder {path} cannot be used: {error}") from error
        folder.forget_processes()


def _start_and_watch(children: ExitStack, settings: UpSettings, folder: DataFolder, stream: Stream, stop: Stop) -> None:
    def wait(seconds: float) -> None:
        if stop.wait(seconds):
            raise _Stopped

    def on_start(name: str, process: subprocess.Popen[bytes]) -> None:
        folder.record_process(name, process)
        logs.get().info(f"started {name}", pid=process.pid)

    supervisor = Supervisor(wait, on_start, stop.is_hurried)
    folder.stop_leftovers(wait)  # first: a leftover may hold the port
    settings = replace(settings, address=find_free_address(settings.address))
    servers: list[EmbeddedServer] = []
    provided = {"SECRET_KEY": folder.secret_key()}
    if not is_set("DATABASE_URL"):
        logs.get().info("starting Postgres", folder=str(folder.path / "postgres"))
        postgres = children.enter_context(embedded_postgres(folder.path / "postgres", supervisor=supervisor))
        provided["DATABASE_URL"] = postgres.url
        servers.append(postgres)
    if not is_set("REDIS_URL"):
        logs.get().info("starting Redis", folder=str(folder.path / "redis"))
        redis = children.enter_context(embedded_redis(folder.path / "redis", supervisor=supervisor))
        provided["REDIS_URL"] = redis.url
        servers.append(redis)
    if not is_set("SMTP_URL"):
        provided["SMTP_URL"] = children.enter_context(catch_mails(folder.mails))
    environment = process_environment(settings, **provided)
    _migrate(environment["DATABASE_URL"], wait)

    programs: list[Program] = []
    for name in reversed(PROCESSES):
        programs.append(Program(name, environment, stream, supervisor))
        children.callback(programs[-1].stop)
    restarter = Restarter([*servers, *programs])
    try:
        _wait_until_ready(settings, programs[-1], restarter, stream, wait)
        _report_ready(settings, None if is_set("SMTP_URL") else folder.mails, servers, stream)
        while True:
            wait(_CHECK_INTERVAL)
            restarter.check()
    except _Stopped:
        logs.get().info("stopping; a second Ctrl-C hurries")
        raise


def _migrate(database_url: str, wait: Callable[[float], None]) -> None:
    """Migrates in a thread, so that this process can stop while the migration waits for a lock."""
    result: Future[None] = Future()

    def run_migrations() -> None:
        try:
            migrate(database_url)
        except BaseException as error:  # noqa: BLE001 - raised again by `result.result()`
            result.set_exception(error)
        else:
            result.set_result(None)

    threading.Thread(target=run_migrations, name="migrate", daemon=True).start()
    while not result.done():
        wait(POLL)
    result.result()


def _wait_until_ready(
    settings: UpSettings, service: Program, restarter: Restarter, stream: Stream, wait: Callable[[float], None]
) -> None:
    deadline = time.monotonic() + _READY_LIMIT
    while not (_listens(service, settings.address.port) and _is_ready(f"{local_url(settings.address)}/readyz")):
        if time.monotonic() > deadline:
            output = stream.last_output("service")
            raise StartError(f"the service is not ready after {_READY_LIMIT:g} s; see its log\n{output}".rstrip())
        wait(_CHECK_INTERVAL)
        restarter.check()


def _listens(service: Program, port: int) -> bool:
    """Whether our service listens on the port, and not another process that took it in the meantime."""
    try:
        connections = psutil.Process(service.process.pid).net_connections("tcp")
    except psutil.AccessDenied:
        return True
    except psutil.Error:
        return False
    return any(found.status == psutil.CONN_LISTEN and found.laddr.port == port for found in connections)


def _is_ready(url: str) -> bool:
    # Without the proxy of http_proxy, which cannot reach this machine's 127.0.0.1.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):
        return False


def _report_ready(settings: UpSettings, mails: Path | None, servers: list[EmbeddedServer], stream: Stream) -> None:
    api = local_url(settings.address)
    user = {"username": "alice", "password": "open-sesame-42", "full_name": "Alice Doe", "email": "alice@example.com"}
    curl = f"curl -i {api}/v1/users -H 'content-type: application/json' -d {shlex.quote(json.dumps(user))}"
    sent_to = str(mails) if mails else "sent to the server that SMTP_URL names"
    if settings.log_json:
        urls = {server.name: server.url for server in servers}
        logs.get().info("ready", api=api, docs=f"{api}/schema", mails=sent_to, servers=urls, curl=curl)
    else:
        logs.get().info("ready", api=api)
        lines = "".join(f"  {server.name:<9}{server.url}  (pid {server.process.pid})\n" for server in servers)
        stream.write_paragraph(
            f"""
  API      {api}
  docs     {api}/schema
  mails    {sent_to}
{lines}  stop     Ctrl-C

Create a user. After VERIFY_EMAIL_DELAY (10 seconds by default) the log shows the mail and its link:

{curl}
"""
        )
