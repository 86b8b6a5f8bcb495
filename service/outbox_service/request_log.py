"""One log line and one id per HTTP request."""

import asyncio
import re
import time
from typing import Any
from uuid import uuid4

from litestar.types import ASGIApp, Message, Receive, ReceiveMessage, Send

from outbox.runtime import logs

HEADER = b"x-request-id"

_ACCEPTABLE = re.compile(r"[A-Za-z0-9._-]{1,100}")

HUNG_UP = 499
"""What is logged, and never sent, where a client has hung up in the middle of its request: nginx's convention."""

_MAX_METHOD = 20
_MAX_PATH = 200
"""Characters of a method and of a path that are logged."""

_END_OF_PATH = re.compile(r"[?&;%]")


class RequestLog:
    """ASGI middleware around the whole app, so that what the framework refuses is logged too.

    The path is logged without its query, which may hold a secret code, even
    where a mail program has percent-encoded the question mark and made the query a part of the path.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope["state"]["request_id"] = request_id
        started = time.perf_counter()
        status_code = 0
        has_hung_up = False

        async def receive_and_note() -> ReceiveMessage:
            nonlocal has_hung_up
            message = await receive()
            has_hung_up = has_hung_up or message["type"] == "http.disconnect"
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal status_code
            if message["type"] == "http.response.start":
                # What the app answers to a request that was cut off, nobody hears, and it speaks of a failure of ours.
                status_code = HUNG_UP if has_hung_up else message["status"]
                message["headers"] = [*message["headers"], (HEADER, request_id.encode())]
            await send(message)

        with logs.bound(request_id=request_id):
            try:
                await self._app(scope, receive_and_note, send_with_id)
            except asyncio.CancelledError:
                # The service is stopping, and its grace is over. What the request was about to do is rolled back.
                if status_code == 0:
                    await _send_stopping(send_with_id)
            finally:
                logs.get().info(
                    "received an HTTP request",
                    method=scope["method"][:_MAX_METHOD],
                    path=_END_OF_PATH.split(scope["path"], maxsplit=1)[0][:_MAX_PATH],
                    status_code=status_code or 500,
                    duration=round(time.perf_counter() - started, 6),
                )


async def _send_stopping(send: Send) -> None:
    headers = [(b"retry-after", b"1"), (b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _request_id(scope: Any) -> str:
    """Returns the id that the caller sent, if it is one that is safe to log and store, else a new one."""
    for name, value in scope["headers"]:
        if name == HEADER and _ACCEPTABLE.fullmatch(sent := value.decode("latin-1")):
            return str(sent)
    return uuid4().hex
