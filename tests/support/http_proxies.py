"""Real reverse proxies in front of the service, with persistent connections to it."""

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

# A widely copied configuration for WebSockets: every request is forwarded with the client's Upgrade header.
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


def find_program(name: str) -> str | None:
    """Returns the path of a program if it is installed; Debian installs proxies in /usr/sbin."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


@contextmanager
def run_proxy(name: str, folder: Path, upstream: int) -> Iterator[int]:
    """Runs a proxy in front of a local port until the block ends, and yields the proxy's port.

    Args:
        name: `nginx` or `haproxy`.
        folder: an empty folder for the proxy's files.
        upstream: the port of the service.
    """
    program = find_program(name)
    assert program is not None
    template, arguments = _PROGRAMS[name]
    port, file = free_port(), folder / f"{name}.conf"
    file.write_text(template.format(folder=folder, upstream=upstream, port=port))
    if os.geteuid() == 0:  # nginx's workers run as the user nobody
        folder.chmod(0o755)
    command = [program, *(argument.format(file=file, folder=folder) for argument in arguments)]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:

        def is_listening() -> bool:
            assert process.poll() is None, (folder / "output").read_text()
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
            return False

        eventually(is_listening, 10, f"{name} listens")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)
