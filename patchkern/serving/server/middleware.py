# SPDX-License-Identifier: Apache-2.0
"""Around every request: bodies that are too long or come too slowly are not waited for, and everything is counted."""

from __future__ import annotations

import asyncio
import sys
import time

from fastapi.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from patchkern.serving.server.metrics import Metrics


class Measured:
    """A middleware: path, status and seconds of every request for ``metrics``."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            # of the route, for a client could make up any number of paths
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.request(path, status, time.perf_counter() - start)


class BodyLimit:
    """A middleware: 413 for a body of more than ``max_bytes``, 408 for one that is not there after ``seconds``."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        end = loop.time() + self._seconds
        size, whole = 0, False

        async def limited() -> Message:
            nonlocal size, whole
            if whole:  # what comes now is that the client has gone, whenever
                return await receive()
            if _announced(scope) > self._max_bytes:
                raise self._too_long()
            try:
                message = await _before(end, receive)
            except asyncio.TimeoutError:
                raise HTTPException(408, f"expected the whole body within {self._seconds:g} seconds") from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self._max_bytes:
                raise self._too_long()
            return message

        await self._app(scope, limited, send)

    def _too_long(self) -> HTTPException:
        # the rest of it is still on its way, so that nothing else can come over this connection
        return HTTPException(413, f"expected a body of at most {self._max_bytes} bytes", {"Connection": "close"})


if sys.version_info >= (3, 11):

    async def _before(end: float, receive: Receive) -> Message:
        """What comes before ``end``, a time of the loop."""
        async with asyncio.timeout_at(end):
            return await receive()

else:

    async def _before(end: float, receive: Receive) -> Message:
        """What comes before ``end``, a time of the loop; in a task of its own, which takes longer."""
        return await asyncio.wait_for(receive(), max(end - asyncio.get_running_loop().time(), 0))


def _announced(scope: Scope) -> int:
    """The length that the client says the body has; 0 where it does not."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
