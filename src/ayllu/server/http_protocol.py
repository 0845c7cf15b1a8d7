"""uvicorn's HTTP connection with the bounds that it leaves open: size and time of a request's header.

httptools keeps no count of header bytes and no clock, so one slow or endless header would hold memory and a
connection for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 16 << 10
MAX_HEADERS = 100
HEADER_TIMEOUT_S = 20.0
"""Seconds from the connection, or from the end of the request before, until a request's headers are here."""

UNREAD_TIMEOUT_S = 60.0
"""Seconds for which a client may read nothing of what waits for it."""

MAX_CONNECTIONS = 2048


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    _header_bytes = 0
    _unfinished_bytes = 0
    _in_header = True
    _refused = False
    _timer: asyncio.TimerHandle | None = None
    _reading_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(503, b"Too many connections.")
            return
        self._timer = self.loop.call_later(HEADER_TIMEOUT_S, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_reading_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_reading_timer()
        if self._is_quiet():
            self._watch_reader()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reader()

    def _watch_reader(self, before: int | None = None) -> None:
        """Cut off who reads nothing: what waits for them holds memory, and a closing transport waits too."""
        if before is None and self._reading_timer is not None:
            return
        self._reading_timer = None
        unread = self.transport.get_write_buffer_size()
        # What is written meanwhile, as of a stream that is read, says nothing.
        is_still = self.flow.write_paused or self._is_quiet()
        if before is not None and is_still and unread >= before:
            self.transport.abort()
        elif unread and is_still:
            self._reading_timer = self.loop.call_later(UNREAD_TIMEOUT_S, self._watch_reader, unread)

    def _is_quiet(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _stop_reading_timer(self) -> None:
        if self._reading_timer is not None:
            self._reading_timer.cancel()
            self._reading_timer = None

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        # The parser tells of a header when it is whole: of one without an end, never.
        if self._in_header:
            self._unfinished_bytes += len(data)
            if self._unfinished_bytes > MAX_HEADER_BYTES:
                self._refuse(431, b"The header is larger than 16 KiB.")

    def on_message_begin(self) -> None:
        self._header_bytes = self._unfinished_bytes = 0
        self._in_header = True
        if self._timer is None:
            self._timer = self.loop.call_later(HEADER_TIMEOUT_S, self._late)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        if len(self.headers) >= MAX_HEADERS:
            self._refuse(431, b"Too many header fields.")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_header = False
        self._stop_timer()
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            super().on_message_complete()

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            self._refuse(431, b"The header is larger than 16 KiB.")

    def _late(self) -> None:
        self._timer = None
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, text: bytes) -> None:
        if self._refused:
            return
        self._refused = True
        phrase = {431: b"Request Header Fields Too Large", 503: b"Service Unavailable"}[status]
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
            % (status, phrase, len(text), text)
        )
        self.transport.close()


def bounded(**options: Any) -> dict[str, Any]:
    """uvicorn's options with ours."""
    return {
        "http": BoundedHttpProtocol,
        "ws": "none",
        "server_header": False,
        "proxy_headers": False,
        **options,
    }
