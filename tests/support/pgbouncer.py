"""Runs PgBouncer in front of a Postgres server."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg.conninfo import conninfo_to_dict

from outbox.devstack.unprivileged import chown_to_unprivileged
from tests.support.waiting import eventually

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
"""Debian installs it in a folder that is not in an ordinary user's PATH."""


@contextmanager
def pgbouncer(folder: Path, server_url: str, mode: str = "transaction") -> Iterator[str]:
    """Runs PgBouncer in front of all databases of a server.

    Args:
        folder: an empty folder with a short path, because it holds the socket.
        server_url: a database of that server.
        mode: the pool mode, `transaction` or `session`.

    Yields:
        The URL of the same database through PgBouncer.
    """
    assert PROGRAM is not None
    server = conninfo_to_dict(server_url)
    name = str(server.pop("dbname"))
    target = " ".join(
        f"{key}='{value}'" for key, value in server.items() if key in {"host", "port", "user", "password"}
    )
    (folder / "pgbouncer.ini").write_text(
        f"""
        [databases]
        * = {target}
        [pgbouncer]
        auth_type = any
        listen_port = 6432
        unix_socket_dir = {folder}
        pool_mode = {mode}
        default_pool_size = 4
        max_client_conn = 200
        """
    )
    with (folder / "pgbouncer.log").open("wb") as log:
        process = subprocess.Popen(
            [PROGRAM, folder / "pgbouncer.ini"], stdout=log, stderr=subprocess.STDOUT, **chown_to_unprivileged(folder)
        )
    url = f"postgresql://outbox@/{name}?host={quote(str(folder))}&port=6432"
    try:
        eventually(lambda: process.poll() is not None or _answers(url), 20, "PgBouncer answers")
        assert process.poll() is None, (folder / "pgbouncer.log").read_text()
        yield url
    finally:
        process.terminate()
        process.wait(10)


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True
