"""Bodies of requests, read within bounds of size and time; large ones are parsed in a thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from ayllu.engine.openai.body import MAX_BODY_BYTES, InvalidBodyError, read_json_object
from ayllu.errors import TooLargeError, UsageError
from ayllu.server.replies import ClientLeftError

READ_TIMEOUT_S = 30.0
"""Seconds without a byte after which a body counts as abandoned."""

SLOWEST_BYTES_A_SECOND = 4 << 10
"""A body that comes more slowly than this, after READ_TIMEOUT_S, only holds its connection."""

THREAD_BYTES = 64 << 10
"""A body beyond this would hold up everybody else while it is parsed in the event loop."""


async def read_body(request: Request, *, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The whole body. Raises TooLargeError as soon as it is too large, UsageError where it does not come."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise UsageError(f"The body is encoded as {encoding[:20]!r}.", "Send it as it is, uncompressed.")
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > max_bytes:
        raise _too_large(max_bytes)
    pieces = [piece async for piece in body_pieces(request, max_bytes, _too_large(max_bytes))]
    body = b"".join(pieces)
    request.state.body_bytes = len(body)
    return body


async def body_pieces(request: Request, max_bytes: int, too_large: TooLargeError) -> AsyncIterator[bytes]:
    """The body as it comes. Raises `too_large`; UsageError where it comes too slowly, ClientLeftError."""
    stream = request.stream()
    started, total = time.monotonic(), 0
    while True:
        left_s = started + READ_TIMEOUT_S + total / SLOWEST_BYTES_A_SECOND - time.monotonic()
        try:
            piece = await asyncio.wait_for(anext(stream), min(READ_TIMEOUT_S, max(0.0, left_s)))
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise UsageError("The body did not arrive in time.", "Send it without pauses.") from None
        except ClientDisconnect:
            raise ClientLeftError from None
        total += len(piece)
        if total > max_bytes:
            raise too_large
        yield piece


async def read_json(request: Request, *, max_bytes: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """The body as a JSON object. Raises TooLargeError and InvalidBodyError."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind not in ("application/json", "text/json") and not kind.endswith("+json"):
        # A form of another page could be sent here without asking; JSON could not.
        raise InvalidBodyError(
            "The body is no JSON.", "Send content-type: application/json.", code="invalid_json"
        )
    data = await read_body(request, max_bytes=max_bytes)
    if len(data) <= THREAD_BYTES:
        return read_json_object(data, "The body", max_bytes=max_bytes)
    return await asyncio.to_thread(read_json_object, data, "The body", max_bytes=max_bytes)


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(f"The body is larger than {max_bytes:,} bytes.", "Send less in one request.")
