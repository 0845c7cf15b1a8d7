"""Images decoded and cut into tiles where it does no harm: in child processes that may be killed.

An image from outside can take any amount of memory, or break the decoder that reads it. So the process that
takes requests hands the bytes over, and gets back tiles or a reason, within limits of memory and time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from ayllu.chat.images import MAX_IMAGE_BYTES, CutImage, ImageConfig, TiledImage
from ayllu.engine.frames import read_frame, write_frame
from ayllu.engine.image_worker import MAX_TILE_BYTES, read_bytes, write_bytes
from ayllu.errors import EngineUnavailableError, ImageError, OverloadedError

MAX_SECONDS = 10.0
MAX_MEMORY_BYTES = 1 << 30
"""Half as much again as the largest image takes that is allowed: some 600 MB, three layers of 40 million
pixels with transparency and one without."""

MAX_CHILDREN = 2
MAX_WAITING = 64
START_SECONDS = 60.0


class ImageCutter:
    """Cuts images in up to MAX_CHILDREN processes, which start with the first images.

    An image that takes longer than `seconds` or more than `memory_bytes` ends its child. Every method may be
    called from any thread.
    """

    def __init__(self, *, seconds: float = MAX_SECONDS, memory_bytes: int = MAX_MEMORY_BYTES) -> None:
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        # The last to come back goes first, so that a second child starts only where two images meet.
        self._idle: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(MAX_CHILDREN):
            self._idle.put(None)
        self._state = threading.Lock()
        self._children: set[_Child] = set()
        self._waiting = 0
        self._closed = False

    def tiles(self, data: bytes, config: ImageConfig) -> TiledImage:
        """See `tile_image`. Raises ImageError, OverloadedError when too many wait, and EngineUnavailableError
        after `close` or when no child process can be started."""
        if len(data) > MAX_IMAGE_BYTES:
            raise ImageError(
                f"The image has {len(data):,} bytes; at most {MAX_IMAGE_BYTES:,} are allowed.",
                "Save it smaller or as JPEG.",
            )
        with self._state:
            if self._waiting >= MAX_WAITING:
                raise OverloadedError(f"{MAX_WAITING} images are waiting to be decoded.")
            self._waiting += 1
        try:
            child = self._idle.get()
            try:
                child = self._running(child)
                cut = child.cut(data, config, self._seconds)
            finally:
                self._idle.put(child if child is not None and child.alive else None)
        finally:
            with self._state:
                self._waiting -= 1
        if cut is None:
            self._require_open()
            memory = f"{self._memory_bytes >> 20} MiB"
            raise ImageError(
                f"Decoding the image takes more than {self._seconds:g} s or {memory}, or breaks the decoder.",
                "Save it again, smaller, as PNG or JPEG.",
            )
        return cut.normalised()

    def close(self) -> None:
        """End the child processes; what is being decoded fails. Idempotent."""
        with self._state:
            self._closed = True
            children, self._children = self._children, set()
        for child in children:
            child.end()

    def __enter__(self) -> ImageCutter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def process_ids(self) -> list[int]:
        """The children's that run."""
        return sorted(child.process_id for child in self._children if child.alive)

    def _require_open(self) -> None:
        if self._closed:
            raise EngineUnavailableError("The engine was closed.", "Start it again.")

    def _running(self, child: _Child | None) -> _Child:
        self._require_open()
        if child is not None and child.alive:
            return child
        made = _Child()
        with self._state:
            self._children = {one for one in self._children if one.alive} | {made}
            closed = self._closed
        if closed:
            made.end()
            self._require_open()
        if not made.start(self._memory_bytes):
            raise EngineUnavailableError(
                "The process that decodes images does not start.",
                "Run python -m ayllu.engine.image_worker to see why.",
            )
        return made


class _Child:
    """A child process with a clock: an image that is not cut in time kills it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            # -P: modules of the current folder must not stand in for installed ones.
            [sys.executable, "-P", "-m", "ayllu.engine.image_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._end = weakref.finalize(self, _end_process, self._process)

    @property
    def process_id(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._end.alive and self._process.poll() is None

    def end(self) -> None:
        """Kill the process and close its pipes. Idempotent."""
        self._end()

    def start(self, memory_bytes: int) -> bool:
        """Whether it is ready."""
        return self._within(START_SECONDS, lambda: self._asked({"memory_bytes": memory_bytes})) is not None

    def cut(self, data: bytes, config: ImageConfig, seconds: float) -> CutImage | None:
        """The image's tiles, None if the child died or had to be killed. Raises ImageError."""
        said: CutImage | ImageError | None = self._within(seconds, partial(self._cut, data, config))
        if isinstance(said, ImageError):
            raise said
        return said

    def _cut(self, data: bytes, config: ImageConfig) -> CutImage | ImageError | None:
        answer = self._asked({"bytes": len(data), "config": dataclasses.asdict(config)}, data)
        if answer is None or answer.get("memory"):
            return None
        if "problem" in answer:
            return ImageError(answer["problem"], answer["fix"])
        # Whoever broke the decoder speaks from here on: what is said must be an image of the right form.
        shape, rows, columns = tuple(answer["shape"]), answer["rows"], answer["columns"]
        tiles = rows * columns + (rows * columns > 1)
        if rows < 1 or columns < 1 or rows * columns > config.max_tiles:
            return None
        if shape != (tiles, config.tile_size, config.tile_size, 3):
            return None
        assert self._process.stdout is not None
        pixels = read_bytes(self._process.stdout, int(np.prod(shape)), MAX_TILE_BYTES)
        if pixels is None:
            return None
        return CutImage(np.frombuffer(pixels, np.uint8).reshape(shape), rows, columns)

    def _asked(self, question: dict[str, Any], data: bytes = b"") -> dict[str, Any] | None:
        assert self._process.stdin is not None and self._process.stdout is not None
        write_frame(self._process.stdin, question)
        if data:
            write_bytes(self._process.stdin, data)
        return read_frame(self._process.stdout)

    def _within(self, seconds: float, ask: Callable[[], Any]) -> Any:
        clock = threading.Timer(seconds, self._process.kill)
        clock.daemon = True
        clock.start()
        answer = None
        try:
            answer = ask()
        except (OSError, ValueError, KeyError, TypeError):  # a broken pipe, or words that nobody agreed on
            pass
        finally:
            clock.cancel()
        if answer is None:
            self.end()
        return answer


def _end_process(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was not sent yet has nobody to read it
                pipe.close()
