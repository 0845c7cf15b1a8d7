"""What a source is asked for and what it hands back, shared by all kinds of source.

A source fills files inside a folder that survives interruption; the store checks, moves and publishes them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from ayllu.errors import NoSpaceError
from ayllu.progress import SILENT, Progress

BLOCK_BYTES = 1 << 20
SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Limits:
    """How patient a transfer is. All times in seconds."""

    connect_s: float = 5.0
    stall_s: float = 30.0
    attempts: int = 5
    backoff_s: float = 0.5
    longest_backoff_s: float = 15.0
    pip_stall_s: float = 300.0


@dataclass(frozen=True)
class Pinned:
    """What the catalogue promises about a single-file model. None where nothing is pinned."""

    sha256: str | None = None
    size_bytes: int | None = None


@dataclass(frozen=True)
class Order:
    """One request to a source: where it may write, what must come out, how to report.

    `folder` is private to this model and kept between runs. `unreachable` remembers hosts that did not
    answer (address -> reason), so that one command waits for a dead host once.
    """

    folder: Path
    pinned: Pinned = Pinned()
    progress: Progress = SILENT
    limits: Limits = Limits()
    label: str = "model"
    unreachable: dict[str, str] = field(default_factory=dict)


class Intake(Enum):
    """How a fetched file gets from where it lies into the store."""

    MOVE = "it is ours: rename it"
    LINK_OR_COPY = "it is a person's file: hard link, or copy when it is on another disk"
    LINK_OR_POINT = "the hub cache keeps it: hard link, or symbolic link when the cache is on another disk"


@dataclass(frozen=True)
class Fetched:
    """One verified file, and how the store takes it in. `licence` is what its source says of the model's."""

    name: str
    path: Path
    size_bytes: int
    sha256: str
    intake: Intake = Intake.MOVE
    licence: str | None = None


class Source(Protocol):
    """Somewhere a model can come from."""

    @property
    def text(self) -> str:
        """The source as a person writes it, e.g. `hf:org/name`."""

    def suggested_name(self) -> str:
        """A model name for the store, made from the source."""

    def fetch(self, order: Order) -> list[Fetched]:
        """Bring the model's files. Raises SourceError, IntegrityError, NoSpaceError, UnsupportedError."""


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, in hexadecimal, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    for block in blocks_of(path):
        digest.update(block)
        if on_bytes:
            on_bytes(len(block))
    return digest.hexdigest()


def git_blob_id(path: Path) -> str:
    """The id git gives to this content (SHA-1 over a header and the bytes): how a hub names small files."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    for block in blocks_of(path):
        digest.update(block)
    return digest.hexdigest()


def blocks_of(path: Path) -> Iterator[bytes]:
    """The content of a file in blocks of at most 1 MiB."""
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise NoSpaceError, with both figures, unless `folder`'s disk has `needed_bytes` and a little spare."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + SPARE_BYTES:
        raise NoSpaceError(
            f"{folder} needs {gigabytes(needed_bytes + SPARE_BYTES)}, but only {gigabytes(free)} are free.",
            "Free some space, choose a smaller model, or set AYLLU_STORE to a folder on a larger disk.",
        )


@contextmanager
def full_disk_is_typed(folder: Path) -> Iterator[None]:
    """Turn the system's disk-full errors inside the block into NoSpaceError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"The disk holding {folder} is full.",
                "Free some space; the next pull continues where this stopped.",
            ) from error
        raise


def gigabytes(count: int) -> str:
    """`count` bytes for a person: decimal MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1_000_000_000 else f"{count / 1e6:.1f} MB"


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
