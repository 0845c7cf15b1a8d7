"""The process in which `ImageCutter` decodes images: python -m ayllu.engine.image_worker.

Decoders of pictures are large and written in C, and what they read comes from strangers. It reads images from
standard input, decodes and cuts each under limits that the system enforces, and answers on standard output.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import IO, Any

from ayllu.chat.images import MAX_IMAGE_BYTES, CutImage, ImageConfig, cut_image
from ayllu.engine.frames import read_frame, write_frame
from ayllu.errors import ImageError

MAX_TILE_BYTES = 1 << 28


def write_bytes(stream: IO[bytes], data: bytes) -> None:
    """Send bytes whose number the frame before has told."""
    stream.write(data)
    stream.flush()


def read_bytes(stream: IO[bytes], count: int, limit: int) -> bytes | None:
    """Bytes sent so, None at the end of the stream or where they are more than `limit`."""
    if not 0 <= count <= limit:
        return None
    data = stream.read(count)
    return data if len(data) == count else None


def _limit(memory_bytes: int) -> None:
    """Allow this much beyond what is in use now, where the system can. The cutter's clock limits the time."""
    try:
        mapped = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        import resource
    except (OSError, ImportError):
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = mapped + memory_bytes
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _verdict(data: bytes, config: ImageConfig) -> tuple[dict[str, Any], CutImage | None]:
    try:
        cut = cut_image(data, config)
    except ImageError as error:
        return {"problem": error.problem, "fix": error.fix}, None
    except MemoryError:
        return {"memory": True}, None
    return {"rows": cut.rows, "columns": cut.columns, "shape": cut.tiles.shape}, cut


def main() -> None:
    """Answer until the other side closes the pipe."""
    # A Ctrl-C in the terminal is for the process that asks; this one ends when its input does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    start = read_frame(requests)
    if start is None:
        return
    from PIL import Image

    Image.init()  # every decoder's library is mapped before memory is limited
    _limit(start["memory_bytes"])
    write_frame(answers, {"ready": True})
    while (request := read_frame(requests)) is not None:
        data = read_bytes(requests, request["bytes"], MAX_IMAGE_BYTES)
        if data is None:
            return
        said, cut = _verdict(data, ImageConfig(**request["config"]))
        write_frame(answers, said)
        if cut is not None:
            write_bytes(answers, cut.tiles.tobytes())


if __name__ == "__main__":
    main()
