"""HTTP/1.1 over uvicorn, with limits on how long a client may take and on the number of connections."""

import asyncio
import json
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any, cast
from uuid import uuid4

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from outbox.runtime import logs
from outbox.runtime.tally import Tally
from outbox_service.http_framing import MAX_HEAD, StrictConnection
from outbox_service.problems import MEDIA_TYPE, RETRY_AFTER, problem_content
from outbox_service.request_log import HEADER

HEAD_TIMEOUT = 10.0
"""Seconds from the first byte of a head to its end."""
BODY_TIMEOUT = 20.0
"""Seconds from the end of a head to the end of the body."""
READ_TIMEOUT = 20.0
"""Seconds that a client may take to read what was written to it."""
IDLE_TIMEOUT = 75
"""Seconds that a connection may be idle: longer than proxies keep theirs (nginx: 60), so that the proxy closes it, and
no request arrives on a connection that is being closed."""

_tally = Tally()


class OpenConnections:
    """The open connections of one service, up to a limit.

    At the limit, a new connection replaces the one that has waited longest for its client: clients that send nothing
    cannot keep others out.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.open: set[LimitedProtocol] = set()
        self.waiting: dict[LimitedProtocol, None] = {}
        """Connections that wait for their client, the longest wait first."""

    def admit(self, connection: "LimitedProtocol") -> bool:
        """Adds a connection, closing a waiting one if the limit is reached; returns False if none waits."""
        if len(self.open) >= self.limit:
            if times := _tally.count("too many connections"):
                logs.get().warning("too many connections", open=len(self.open), most=self.limit, times=times)
            if not self.waiting:
                return False
            next(iter(self.waiting)).abort()
        self.open.add(connection)
        return True

    def remove(self, connection: "LimitedProtocol") -> None:
        """Removes a connection."""
        self.open.discard(connection)
        self.waiting.pop(connection, None)


def protocol_factory(limit: int) -> type[asyncio.Protocol]:
    """Returns the protocol factory for uvicorn, for up to `limit` connections at a time."""
    return cast("type[asyncio.Protocol]", partial(LimitedProtocol, OpenConnections(limit)))


class LimitedProtocol(H11Protocol):
    """uvicorn's protocol for one connection, with limits on how long its client may keep the service waiting."""

    conn: StrictConnection

    def __init__(self, connections: OpenConnections, **options: Any) -> None:
        super().__init__(**options)
        self.conn = StrictConnection(h11.SERVER, MAX_HEAD)
        self._connections = connections
        self._waits_for: str | None = None
        """The client's next step: a "request", the rest of a "head" or "body", "reading" an answer, or None."""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts to wait for a request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # writing pauses until the client has taken every byte
        if self._connections.admit(self):
            self._wait_for("request", IDLE_TIMEOUT)
        else:
            self._refuse(503, "the service has too many connections: try again in a moment")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops waiting for the client."""
        self._wait_for(None)
        self._connections.remove(self)
        super().connection_lost(exc)

    def abort(self) -> None:
        """Closes the connection at once."""
        self._connections.remove(self)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Processes bytes from the client, unless its request was refused."""
        if not self.transport.is_closing():
            super().data_received(data)
            self._update_wait()

    def pause_writing(self) -> None:
        """Starts to wait for the client to read what was written, unless the connection already waits for that."""
        super().pause_writing()
        self._update_wait()

    def resume_writing(self) -> None:
        """Continues: the client has read everything."""
        super().resume_writing()
        self._update_wait()

    def on_response_complete(self) -> None:
        """Starts to wait for the next request, or for the rest of this one's body, which is discarded."""
        super().on_response_complete()
        self._update_wait()

    def send_400_response(self, msg: str) -> None:
        """Refuses an invalid request; `msg` does not give the reason."""
        error = self.conn.refusal
        # h11 quotes what was sent, which may be a secret.
        why = str(error).partition(":")[0] if error else msg
        self._refuse(error.error_status_hint if error else 400, f"not a valid HTTP request: {why}")

    def _should_upgrade(self) -> bool:
        """Ignores an offered upgrade, so that the body is read (RFC 9110, 7.8)."""
        return False

    def _update_wait(self) -> None:
        state = self.conn.their_state
        if self.flow.write_paused:  # also if the connection closes after this answer
            self._wait_for("reading", READ_TIMEOUT)
        elif state is h11.SEND_BODY:
            self._wait_for("body", BODY_TIMEOUT)
        elif state is not h11.IDLE or self.transport.is_closing():
            self._wait_for(None)
        elif self.conn.trailing_data[0]:
            self._wait_for("head", HEAD_TIMEOUT)
        else:
            self._wait_for("request", IDLE_TIMEOUT)

    def _wait_for(self, what: str | None, seconds: float = 0.0) -> None:
        if self._waits_for == what:
            return
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._waits_for = what
        self._connections.waiting.pop(self, None)
        if what is not None:
            self._connections.waiting[self] = None
            self._timer = self.loop.call_later(seconds, self._give_up, seconds)

    def _give_up(self, seconds: float) -> None:
        if self._waits_for == "reading":
            self.abort()
        elif self._waits_for == "request":
            self.transport.close()  # the client would take an answer for that to its next request
        else:
            self._refuse(408, f"the {self._waits_for} of the request did not arrive within {seconds:g} s")

    def _refuse(self, status: int, why: str) -> None:
        request_id = uuid4().hex
        if times := _tally.count(why):
            logs.get().warning("refused an HTTP request", why=why, request_id=request_id, times=times)
        self._wait_for(None)
        if cycle := cast("RequestResponseCycle | None", self.cycle):  # also one that has ended: that has no effect
            cycle.disconnected = True
            cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(problem_content(status, why, request_id)).encode()
            headers = [
                *self.server_state.default_headers,
                (b"content-type", MEDIA_TYPE.encode()),
                (b"content-length", str(len(body)).encode()),
                (HEADER, request_id.encode()),
                (b"connection", b"close"),
            ]
            if status == HTTPStatus.SERVICE_UNAVAILABLE:
                headers.append((b"retry-after", RETRY_AFTER.encode()))
            answer = h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode())
            with suppress(h11.LocalProtocolError):  # an answer to HEAD has no body
                for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._update_wait()
