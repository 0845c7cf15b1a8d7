"""A mixture's experts in a file of their own, packed once and mapped read-only: only chosen ones are read.

The system's page cache is the cache of hot experts; nothing else holds them, so a model larger than memory
answers. The file belongs to the user's cache: it is made again whenever its header is not, to the byte, what
the checkpoint calls for. Layout: magic, version, sizes and SHA-256 of the index, the index as JSON, then the
stacks of experts from a page border on. Needs no torch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import stat
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import platformdirs
from filelock import FileLock

from ayllu.engine.memory_plan import size_text
from ayllu.engine.packed_weights import expert_stacks, matrix_sources
from ayllu.errors import AylluError, NoSpaceError
from ayllu.kernels.native.library import (
    FORMAT_CODES,
    PackedMatrix,
    PackJob,
    pack,
    pack_matrix,
    packed_bytes,
    stored_row_bytes,
)
from ayllu.progress import SILENT, Progress, Task
from ayllu.weights.checkpoint import Checkpoint
from ayllu.weights.new_file import new_file, write_failure
from ayllu.weights.tensors import StoredTensor

MAGIC = b"AYLLUPKX"
VERSION = 1
PAGE = 4096
MAX_INDEX_BYTES = 16 << 20
_HEADER = struct.Struct("<8sIIQ32s")
"""Magic, version, bytes of the index, bytes of the file, SHA-256 of the index."""


@dataclass(frozen=True)
class Stack:
    """`count` packed matrices [rows, cols], one per expert, from byte `offset` of the data on."""

    name: str
    encoding: str
    count: int
    rows: int
    cols: int
    offset: int

    @property
    def nbytes(self) -> int:
        return self.count * packed_bytes(self.encoding, self.rows, self.cols)


@dataclass(frozen=True)
class Layout:
    """What the file of a checkpoint must be. header: its first bytes, padded to whole pages."""

    stacks: tuple[Stack, ...]
    header: bytes

    @property
    def nbytes(self) -> int:
        return len(self.header) + _data_bytes(self.stacks)


def default_folder() -> Path:
    """Where packed files are kept: in the user's cache folder, which may be emptied at any time."""
    return Path(platformdirs.user_cache_dir("ayllu", appauthor=False)) / "packed"


def mapped_experts(
    checkpoint: Checkpoint, *, threads: int, folder: Path | None = None, progress: Progress = SILENT
) -> dict[str, PackedMatrix]:
    """The experts of a checkpoint by their parameter names, mapped from their file, which is made if needed.

    Their numbers are not hashed here, as those of no model file are. Making the file holds one matrix of one
    expert in memory at a time; of several processes one makes it and the others wait.
    Raises NoSpaceError for a disk that is too small, UsageError for a folder that cannot be written.
    """
    path = (default_folder() if folder is None else folder) / file_name(checkpoint)
    layout = layout_of(checkpoint)
    found = _opened(path, layout)
    if found is not None:
        return found
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise _failure(path, error) from error
    try:
        found = _opened(path, layout)
        if found is None:
            _make(path, layout, checkpoint, threads, progress)
            found = _opened(path, layout)
    finally:
        lock.release()
    if found is None:
        raise AylluError(f"{path} changed while it was opened.", "Try again.")
    return found


def file_name(checkpoint: Checkpoint) -> str:
    """One name for one place of a model: when the model there changes, its file is replaced."""
    source = str(checkpoint.path.resolve())
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", checkpoint.path.stem)[:80]
    return f"{plain}-{hashlib.sha256(source.encode()).hexdigest()[:16]}.packed"


def layout_of(checkpoint: Checkpoint) -> Layout:
    """Where everything is, and the key of what it was made from and how."""
    stacks: list[Stack] = []
    for name, stored in expert_stacks(checkpoint):
        count, (rows, cols) = math.prod(stored.shape[:-2]), stored.shape[-2:]
        stacks.append(Stack(name, stored.encoding, count, rows, cols, _data_bytes(stacks)))
    index = json.dumps(
        {
            "source": str(checkpoint.path.resolve()),
            "key": _key(checkpoint, {stack.encoding for stack in stacks}),
            "stacks": [asdict(stack) for stack in stacks],
        },
        sort_keys=True,
    ).encode()
    size = _whole_pages(_HEADER.size + len(index))
    start = _HEADER.pack(
        MAGIC, VERSION, len(index), size + _data_bytes(stacks), hashlib.sha256(index).digest()
    )
    return Layout(tuple(stacks), (start + index).ljust(size, b"\0"))


def _data_bytes(stacks: tuple[Stack, ...] | list[Stack]) -> int:
    return _whole_pages(stacks[-1].offset + stacks[-1].nbytes) if stacks else 0


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _key(checkpoint: Checkpoint, encodings: set[str]) -> str:
    """SHA-256 of what the packed bytes depend on: names, sizes and times of the source's files, and how each
    encoding is packed."""
    path = checkpoint.path
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("config.json")])
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    packing = [(encoding, _packing_fingerprint(encoding)) for encoding in sorted(encodings)]
    return hashlib.sha256(json.dumps([str(path.resolve()), facts, packing]).encode()).hexdigest()


