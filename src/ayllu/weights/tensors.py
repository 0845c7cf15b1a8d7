"""Tensors as files hold them: shape, encoding and a view of the mapped bytes. Needs no torch.

A `StoredTensor` never copies until asked. Plain ones (floats, integers) give their array as a view;
block-quantised ones (GGUF) decode a few rows at a time into a caller's buffer, so that nobody ever
holds a second copy of a model.
"""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ayllu.errors import ModelFileError

Array = NDArray[Any]
Floats = NDArray[np.float32]

PLAIN_ENCODINGS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Encodings whose bytes are the numbers, by their safetensors names."""

ENCODING_OF_DTYPE = {dtype: name for name, dtype in PLAIN_ENCODINGS.items()}


class MappedFile:
    """A file mapped read-only. `release` gives pages back to the system once they have been read:
    otherwise the resident memory of a load would be the model plus its file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.size = file.seek(0, 2)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
        self.bytes: NDArray[np.uint8] = (
            np.frombuffer(self._map, dtype=np.uint8) if self._map is not None else np.empty(0, np.uint8)
        )

    def release(self, offset: int, length: int) -> None:
        """Drop the resident pages wholly inside [offset, offset + length). Reading them again works."""
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (offset + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


class StoredTensor(ABC):
    """One tensor of a checkpoint. `shape` is in row-major order, the last axis contiguous in memory."""

    shape: tuple[int, ...]
    encoding: str

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes in this encoding."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Length of the last-axis rows laid under each other: all axes but the last, multiplied."""
        return self.elements // self.shape[-1] if self.shape and self.shape[-1] else 0

    @abstractmethod
    def decode_rows(self, start: int, stop: int) -> Floats:
        """Rows [start, stop) as float32, shape [stop - start, last axis]. A new array."""

    def decode_rows_into(self, start: int, stop: int, out: Floats) -> None:
        """Rows [start, stop) as float32 into `out` of that shape, for callers that keep one buffer."""
        out[...] = self.decode_rows(start, stop)

    def decode(self) -> Floats:
        """The whole tensor as float32, in its own shape. Meant for small tensors and tests."""
        if not self.shape:
            return self.decode_rows(0, 1).reshape(())
        return self.decode_rows(0, self.rows).reshape(self.shape)

    def release(self) -> None:
        """Give back the file pages behind this tensor. It can still be read again."""


class PlainTensor(StoredTensor):
    """Numbers stored as they are. `array` may be any view, strided ones included."""

    def __init__(
        self, array: Array, file: MappedFile | None = None, span: tuple[int, int] | None = None
    ) -> None:
        self.array = array
        self.shape = tuple(array.shape)
        self.encoding = ENCODING_OF_DTYPE[array.dtype]
        self._file, self._span = file, span

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes)

    def view(self, array: Array) -> PlainTensor:
        """`array`, a view into this tensor's own array, as a tensor of the same file."""
        return PlainTensor(array, self._file, self._span)

    def decode_rows(self, start: int, stop: int) -> Floats:
        if self.array.ndim <= 1:
            return self.array.reshape(1, -1)[start:stop].astype(np.float32)
        if self.array.ndim == 2:
            return self.array[start:stop].astype(np.float32)
        # A strided view of three axes cannot be flattened without a copy: take rows entry by entry.
        per_entry = self.rows // self.shape[0]
        pieces = [np.empty((0, self.shape[-1]), np.float32)]
        for index in range(start // per_entry, -(-stop // per_entry)):
            entry = self.array[index].reshape(per_entry, -1) if self.array.ndim > 3 else self.array[index]
            first = index * per_entry
            pieces.append(entry[max(start - first, 0) : stop - first].astype(np.float32))
        return np.concatenate(pieces)

    def release(self) -> None:
        if self._file is not None and self._span is not None:
            self._file.release(*self._span)


class JoinedTensor(StoredTensor):
    """Several tensors read as one: joined along an axis, or stacked along a new first one.

    For layouts that split what the model holds whole: one file entry per expert, one slice per shard.
    """

    def __init__(self, parts: Sequence[StoredTensor], axis: int | None) -> None:
        first = parts[0]
        self.parts = tuple(parts)
        self.axis = axis
        self.encoding = first.encoding
        if axis is None:
            self.shape = (len(parts), *first.shape)
        else:
            total = sum(part.shape[axis] for part in parts)
            self.shape = (*first.shape[:axis], total, *first.shape[axis + 1 :])
        for part in parts:
            same = (
                part.shape == first.shape
                if axis is None
                else part.shape[:axis] + part.shape[axis + 1 :]
                == first.shape[:axis] + first.shape[axis + 1 :]
            )
            if not same or part.encoding != first.encoding:
                raise ModelFileError(
                    "checkpoint",
                    "parts of one tensor do not fit together",
                    expected=f"{first.encoding} {first.shape}",
                    got=f"{part.encoding} {part.shape}",
                )

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def combine_rows(self, start: int, stop: int, read: Callable[[StoredTensor, int, int], Array]) -> Array:
        """Rows [start, stop), put together from what `read(part, first, last)` gives of each part's rows."""
        if self.axis is not None and self.axis == len(self.shape) - 1:
            return np.concatenate([read(part, start, stop) for part in self.parts], axis=1)
        # Rows run through the parts in turn, once for every entry of the axes before the joined one.
        turns = math.prod(self.shape[: self.axis or 0])
        pieces = []
        offset = 0
        for turn in range(turns):
            for part in self.parts:
                rows = part.rows // turns
                low, high = max(start, offset), min(stop, offset + rows)
                if low < high:
                    first = turn * rows - offset
                    pieces.append(read(part, first + low, first + high))
                offset += rows
        return np.concatenate(pieces)

    def decode_rows(self, start: int, stop: int) -> Floats:
        return self.combine_rows(start, stop, lambda part, first, last: part.decode_rows(first, last))

    def release(self) -> None:
        for part in self.parts:
            part.release()
