"""The GGUF container, written: header first, then every tensor a block of rows at a time.

The file appears under its name only when it is complete. A tensor already stored in the wanted format is
passed on byte for byte; others are decoded and encoded in pieces, so memory never depends on the model.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ayllu.errors import NoSpaceError, UnsupportedError, clip
from ayllu.progress import SILENT, Progress
from ayllu.text_array import TextArray
from ayllu.weights.gguf import (
    ARRAY_TYPE,
    DEFAULT_ALIGNMENT,
    MAGIC,
    SCALAR_TYPES,
    STRING_TYPE,
    TYPE_CODES,
    VERSIONS,
)
from ayllu.weights.gguf_blocks import BLOCK_TYPE_NAMED, PLAIN_TYPES, BlockType, QuantisedTensor, encode_blocks
from ayllu.weights.new_file import new_file, write_failure
from ayllu.weights.tensors import PLAIN_ENCODINGS, Array, Floats, PlainTensor, StoredTensor

PIECE_ELEMENTS = 1 << 20
"""Numbers converted and written at a time."""

_CODE_OF_DTYPE = {
    np.dtype(packing.format if name != "BOOL" else np.bool_): code
    for code, (name, packing) in SCALAR_TYPES.items()
}


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor under its GGUF name, and the format ("F16", "Q8_0", ...) it is to be written in.

    `reorder` gives the tensor its rows in another order. It runs when the tensor's turn comes, so that only
    one reordered copy exists at a time.
    """

    name: str
    source: StoredTensor
    encoding: str
    reorder: Callable[[StoredTensor], StoredTensor] | None = None

    @property
    def kind(self) -> BlockType:
        return BLOCK_TYPE_NAMED[self.encoding]

    @property
    def nbytes(self) -> int:
        return self.source.elements // self.kind.elements * self.kind.nbytes


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorToWrite],
    progress: Progress = SILENT,
) -> int:
    """Write a GGUF version 3 file and return its size in bytes. An existing file is replaced at the end.

    Metadata values: bool, str, int (UINT32 where it fits), float (FLOAT32), lists of str, numpy scalars and
    arrays (in their own type). Raises UnsupportedError for what the formats cannot hold, NoSpaceError, and
    UsageError when `path` cannot be written.
    """
    _check(tensors)
    header = _header(metadata, tensors)
    total = len(header) + sum(_padded(tensor.nbytes) for tensor in tensors)
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise write_failure(path, error) from error
    if total > free:
        raise NoSpaceError(
            f"{path} needs {total / 1e9:.2f} GB, {free / 1e9:.2f} GB is free.",
            "Free some space, or write elsewhere.",
        )
    with new_file(path) as file, progress.task(f"Writing {path.name}", total) as task:
        file.write(header)
        task.advance(len(header))
        for tensor in tensors:
            for piece in encoded_pieces(tensor):
                file.write(piece.data)
                task.advance(piece.nbytes)
            padding = _padded(tensor.nbytes) - tensor.nbytes
            file.write(bytes(padding))
            task.advance(padding)
            tensor.source.release()
    return total


