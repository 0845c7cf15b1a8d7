"""Paths that a person typed: a mistake in one is a mistake of theirs, and is said as such."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ayllu.errors import UsageError, clip


def expanded(text: str | Path) -> Path:
    """`text` as a path, with `~` and `~user` replaced by the home folder. It need not exist.

    Raises UsageError for an unknown user, and for what the system takes as no path or does not let us see.
    """
    try:
        path = Path(text).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (RuntimeError, OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UsageError(
            f"{clip(repr(str(text)), 80)} is not a usable path: {reason.rstrip('.')}.", "Check its spelling."
        ) from error
    return path
