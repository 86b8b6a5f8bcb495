"""Real reverse proxies before the service, with connections to it that they keep."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.mailbox import free_port
from tests.support.waiting import eventually

# What is widely copied to let WebSockets through: every request is forwarded with the client's own offer.
_NGINX = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream service {{ server 127.0.0.1:{upstream}; keepalive 4; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://service;
            proxy_http_version 1.1;
            proxy_request_buffering off;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection "upgrade";
        }}
    }}
}}
"""

_HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    http-reuse always
frontend all
    bind 127.0.0.1:{port}
    default_backend service
backend service
    server one 127.0.0.1:{upstream}
"""

_PROGRAMS = {"nginx": (_NGINX, ["-c", "{file}", "-p", "{folder}"]), "haproxy": (_HAPROXY, ["-db", "-f", "{file}"])}


def find(name: str) -> str | None:
    """Returns the program's path, if it is installed: Debian keeps it where administrators look."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


@contextmanager
def proxy(name: str, folder: Path, upstream: int) -> Iterator[int]:
    """Runs a proxy before a port of this machine until the block is left, and yields its own port.

    Args:
        name: `nginx` or `haproxy`.
        folder: an empty one of its own.
        upstream: where the service listens.
    """
    program = find(name)
    assert program is not None
    template, arguments = _PROGRAMS[name]
    port, file = free_port(), folder / f"{name}.conf"
    file.write_text(template.format(folder=folder, upstream=upstream, port=port))
    if os.geteuid() == 0:  # nginx' own processes are nobody's
        folder.chmod(0o755)
    command = [program, *(argument.format(file=file, folder=folder) for argument in arguments)]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:

        def listens() -> bool:
            assert process.poll() is None, (folder / "output").read_text()
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
            return False

        eventually(listens, 10, f"{name} listens")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)
