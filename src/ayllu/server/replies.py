"""What endpoints have in common when they answer: errors in a dialect, streams, clients that left."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request, Response

from ayllu.engine.openai.results import error_body
from ayllu.errors import AylluError, EngineUnavailableError, SignInError
from ayllu.server.anthropic import shape as anthropic
from ayllu.server.event_stream import EventStream
from ayllu.server.shapes import ServerEvent, compact_json

Result = TypeVar("Result")


class JsonReply(Response):
    """A body of JSON. Numbers that JSON has no word for are refused, never written."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return compact_json(content).encode()


class ClientLeftError(Exception):
    """Nobody waits for the answer any more. Not an error of anybody."""


def error_reply(request: Request, error: AylluError) -> Response:
    """`error` as the dialect of the path has it, with the headers that belong to it."""
    headers: dict[str, str] = {}
    status = error.http_status
    if isinstance(error, SignInError):
        headers["www-authenticate"] = "Bearer"
    retry_after_s = error.retry_after_s
    if retry_after_s is None and isinstance(error, EngineUnavailableError):
        retry_after_s = 5.0
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    if request.url.path.startswith("/v1/messages"):
        return JsonReply(anthropic.error_body(error), anthropic.status_of(error), headers)
    return JsonReply(error_body(error), status, headers)


async def stream_reply(
    events: AsyncGenerator[Sequence[ServerEvent]], headers: Mapping[str, str] | None = None
) -> EventStream:
    """A stream whose first batch has been made: what refuses the request is raised here, as a status."""
    first = await anext(events)
    return EventStream(_from(first, events), headers)


async def _from(
    first: Sequence[ServerEvent], events: AsyncGenerator[Sequence[ServerEvent]]
) -> AsyncGenerator[Sequence[ServerEvent]]:
    try:
        yield first
        # The error has been told by the stream's own last events.
        with suppress(AylluError):
            async for batch in events:
                yield batch
    finally:
        await events.aclose()


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client disconnects: ClientLeftError then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeftError
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError, AylluError):
                await working


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