def _packing_fingerprint(encoding: str) -> str:
    """A hash of a small packed matrix: changes when `formats.h` does, with no number that one may forget."""
    rows, cols = 33, 1024
    size = stored_row_bytes(encoding, cols)
    assert size is not None, encoding
    stored = np.resize(np.arange(251, dtype=np.uint8), (rows, size))
    packed = pack_matrix(encoding, stored, cols)
    memory = packed.owner.array  # type: ignore[attr-defined]  # pack_matrix gives it memory of its own
    return hashlib.sha256(memory[: packed.nbytes].tobytes()).hexdigest()


def _opened(path: Path, layout: Layout) -> dict[str, PackedMatrix] | None:
    """The file mapped, if it is there, this user's own, and of exactly this layout."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return None
        if status.st_size != layout.nbytes or os.pread(descriptor, len(layout.header), 0) != layout.header:
            return None
        mapping = mmap.mmap(descriptor, layout.nbytes, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    if hasattr(mmap, "MADV_RANDOM"):
        # Else the system reads on into the next expert, which is probably not the one chosen next.
        mapping.madvise(mmap.MADV_RANDOM)
    # The array holds the mapping, and matrices hold the array.
    array = np.frombuffer(mapping, np.uint8)
    start = array.ctypes.data + len(layout.header)
    return {
        stack.name: PackedMatrix(stack.encoding, stack.rows, stack.cols, start + stack.offset, array)
        for stack in layout.stacks
    }


def _make(path: Path, layout: Layout, checkpoint: Checkpoint, threads: int, progress: Progress) -> None:
    """Write the file; it takes its name when it is whole. Only for the holder of the lock."""
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        partial.unlink(missing_ok=True)  # of a process that was killed
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)  # not what is needed, and its space may be
    _remove_orphans(path.parent)
    _require_space(path, layout)
    stored = dict(expert_stacks(checkpoint))
    with (
        progress.task(f"Packing the experts of {checkpoint.path.name}, once", layout.nbytes) as task,
        new_file(path) as file,
    ):
        try:
            os.fchmod(file.fileno(), 0o600)
            _reserve(file, layout.nbytes)
            _write(file, layout.header, 0)
            for stack in layout.stacks:
                place = len(layout.header) + stack.offset
                _write_stack(file, place, stack, stored[stack.name], threads, task)
            file.truncate(layout.nbytes)
        except OSError as error:
            raise _failure(path, error) from error


def _write_stack(
    file: BinaryIO, place: int, stack: Stack, stored: StoredTensor, threads: int, task: Task
) -> None:
    """Pack the experts of a stack one by one, behind each other from byte `place` on."""
    size = packed_bytes(stack.encoding, stack.rows, stack.cols)
    packed = np.empty(size, np.uint8)
    for source in matrix_sources(stored):
        job = PackJob(
            *(FORMAT_CODES[stack.encoding], stack.rows, stack.cols, 0),
            *(source.ctypes.data, source.strides[0], packed.ctypes.data),
        )
        pack([job], threads)
        _write(file, packed.data, place)
        place += size
        task.advance(size)
    stored.release()


def _write(file: BinaryIO, data: bytes | memoryview, place: int) -> None:
    """All of `data` at byte `place`. Not through a buffer, which would try a failed write once more."""
    left = memoryview(data)
    while left:
        count = os.pwrite(file.fileno(), left, place)
        left, place = left[count:], place + count


def _require_space(path: Path, layout: Layout) -> None:
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return  # the write will tell
    if free < layout.nbytes:
        raise NoSpaceError(
            f"The packed experts take {size_text(layout.nbytes)} in {path.parent}, "
            f"{size_text(free)} is free there.",
            _ELSEWHERE,
        )


def _reserve(file: BinaryIO, nbytes: int) -> None:
    """Take the disk space at once, where the file system can: better than failing after minutes."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


_ELSEWHERE = "Free some space, or let XDG_CACHE_HOME name a folder on a larger disk."


def _failure(path: Path, error: OSError) -> AylluError:
    """What to raise when the packed file cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpaceError(f"{path.parent} has no room for the packed experts.", _ELSEWHERE)
    return write_failure(path, error)


def _remove_orphans(folder: Path) -> None:
    """Remove packed files whose model is gone: they are large, and nobody would."""
    for path in folder.glob("*.packed"):
        source = _source_of(path)
        if source is not None and not Path(source).exists():
            with contextlib.suppress(OSError):
                path.unlink()


def _source_of(path: Path) -> str | None:
    """The model that a packed file says it was made from; None where it is not one that we know to read."""
    try:
        with path.open("rb") as file:
            magic, version, length, _, digest = _HEADER.unpack(file.read(_HEADER.size))
            if magic != MAGIC or version != VERSION or length > MAX_INDEX_BYTES:
                return None
            index = file.read(length)
        if hashlib.sha256(index).digest() != digest:
            return None
        found = json.loads(index)
    except (OSError, struct.error, ValueError):
        return None
    source = found.get("source") if isinstance(found, Mapping) else None
    return source if isinstance(source, str) else None
