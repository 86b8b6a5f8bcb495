"""Processes with a low limit of open files: they log it, and open connections keep no other client out."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import psutil

from tests.support.processes import Process, Stack
from tests.support.waiting import eventually

HEAD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
BODY = b"POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"


@contextmanager
def hold_connections(port: int, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    """Holds connections on which these bytes were sent."""
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(count)]
        for connection in connections:
            with suppress(ConnectionError):  # the service has already closed it for a newer one
                connection.sendall(sent)
        yield connections


def open_files(process: Process) -> int:
    """Returns the number of open files of a process."""
    return psutil.Process(process.popen.pid).num_fds()


def test_connections_keep_nobody_out_of_a_service_with_few_descriptors(stack: Stack) -> None:
    """It serves despite hundreds of idle connections, half heads and half bodies sent while it was suspended."""
    service = stack.run("service", limits="ulimit -n 100")
    (line,) = service.events("too few open files")
    assert (line["limit"], line["needed"], line["room"]) == (100, 1060, 40)
    assert "OUTBOX_HTTP_CONNECTIONS" in line["remedy"]
    for number, sent in enumerate((b"", HEAD, BODY)):
        psutil.Process(service.popen.pid).suspend()
        with hold_connections(stack.port, 300, sent):
            psutil.Process(service.popen.pid).resume()
            assert stack.get("/readyz")[0] == 200
            assert stack.create_user(f"user_{number}")[0] == 201
            assert open_files(service) < 100
    assert len(service.events("too many connections")) == 1
    assert "Traceback" not in service.text()


def test_a_service_raises_its_own_limit(stack: Stack) -> None:
    """The usual limit is soft: 200 clients stay connected although it was 100."""
    service = stack.run("service", limits="ulimit -S -n 100")
    with hold_connections(stack.port, 200, b""):
        eventually(lambda: open_files(service) > 200, 10, "all are accepted")
    assert not service.events("too few open files")
    assert not service.events("too many connections")


def test_a_worker_raises_its_own_limit(stack: Stack) -> None:
    """It raises a soft limit that its settings exceed, and logs what a hard limit lacks."""
    settings = {"OUTBOX_HANDLER_CONNECTIONS": "50", "OUTBOX_MAIL_CONNECTIONS": "50"}
    soft = stack.start("worker", limits="ulimit -S -n 100", **settings)
    hard = stack.start("worker", limits="ulimit -n 100", **settings)
    for worker in (soft, hard):
        worker.await_event("started")
    assert psutil.Process(soft.popen.pid).rlimit(psutil.RLIMIT_NOFILE)[0] == 190
    assert not soft.events("too few open files")
    (line,) = hard.events("too few open files")
    assert (line["limit"], line["needed"]) == (100, 190)
    assert "OUTBOX_MAIL_CONNECTIONS" in line["remedy"]
