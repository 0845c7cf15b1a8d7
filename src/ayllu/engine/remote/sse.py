"""Reads a stream of server-sent events out of bytes that arrive cut anywhere, in bounded memory.

The rules are those of the HTML standard, section 9.2.6: lines end in LF, CR or CRLF, a leading colon makes a
comment, several `data` lines are one text, a blank line ends the event, and what no blank line ended is none.
`id` and `retry` are for reconnecting, which nobody does in the middle of an answer, and are passed over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ayllu.errors import RemoteEngineError

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class ServerEvent:
    """One event: its kind ('message' where none is named) and its data."""

    kind: str
    data: str


class SseReader:
    """Give it bytes as they come; it gives back the events they complete.

    No event, and no line of one, may be longer than `max_event_bytes`.
    """

    def __init__(self, max_event_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest = bytearray()
        self._kind = ""
        self._data: list[str] = []
        self._event_bytes = 0
        self._first_line = True
        self._after_carriage_return = False

    def feed(self, data: bytes) -> list[ServerEvent]:
        """The events that `data` completes. Raises RemoteEngineError when one grows too long."""
        if self._after_carriage_return and data.startswith(b"\n"):
            # The second half of a CRLF that was cut in the middle: that line has ended already.
            self._after_carriage_return = False
            data = data[1:]
        if not data:
            return []
        self._after_carriage_return = data.endswith(b"\r")
        *ends, rest = _LINE_END.split(data)
        events = []
        for end in ends:
            self._grow(end)
            line = bytes(self._rest)
            self._rest.clear()
            event = self._take(line)
            if event is not None:
                events.append(event)
        self._grow(rest)
        return events

    def _grow(self, piece: bytes) -> None:
        self._rest += piece
        if self._event_bytes + len(self._rest) > self._max_event_bytes:
            raise RemoteEngineError(
                f"The server sends an event of more than {self._max_event_bytes} bytes.",
                "Check that base_url is an OpenAI-compatible server.",
            )

    def _take(self, line: bytes) -> ServerEvent | None:
        """One whole line; the event that it ends, if it is the blank one."""
        if self._first_line:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            self._first_line = False
        if not line:
            return self._end_of_event()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._event_bytes += len(line)
            self._data.append(value.decode("utf-8", errors="replace"))
        elif name == b"event":
            self._kind = value.decode("utf-8", errors="replace")
        return None

    def _end_of_event(self) -> ServerEvent | None:
        event = ServerEvent(self._kind or "message", "\n".join(self._data)) if self._data else None
        self._kind, self._data, self._event_bytes = "", [], 0
        return event
