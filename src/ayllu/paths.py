"""Paths that a person typed."""

from __future__ import annotations

from pathlib import Path

from ayllu.errors import UsageError


def expanded(text: str | Path) -> Path:
    """`text` as a path, with `~` and `~user` replaced by the home folder.

    Raises UsageError for an unknown user and for text that no system takes as a path.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except (RuntimeError, OSError, ValueError) as error:
        raise UsageError(
            f"{str(text)[:80]!r} is not a usable path: {error}.", "Check its spelling."
        ) from error
    return path
