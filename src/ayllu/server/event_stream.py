"""Server-sent events to one client: sent as they come, kept alive while nothing does, given up when not read.

A client that goes away ends what feeds the stream at once; one that stops reading ends it after a while.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress

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
        self, events: AsyncGenerator[Sequence[ServerEvent]], headers: Mapping[str, str] | None = None
    ) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self._events = events
        self.init_headers({**HEADERS, **(headers or {})})
        # No length is known, and none must be told.
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._sent_at = time.monotonic()
        self._is_sending = False
        writing = asyncio.ensure_future(self._write(send))
        others = [asyncio.ensure_future(_disconnected(receive)), asyncio.ensure_future(self._watch(send))]
        try:
            await asyncio.wait((writing, *others), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for other in others:
                other.cancel()
            if not writing.done():
                writing.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await writing
            await asyncio.wait(others)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        # aclosing: the generator's own clean-up must run now, not when the garbage collector comes.
        async with aclosing(self._events) as events:
            async for batch in events:
                if batch:
                    await self._send(send, b"".join([event.encoded() for event in batch]))
        self._is_sending = True
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        self._is_sending = True
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._is_sending = False
        self._sent_at = time.monotonic()

    async def _watch(self, send: Send) -> None:
        """Returns when the client has left everything unread for too long; until then keeps the connection
        alive. A clock of its own, as a time-out for every token would cost more than the token."""
        while True:
            await asyncio.sleep(min(KEEP_ALIVE_S, STALL_S) / 4)
            silent_s = time.monotonic() - self._sent_at
            if self._is_sending:
                if silent_s > STALL_S:
                    return
            elif silent_s > KEEP_ALIVE_S * 3 / 4:
                # To somebody who reads nothing this waits too, and only here would anybody notice.
                try:
                    await asyncio.wait_for(self._send(send, b": keep-alive\n\n"), STALL_S)
                except TimeoutError:
                    return


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
