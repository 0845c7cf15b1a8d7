"""What passes between the program and its surroundings: answers out, images and text in, all bounded."""

from __future__ import annotations

import sys
from pathlib import Path

from ayllu.chat.images import MAX_IMAGE_BYTES
from ayllu.errors import ImageError, UsageError

MAX_PIPED_BYTES = 64 << 20

# A model can be talked into writing escape sequences, which would move the cursor or fill the clipboard.
_SHOWN = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def write_answer(piece: str) -> None:
    """Write a piece of an answer; on a terminal its control characters are made visible."""
    sys.stdout.write(piece.translate(_SHOWN) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def read_image(path: Path) -> bytes:
    """The bytes of an image file. Raises ImageError when it cannot be read or is too large."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from error
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageError(f"{path} is larger than {MAX_IMAGE_BYTES:,} bytes.", "Make the image smaller.")
    return data


def read_pipe() -> bytes:
    """Everything on standard input. Raises UsageError beyond a size no context window holds."""
    data = sys.stdin.buffer.read(MAX_PIPED_BYTES + 1)
    if len(data) > MAX_PIPED_BYTES:
        raise UsageError(f"The input is larger than {MAX_PIPED_BYTES >> 20} MiB.", "Give less text.")
    return data
