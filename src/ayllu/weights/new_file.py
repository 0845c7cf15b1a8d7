"""Files that appear whole or not at all: written beside their place and renamed into it."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ayllu.errors import AylluError, NoSpaceError, UsageError


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends well, and otherwise leaves nothing behind."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def write_failure(path: Path, error: OSError) -> AylluError:
    """What to raise when the system refuses to write `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(f"The disk holding {path} is full.", "Free some space, or choose another target.")
    return UsageError(f"{path} cannot be written: {error.strerror or error}.", "Choose another target.")
