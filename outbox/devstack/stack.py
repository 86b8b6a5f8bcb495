"""All of it, from the bottom to the top: servers, schema, processes; and down again in the reverse order."""

import json
import shlex
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil

from outbox.devstack.child_process import POLL, Supervisor
from outbox.devstack.data_folder import DataFolder, held
from outbox.devstack.embedded import EmbeddedServer, embedded_postgres, embedded_redis
from outbox.devstack.environment import UpSettings, for_processes, free_address, is_set, local_url, read_settings
from outbox.devstack.log_stream import Stream
from outbox.devstack.mail_catcher import catch_mails
from outbox.devstack.processes import NAMES, Program, Watch
from outbox.devstack.signals import SIGNALS, Stopped, wait_unless_stopped
from outbox.errors import StartError
from outbox.runtime import logs
from outbox.runtime.migrations import migrate
from outbox.runtime.stop import Stop

_READY_LIMIT = 30.0
"""Seconds until the service must be ready."""
_LOOK = 0.1
"""Seconds between two looks after the processes."""


def run(path: Path) -> None:
    """Runs everything until this process is asked to stop.

    Args:
        path: the data folder.

    Raises:
        SettingsError: a variable is wrong.
        StartError: something cannot start.
        psycopg.OperationalError: the Postgres in the user's DATABASE_URL is away.
    """
    settings = read_settings()
    with ExitStack() as stack:
        stop = Stop()
        stop.listen(signals=SIGNALS)
        stream = Stream(sys.stdout, as_json=settings.log_json, broken=stop.request)
        folder = stack.enter_context(held(path))
        stack.enter_context(redirect_stdout(stream.writer("up")))
        logs.configure("up", settings.log_level, "json")
        try:
            with ExitStack() as children:
                _start_and_watch(children, settings, folder, stream, stop)
        except Stopped:
            logs.get().info("stopped")
        except OSError as error:
            # A full disk, or files in the data folder that another user has made.
            raise StartError(f"the data folder {path} cannot be used: {error}") from error
        folder.forget()


def _start_and_watch(children: ExitStack, settings: UpSettings, folder: DataFolder, stream: Stream, stop: Stop) -> None:
    # First, because what was left running may be what has the port.
    wait = partial(wait_unless_stopped, stop)
    folder.stop_leftovers(wait)
    settings = replace(settings, address=free_address(settings.address))
    supervisor = Supervisor(wait, folder.remember, stop.is_hurried)
    kept: list[EmbeddedServer] = []
    provided = {"SECRET_KEY": folder.secret_key()}
    if not is_set("DATABASE_URL"):
        logs.get().info("starting Postgres", folder=str(folder.path / "postgres"))
        postgres = children.enter_context(embedded_postgres(folder.path / "postgres", supervisor=supervisor))
        provided["DATABASE_URL"] = postgres.url
        kept.append(postgres)
    if not is_set("REDIS_URL"):
        logs.get().info("starting Redis", folder=str(folder.path / "redis"))
        redis = children.enter_context(embedded_redis(folder.path / "redis", supervisor=supervisor))
        provided["REDIS_URL"] = redis.url
        kept.append(redis)
    if not is_set("SMTP_URL"):
        provided["SMTP_URL"] = children.enter_context(catch_mails(folder.mails))
    environment = for_processes(settings, **provided)
    _migrate(environment["DATABASE_URL"], stop)

    programs = [_program(children, name, Program(name, environment, stream, supervisor)) for name in NAMES[::-1]]
    watch = Watch([*kept, *programs])
    try:
        _await_ready(settings, programs[-1], watch, stream, stop)
        _say_ready(settings, None if is_set("SMTP_URL") else folder.mails, kept, stream)
        while True:
            wait(_LOOK)
            watch.look()
    except Stopped:
        logs.get().info("stopping: once more to hurry")
        raise


def _program(children: ExitStack, name: str, program: Program) -> Program:
    def stop() -> None:
        program.stop()
        logs.get().info(f"{name} stopped", code=program.process.returncode)

    children.callback(stop)
    return program


def _migrate(database_url: str, stop: Stop) -> None:
    """Migrates in a thread, because it may wait for another's lock while this process is asked to stop."""
    result: Future[None] = Future()

    def work() -> None:
        try:
            migrate(database_url)
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            result.set_exception(error)
        else:
            result.set_result(None)

    threading.Thread(target=work, name="migrate", daemon=True).start()
    while not result.done():
        wait_unless_stopped(stop, POLL)
    result.result()


def _await_ready(settings: UpSettings, service: Program, watch: Watch, stream: Stream, stop: Stop) -> None:
    deadline = time.monotonic() + _READY_LIMIT
    while not (_listens(service, settings.address.port) and _answers(f"{local_url(settings.address)}/readyz")):
        if time.monotonic() > deadline:
            last_words = stream.last_words("service")
            raise StartError(f"the service is not ready after {_READY_LIMIT:g} s; see its log\n{last_words}".rstrip())
        wait_unless_stopped(stop, _LOOK)
        watch.look()


def _listens(service: Program, port: int) -> bool:
    """Whether it is our service that has the port, and not one that took it since it was found free."""
    try:
        connections = psutil.Process(service.process.pid).net_connections("tcp")
    except psutil.AccessDenied:
        return True
    except psutil.Error:
        return False
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in connections)


def _answers(url: str) -> bool:
    # No proxy: http_proxy may be set, and would not find this machine's 127.0.0.1.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):
        return False


def _say_ready(settings: UpSettings, mails: Path | None, kept: list[EmbeddedServer], stream: Stream) -> None:
    api = local_url(settings.address)
    user = {"username": "alice", "password": "open-sesame-42", "full_name": "Alice Doe", "email": "alice@example.com"}
    curl = f"curl -i {api}/v1/users -H 'content-type: application/json' -d {shlex.quote(json.dumps(user))}"
    caught = str(mails) if mails else "sent to the server in SMTP_URL"
    if settings.log_json:
        urls = {server.name: server.url for server in kept}
        logs.get().info("ready", api=api, docs=f"{api}/schema", mails=caught, servers=urls, curl=curl)
    else:
        logs.get().info("ready", api=api)
        servers = "".join(f"  {server.name:<9}{server.url}  (pid {server.process.pid})\n" for server in kept)
        stream.paragraph(
            f"""
  API      {api}
  docs     {api}/schema
  mails    {caught}
{servers}  stop     Ctrl-C

Create a user. The log shows the mail and its link ten seconds later, or after VERIFY_EMAIL_DELAY if you set it:

{curl}
"""
        )
