"""HTTP/1.1 on one connection, with limits for how long the service waits and for the number of connections."""

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
from outbox_service.framing import MAX_HEAD, FramedConnection
from outbox_service.problems import MEDIA_TYPE, RETRY_AFTER, problem_content
from outbox_service.request_log import HEADER

HEAD_TIME = 10.0
"""Seconds from the first byte of a head to its end."""
BODY_TIME = 20.0
"""Seconds from the end of a head to the end of the body."""
READ_TIME = 20.0
"""Seconds in which a client has to take what was written to it."""
IDLE_TIME = 75
"""Seconds that a connection may be idle: longer than proxies keep theirs (nginx: 60), so that it is they who close it,
and no request meets a connection that is about to be closed."""

_tally = Tally()


class Crowd:
    """The open connections of one service, up to a limit.

    At the limit, a new connection replaces the one that has kept the service waiting for longest: clients that send
    nothing cannot keep others out.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.open: set[Protocol] = set()
        self.awaited: dict[Protocol, None] = {}
        """Connections that wait for their client, the one that has waited for longest first."""

    def admit(self, protocol: "Protocol") -> bool:
        """Returns whether there is room for one more connection, or room could be made."""
        if len(self.open) >= self.most:
            if times := _tally.count("crowd"):
                logs.get().warning("too many connections", open=len(self.open), most=self.most, times=times)
            if not self.awaited:
                return False
            next(iter(self.awaited)).abort()
        self.open.add(protocol)
        return True

    def leave(self, protocol: "Protocol") -> None:
        """Forgets a connection."""
        self.open.discard(protocol)
        self.awaited.pop(protocol, None)


def limited_protocol(most: int) -> type[asyncio.Protocol]:
    """Returns the protocol factory for uvicorn, for up to `most` connections at a time."""
    return cast("type[asyncio.Protocol]", partial(Protocol, Crowd(most)))


class Protocol(H11Protocol):
    """uvicorn's protocol, with limits for what a client may keep the service waiting for."""

    conn: FramedConnection

    def __init__(self, crowd: Crowd, **given: Any) -> None:
        super().__init__(**given)
        self.conn = FramedConnection(h11.SERVER, MAX_HEAD)
        self._crowd = crowd
        self._awaited = ""
        """What the connection waits for the client to do; empty if it does not."""
        self._limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # writing pauses until the client has taken every byte
        if self._crowd.admit(self):
            self._await("request", IDLE_TIME)
        else:
            self._refuse(503, "the service has too many connections: try again in a moment")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops waiting for the client."""
        self._await()
        self._crowd.leave(self)
        super().connection_lost(exc)

    def abort(self) -> None:
        """Closes the connection at once."""
        self._crowd.leave(self)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Goes on with what a client has sent, unless it has been refused."""
        if not self.transport.is_closing():
            super().data_received(data)
            self._note_state()

    def pause_writing(self) -> None:
        """Waits for the client to take what was written, unless it is waited for already."""
        super().pause_writing()
        self._note_state()

    def resume_writing(self) -> None:
        """Goes on: the client has taken all."""
        super().resume_writing()
        self._note_state()

    def on_response_complete(self) -> None:
        """Waits for the next request, or for the rest of this one's body, which nobody reads."""
        super().on_response_complete()
        self._note_state()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no request; `msg` does not say why."""
        error = self.conn.refusal
        # h11 quotes what was sent, which may be a secret.
        why = str(error).partition(":")[0] if error else msg
        self._refuse(error.error_status_hint if error else 400, f"this is no HTTP request: {why}")

    def _should_upgrade(self) -> bool:
        """Goes on as if the client had offered no other protocol: the body is read (RFC 9110, 7.8)."""
        return False

    def _note_state(self) -> None:
        state = self.conn.their_state
        if self.flow.write_paused:  # also by an answer after which the connection is to be closed
            self._await("reading", READ_TIME)
        elif state is h11.SEND_BODY:
            self._await("body", BODY_TIME)
        elif state is not h11.IDLE or self.transport.is_closing():
            self._await()
        elif self.conn.trailing_data[0]:
            self._await("head", HEAD_TIME)
        else:
            self._await("request", IDLE_TIME)

    def _await(self, what: str = "", seconds: float = 0.0) -> None:
        if self._awaited == what:
            return
        if self._limit:
            self._limit.cancel()
            self._limit = None
        self._awaited = what
        self._crowd.awaited.pop(self, None)
        if what:
            self._crowd.awaited[self] = None
            self._limit = self.loop.call_later(seconds, self._give_up, seconds)

    def _give_up(self, seconds: float) -> None:
        if self._awaited == "reading":
            self.abort()
        elif self._awaited == "request":
            self.transport.close()  # an answer to nothing would be taken for the next request's
        else:
            self._refuse(408, f"the {self._awaited} of the request did not come within {seconds:g} s")

    def _refuse(self, status: int, why: str) -> None:
        request_id = uuid4().hex
        if times := _tally.count(why):
            logs.get().warning("refused an HTTP request", why=why, request_id=request_id, times=times)
        self._await()
        if cycle := cast("RequestResponseCycle | None", self.cycle):  # one that is over does not mind
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
        self._note_state()
