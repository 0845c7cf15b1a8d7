"""Server-sent events to one client: sent as they come, kept alive while nothing does, given up when not read.

A client that goes away ends what feeds the stream at once; one that stops reading ends it after a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from ayllu.server.shapes import ServerEvent

KEEP_ALIVE_S = 15.0
"""Proxies cut connections that are silent for 60 s."""

STALL_S = 60.0
"""Seconds that a client may leave what was sent unread."""

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class EventStream(Response):
    """`events` yields what has come since the last time. It is closed when the stream ends, however it ends;
    so that is where its work is to be cancelled."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[Sequence[ServerEvent]], headers: Mapping[str, str] | None = None
    ) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self._events = events
        self.init_headers({**HEADERS, **(headers or {})})
        # No length is known, and none must be told.
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((writing, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not writing.done():
                writing.cancel()
            with suppress(asyncio.CancelledError, TimeoutError, OSError):
                await writing

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        waiting: asyncio.Future[Sequence[ServerEvent]] | None = None
        # aclosing: the generator's own clean-up must run now, not when the garbage collector comes.
        async with aclosing(self._events) as events:  # type: ignore[type-var]
            try:
                while True:
                    waiting = waiting or asyncio.ensure_future(anext(events))
                    if not waiting.done():
                        await asyncio.wait((waiting,), timeout=KEEP_ALIVE_S)
                    if not waiting.done():
                        await _send(send, b": keep-alive\n\n")
                        continue
                    try:
                        batch = waiting.result()
                    except StopAsyncIteration:
                        break
                    finally:
                        waiting = None
                    if batch:
                        await _send(send, b"".join([event.encoded() for event in batch]))
            finally:
                if waiting is not None:
                    waiting.cancel()
                    with suppress(asyncio.CancelledError, StopAsyncIteration):
                        await waiting
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, data: bytes) -> None:
    message: dict[str, Any] = {"type": "http.response.body", "body": data, "more_body": True}
    async with asyncio.timeout(STALL_S):
        await send(message)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
