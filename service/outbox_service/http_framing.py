"""Finds where each HTTP/1.1 request ends, and refuses requests that a proxy and this service may parse differently."""

import re
from typing import Any

import h11

MAX_HEAD = 64 * 1024
"""Maximum bytes of a head: the request line and the headers."""
MAX_LINES = 200
"""Maximum lines of a head: each costs time."""
MAX_CHUNKS = 1000
"""Maximum chunks of a body: each costs time, however short it is."""
MAX_CHUNKED_LINES = 3000
"""Maximum lines of a chunked body: two for each chunk, those of the JSON, and trailers. Each costs time."""

_END_OF_HEAD = re.compile(rb"\n\r?\n")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_FOLDED = re.compile(rb"\n[ \t]")


class StrictConnection(h11.Connection):
    """h11's connection, which refuses requests that a proxy and this service may parse differently.

    h11 accepts what RFC 9112 permits: a length beside `Transfer-Encoding: chunked`, lines that end in a bare LF, folded
    headers. A proxy that parses one of them differently would send the answer to one client's request to another.
    """

    refusal: h11.RemoteProtocolError | None = None
    """Why the client's request was refused."""
    _chunks = 0
    """Chunks of the current request so far."""
    _lines = 0
    """Lines received since the head of the current request: of its body and of later requests."""
    _is_chunked = False

    def receive_data(self, data: bytes) -> None:
        """Adds bytes that the client has sent."""
        super().receive_data(data)
        if self._is_chunked:
            self._lines += data.count(b"\n")

    def next_event(self) -> Any:
        """Returns the next event of the current request.

        Raises:
            h11.RemoteProtocolError: the request is refused; `refusal` holds this error.
        """
        try:
            if self.their_state is h11.IDLE:
                _check_head(self.trailing_data[0])
            elif self._is_chunked:
                _check_chunked_lines(self._lines)
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check_framing(event)
                self._is_chunked = any(name == b"transfer-encoding" for name, _ in event.headers)
                self._chunks = 0
                self._lines = self.trailing_data[0].count(b"\n") if self._is_chunked else 0
            elif isinstance(event, h11.EndOfMessage):
                self._is_chunked = False
            elif isinstance(event, h11.Data) and event.chunk_start:
                self._chunks += 1
                _check_chunks(self._chunks)
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise
        return event


def _check_head(received: bytes) -> None:
    end = _END_OF_HEAD.search(received)
    if (end.end() if end else len(received)) > MAX_HEAD:
        raise h11.RemoteProtocolError(f"the head is over {MAX_HEAD // 1024} KiB", error_status_hint=431)
    if received.count(b"\n", 0, end.end() if end else MAX_HEAD) > MAX_LINES:
        raise h11.RemoteProtocolError(f"the head has over {MAX_LINES} lines", error_status_hint=431)
    if end:
        head = received[: end.end()]
        if _BARE_LF.search(head):
            raise h11.RemoteProtocolError("a line of the head ends in LF without CR")
        if _FOLDED.search(head, 0, end.start()):
            raise h11.RemoteProtocolError("a header is folded")


def _check_framing(request: h11.Request) -> None:
    if not request.http_version.startswith(b"1."):
        raise h11.RemoteProtocolError("the version is not HTTP/1", error_status_hint=505)
    names = [name for name, _ in request.headers]
    if b"transfer-encoding" in names:
        if b"content-length" in names:
            raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding exclude each other")
        if request.http_version < b"1.1":
            raise h11.RemoteProtocolError("HTTP/1.0 has no Transfer-Encoding")


def _check_chunks(count: int) -> None:
    if count > MAX_CHUNKS:
        raise h11.RemoteProtocolError(f"the body has over {MAX_CHUNKS} chunks", error_status_hint=413)


def _check_chunked_lines(count: int) -> None:
    if count > MAX_CHUNKED_LINES:
        raise h11.RemoteProtocolError(f"the body has over {MAX_CHUNKED_LINES} lines", error_status_hint=413)
