"""Typed messages over a socket between two processes of ours, without pickle.

A frame is its length (4 bytes, big-endian), the header's length (4 bytes), the header and the body. Both
lengths have limits that are checked before anything is allocated. The header is a message as JSON; an array's
place in it holds the shape, its numbers stand in the body. `codec` makes frames of messages and checks them
field by field; which messages there are is told in `messages`.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass

import numpy as np

MAX_FRAME_BYTES = 1 << 30
MAX_HEADER_BYTES = 64 << 20

_LENGTH = struct.Struct(">I")


class ChannelError(Exception):
    """What came is no frame or no message, or what should go cannot: the channel is of no further use.

    Private to this room: whoever holds the channel turns it into an error that a person can meet.
    """


class FrameTooLargeError(ChannelError):
    """A frame beyond the limits was to be sent. Nothing was written; the channel goes on."""


class ChannelClosedError(ChannelError):
    """The other end is gone."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One message as bytes that came. The body is writable, so that arrays may stand in it without a copy."""

    header: bytes
    body: memoryview


@dataclass(frozen=True, eq=False)
class Packed:
    """One message as bytes to be sent: the blobs, one after the other, become the body."""

    header: bytes
    blobs: tuple[memoryview, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the whole frame."""
        return 2 * _LENGTH.size + len(self.header) + sum(blob.nbytes for blob in self.blobs)


class Channel:
    """One end of a connected stream socket, which it owns. Any thread may send, one may receive."""

    def __init__(
        self,
        connection: socket.socket,
        *,
        max_frame: int = MAX_FRAME_BYTES,
        max_header: int = MAX_HEADER_BYTES,
    ) -> None:
        self._socket = connection
        self._max_frame = max_frame
        self._max_header = max_header
        self._sending = threading.Lock()

    def send(self, message: Packed) -> None:
        """Write one frame. Frames of several threads do not mix.

        Raises FrameTooLargeError or ChannelClosedError.
        """
        total, header_bytes = message.nbytes - _LENGTH.size, len(message.header)
        if total > self._max_frame or header_bytes > self._max_header:
            raise FrameTooLargeError(
                f"A message has {total} bytes, {header_bytes} of them header; "
                f"at most {self._max_frame} and {self._max_header} are allowed."
            )
        opening = _LENGTH.pack(total) + _LENGTH.pack(header_bytes) + message.header
        with self._sending:
            try:
                self._socket.sendall(opening)
                for blob in message.blobs:
                    self._socket.sendall(blob)
            except OSError as error:
                # Half a frame may have been written: whatever came after it would be misread.
                self.hang_up()
                raise ChannelClosedError("The other end is gone.") from error

    def receive(self) -> Frame | None:
        """The next frame, or None once the other end has closed.

        Raises ChannelError for lengths out of range and for a frame that is cut off.
        """
        first = bytearray(_LENGTH.size)
        read = self._fill(memoryview(first))
        if read == 0:
            return None
        if read < len(first):
            raise ChannelError("A frame is cut off.")
        (total,) = _LENGTH.unpack(first)
        if not _LENGTH.size <= total <= self._max_frame:
            raise ChannelError(f"A frame claims {total} bytes, {self._max_frame} are allowed.")
        (header_bytes,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if header_bytes > min(self._max_header, total - _LENGTH.size):
            raise ChannelError(f"A frame of {total} bytes claims a header of {header_bytes}.")
        header = bytes(self._exactly(header_bytes))
        return Frame(header, self._exactly(total - _LENGTH.size - header_bytes))

    def hang_up(self) -> None:
        """End the conversation, in both directions and for all threads. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back. For the receiving thread, once it has read its last frame."""
        self.hang_up()
        self._socket.close()

    def _exactly(self, count: int) -> memoryview:
        # Not bytearray, which writes zeros: pages that a false length claims are never touched.
        piece = np.empty(count, dtype=np.uint8).data
        if self._fill(piece) < count:
            raise ChannelError("A frame is cut off.")
        return piece

    def _fill(self, target: memoryview) -> int:
        """Read into all of `target`; fewer bytes come back only at the end of the stream."""
        read = 0
        while read < target.nbytes:
            try:
                count = self._socket.recv_into(target[read:])
            except OSError:
                # A reset by an end that died with bytes unread is an end like any other.
                return read
            if count == 0:
                return read
            read += count
        return read
