"""HTTP/1.1 on one connection: how a request is framed, and how long the service waits for a client."""

import asyncio
import json
import re
import resource
from functools import partial
from http import HTTPStatus
from typing import Any, cast
from uuid import uuid4

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from outbox import logs
from outbox.tally import Tally
from service.problems import MEDIA_TYPE, RETRY_AFTER, problem_content
from service.requests import HEADER

MAX_HEAD = 64 * 1024
"""Bytes of a request line and its headers."""
HEAD_TIME = 10.0
"""Seconds from the first byte of a head to its end."""
BODY_TIME = 20.0
"""Seconds from the end of a head to the end of the body."""
IDLE_TIME = 75
"""Seconds that a connection may be idle: longer than proxies keep theirs (nginx: 60), so that it is they who close it,
and no request meets a connection that is about to be closed."""

_END_OF_HEAD = re.compile(rb"\n\r?\n")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_FOLDED = re.compile(rb"\n[ \t]")

_tally = Tally()


class Crowd:
    """The connections of one service, of which there may be so many.

    Where one too many comes, the one that has kept the service waiting for longest makes room: a client that sends
    nothing cannot keep others out.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.open: set[Protocol] = set()
        self.awaited: dict[Protocol, None] = {}
        """Connections whose client it is that has to send something, the one that has been so for longest first."""

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


def limited_protocol(most: int, reserve: int) -> type[asyncio.Protocol]:
    """Returns what uvicorn makes of each connection.

    Args:
        most: connections at a time.
        reserve: descriptors that this process needs for all else: fewer connections are let in where it has no more.
    """
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors != resource.RLIM_INFINITY:
        most = max(1, min(most, descriptors - reserve))
    return cast("type[asyncio.Protocol]", partial(Protocol, Crowd(most)))


class _Connection(h11.Connection):
    """h11's connection, which refuses what two servers in a row may understand differently.

    h11 follows RFC 9112, and takes what that permits: a length beside `Transfer-Encoding: chunked`, lines that end in a
    bare LF, folded headers. A proxy before us that reads one of them otherwise would take the answer to one client's
    request for another's.
    """

    refusal: h11.RemoteProtocolError | None = None
    """Why what the client has sent is no request."""

    def next_event(self) -> Any:
        try:
            if self.their_state is h11.IDLE:
                _check_lines(self.trailing_data[0])
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check_framing(event)
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise
        return event


def _check_lines(received: bytes) -> None:
    end = _END_OF_HEAD.search(received)
    if (end.end() if end else len(received)) > MAX_HEAD:
        raise h11.RemoteProtocolError(f"its head is over {MAX_HEAD // 1024} KiB", error_status_hint=431)
    if end:
        head = received[: end.end()]
        if _BARE_LF.search(head):
            raise h11.RemoteProtocolError("a line of the head ends without CR")
        if _FOLDED.search(head, 0, end.start()):
            raise h11.RemoteProtocolError("a header is folded")


def _check_framing(request: h11.Request) -> None:
    if not request.http_version.startswith(b"1."):
        raise h11.RemoteProtocolError("its version is not HTTP/1", error_status_hint=505)
    names = [name for name, _ in request.headers]
    if b"transfer-encoding" in names:
        if b"content-length" in names:
            raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding exclude each other")
        if request.http_version < b"1.1":
            raise h11.RemoteProtocolError("HTTP/1.0 knows no Transfer-Encoding")


class Protocol(H11Protocol):
    """uvicorn's protocol, with limits for what a client may keep the service waiting for."""

    conn: _Connection

    def __init__(self, crowd: Crowd, **given: Any) -> None:
        super().__init__(**given)
        self.conn = _Connection(h11.SERVER, MAX_HEAD)
        self._crowd = crowd
        self._awaited = ""
        """What the client is to send."""
        self._limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a request."""
        super().connection_made(transport)
        if self._crowd.admit(self):
            self._await("request", IDLE_TIME)
        else:
            self._refuse(503, "the service has too many connections: try again in a moment")

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits for nothing any more."""
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
        if state is h11.SEND_BODY:
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
        if self._awaited == "request":
            self.transport.close()  # an answer to nothing would be taken for the next request's
        else:
            self._refuse(408, f"the {self._awaited} of the request did not come within {seconds:g} s")

    def _refuse(self, status: int, why: str) -> None:
        request_id = uuid4().hex
        if times := _tally.count(why):
            logs.get().warning("refused an HTTP request", why=why, request_id=request_id, times=times)
        self._await()
        if self.conn.our_state is not h11.IDLE:  # what is answered already needs no more of it
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(problem_content(status, why, request_id)).encode()
            headers = [
                (b"content-type", MEDIA_TYPE.encode()),
                (b"content-length", str(len(body)).encode()),
                (HEADER, request_id.encode()),
                (b"connection", b"close"),
            ]
            if status == HTTPStatus.SERVICE_UNAVAILABLE:
                headers.append((b"retry-after", RETRY_AFTER.encode()))
            answer = h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode())
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