def encoded_pieces(tensor: TensorToWrite) -> Iterator[Array]:
    """The tensor's bytes in its format, as contiguous arrays of a few million bytes at most."""
    source = tensor.source if tensor.reorder is None else tensor.reorder(tensor.source)
    passed_on = source.encoding == tensor.encoding
    rows_at_a_time = max(1, PIECE_ELEMENTS // source.shape[-1])
    if isinstance(source, QuantisedTensor) and passed_on:
        planes = [source.raw]
    elif isinstance(source, PlainTensor):
        planes = _planes(source.array)
    else:
        for start in range(0, source.rows, rows_at_a_time):
            stop = min(start + rows_at_a_time, source.rows)
            yield _encoded(tensor, source.decode_rows(start, stop))
        return
    for plane in planes:
        for start in range(0, len(plane), rows_at_a_time):
            rows = np.ascontiguousarray(plane[start : start + rows_at_a_time])
            yield rows.view(np.uint8) if passed_on else _encoded(tensor, rows.astype(np.float32))


def _planes(array: Array) -> list[Array]:
    """`array` as matrices, each a view: flattening a strided stack of experts would copy all of it."""
    if array.ndim <= 2:
        return [array.reshape(-1, array.shape[-1])]
    return [plane for entry in array for plane in _planes(entry)]


def _encoded(tensor: TensorToWrite, rows: Floats) -> Array:
    kind = tensor.kind
    try:
        with np.errstate(over="raise", invalid="raise"):
            if kind.name in PLAIN_TYPES:
                return np.ascontiguousarray(rows.astype(PLAIN_ENCODINGS[kind.name])).view(np.uint8)
            return encode_blocks(kind, rows)
    except FloatingPointError:
        raise UnsupportedError(
            f"Tensor {tensor.name} holds numbers that {kind.name} cannot express (too large or NaN).",
            "Write BF16 or F32 instead.",
        ) from None


def _check(tensors: Sequence[TensorToWrite]) -> None:
    for tensor in tensors:
        kind = BLOCK_TYPE_NAMED.get(tensor.encoding)
        passed_on = tensor.source.encoding == tensor.encoding
        if kind is None or not (passed_on or kind.name in PLAIN_TYPES or kind.encode is not None):
            raise UnsupportedError(
                f"Tensor {tensor.name} cannot be written as {tensor.encoding}.",
                "Formats written: F32, F16, BF16, Q8_0, Q4_0, Q4_1.",
            )
        if not tensor.source.shape or tensor.source.shape[-1] % kind.elements:
            raise UnsupportedError(
                f"Tensor {tensor.name} has rows that do not fill {kind.name} blocks of {kind.elements}.",
                "Use F16.",
            )


def _padded(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _header(metadata: Mapping[str, Any], tensors: Sequence[TensorToWrite]) -> bytes:
    out = bytearray(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _string(key)
        out += _typed(key, value)
    offset = 0
    for tensor in tensors:
        shape = tensor.source.shape[::-1]
        out += _string(tensor.name)
        out += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.kind.code, offset)
        offset += _padded(tensor.nbytes)
    return bytes(out.ljust(_padded(len(out)), b"\0"))


def _string(text: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise UnsupportedError(
            f"GGUF cannot hold the text {clip(ascii(text))}.", "Remove its lone surrogates."
        ) from None
    return struct.pack("<Q", len(data)) + data


def _typed(key: str, value: Any) -> bytes:
    """A metadata value with its type code before it."""
    if isinstance(value, str):
        return struct.pack("<I", STRING_TYPE) + _string(value)
    if isinstance(value, TextArray | list | tuple) and all(isinstance(text, str) for text in value):
        head = struct.pack("<IIQ", ARRAY_TYPE, STRING_TYPE, len(value))
        return head + b"".join(map(_string, value))
    if isinstance(value, bool):
        return struct.pack("<I?", TYPE_CODES["BOOL"], value)
    if isinstance(value, int):
        for name in ("UINT32", "INT32", "UINT64", "INT64"):
            try:
                return struct.pack("<I", TYPE_CODES[name]) + SCALAR_TYPES[TYPE_CODES[name]][1].pack(value)
            except struct.error:
                continue
    if isinstance(value, float) and not isinstance(value, np.generic):
        return struct.pack("<If", TYPE_CODES["FLOAT32"], value)
    if isinstance(value, np.ndarray | np.generic) and value.dtype.newbyteorder("<") in _CODE_OF_DTYPE:
        code = _CODE_OF_DTYPE[value.dtype.newbyteorder("<")]
        data = value.astype(value.dtype.newbyteorder("<")).tobytes()
        if isinstance(value, np.generic):
            return struct.pack("<I", code) + data
        if value.ndim == 1:
            return struct.pack("<IIQ", ARRAY_TYPE, code, value.size) + data
    raise UnsupportedError(
        f"GGUF cannot hold the metadata value of {key}, a {type(value).__name__}.",
        "Use text, numbers or arrays.",
    )
