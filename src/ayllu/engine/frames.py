"""Messages between a process and children that it may have to kill: over pipes, each with its length."""

from __future__ import annotations

import json
from typing import IO, Any

MAX_FRAME_BYTES = 1 << 28


def write_frame(stream: IO[bytes], message: dict[str, Any]) -> None:
    """Send one message: its length in four bytes, then JSON."""
    data = json.dumps(message).encode("ascii")
    stream.write(len(data).to_bytes(4, "big") + data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> dict[str, Any] | None:
    """The next message, None at the end of the stream. Raises ValueError for what is no message."""
    head = stream.read(4)
    length = int.from_bytes(head, "big")
    if len(head) < 4 or length > MAX_FRAME_BYTES:
        return None
    data = stream.read(length)
    if len(data) < length:
        return None
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("the message is no JSON object")
    return message
