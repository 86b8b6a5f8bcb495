"""Gives each HTTP request an id and logs it once."""

import asyncio
import re
import time
from typing import Any
from uuid import uuid4

from litestar.types import ASGIApp, Message, Receive, ReceiveMessage, Send

from outbox.runtime import logs

HEADER = b"x-request-id"

_ACCEPTABLE = re.compile(r"[A-Za-z0-9._-]{1,100}")

CLIENT_CLOSED = 499
"""The status that is logged, and never sent, if the client disconnects during its request: nginx's convention."""

_MAX_METHOD = 20
_MAX_PATH = 200
"""Maximum characters of a method and of a path in the log."""

_END_OF_PATH = re.compile(r"[?&;%]")


class RequestLog:
    """ASGI middleware around the whole app, so that requests that the framework refuses are logged too.

    The path is logged without its query, which may hold a secret code, even if a mail program has percent-encoded the
    question mark and so made the query a part of the path.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Passes a request to the app, and logs it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope["state"]["request_id"] = request_id
        started = time.perf_counter()
        status_code = 0
        is_disconnected = False

        async def receive_and_watch() -> ReceiveMessage:
            nonlocal is_disconnected
            message = await receive()
            is_disconnected = is_disconnected or message["type"] == "http.disconnect"
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal status_code
            if message["type"] == "http.response.start":
                # The app's answer to an incomplete request reaches no client, and its status would look like our error.
                status_code = CLIENT_CLOSED if is_disconnected else message["status"]
                message["headers"] = [*message["headers"], (HEADER, request_id.encode())]
            await send(message)

        with logs.bound_fields(request_id=request_id):
            try:
                await self._app(scope, receive_and_watch, send_with_id)
            except asyncio.CancelledError:
                # The service is stopping and its grace period is over. The request's transaction is rolled back.
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
    """Returns the id that the client sent, if it is safe to log and store, else a new one."""
    for name, value in scope["headers"]:
        if name == HEADER and _ACCEPTABLE.fullmatch(sent := value.decode("latin-1")):
            return str(sent)
    return uuid4().hex
