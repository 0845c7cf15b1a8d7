"""The GGUF container, read: metadata and tensors of a file, memory-mapped.

A file is not believed: every count, size and offset is held against the file's real size before anything
is allocated or touched, and what the header may cost in memory and time is bounded. Layout: the GGUF
specification (ggml `docs/gguf.md`), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ayllu.errors import ModelFileError, UnsupportedError
from ayllu.text_array import TextArray
from ayllu.weights.gguf_blocks import BLOCK_TYPES, PLAIN_TYPES, READABLE_TYPES, BlockType, QuantisedTensor
from ayllu.weights.gguf_strings import short_string_lengths, string_lengths
from ayllu.weights.tensors import PLAIN_ENCODINGS, Array, MappedFile, PlainTensor, StoredTensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

MAX_ALIGNMENT = 1 << 20
MAX_TENSORS = 1 << 15
MAX_KEYS = 1 << 15
MAX_KEY_BYTES = 65_535
MAX_TENSOR_NAME_BYTES = 64
MAX_DIMENSIONS = 4
MAX_STRING_BYTES = 1 << 21
MAX_STRINGS = 1_200_000
HEADER_BUDGET = 48 << 20
"""Bytes of memory for a header's strings, beyond the part of the file that has not been touched yet."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

STRING_TYPE, ARRAY_TYPE = 8, 9
SCALAR_TYPES: dict[int, tuple[str, struct.Struct]] = {
    0: ("UINT8", struct.Struct("<B")),
    1: ("INT8", struct.Struct("<b")),
    2: ("UINT16", struct.Struct("<H")),
    3: ("INT16", struct.Struct("<h")),
    4: ("UINT32", struct.Struct("<I")),
    5: ("INT32", struct.Struct("<i")),
    6: ("FLOAT32", struct.Struct("<f")),
    7: ("BOOL", struct.Struct("<?")),
    10: ("UINT64", struct.Struct("<Q")),
    11: ("INT64", struct.Struct("<q")),
    12: ("FLOAT64", struct.Struct("<d")),
}
"""Value type code -> its name in the specification and how one value is packed."""

TYPE_NAMES = {code: name for code, (name, _) in SCALAR_TYPES.items()} | {8: "STRING", 9: "ARRAY"}
TYPE_CODES = {name: code for code, name in TYPE_NAMES.items()}

_SMALLEST_KEY_VALUE = 8 + 1 + 4 + 1
_SMALLEST_TENSOR_INFO = 8 + 1 + 4 + 8 + 4 + 8
_SMALLEST_STRING_IN_MEMORY = 8 + sys.getsizeof("")
_STRINGS_WINDOW = 1 << 17
_STRINGS_AT_A_TIME = 1 << 15
_WORTH_IT = 256
_LONGEST_ASCII_LENGTH = 127


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` is row-major (GGUF stores it reversed), `offset` from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """An opened GGUF file. Metadata values are bool, int, float, str, TextArray or a read-only numpy array;
    `value_types` tells their stored types ("UINT32", "STRING", or "ARRAY:STRING")."""

    path: Path
    version: int
    alignment: int
    metadata: dict[str, Any]
    value_types: dict[str, str]
    infos: dict[str, TensorInfo]
    data_offset: int
    _file: MappedFile = field(repr=False)

    def tensor(self, name: str) -> StoredTensor:
        """The named tensor, a view of the map. Raises UnsupportedError for a format that is not read."""
        info = self.infos[name]
        span = (info.offset, info.nbytes)
        raw = self._file.bytes[info.offset : info.offset + info.nbytes]
        if info.kind.name in PLAIN_TYPES:
            array = raw.view(PLAIN_ENCODINGS[info.kind.name]).reshape(info.shape)
            return PlainTensor(array, self._file, span)
        if info.kind.decode is None:
            raise UnsupportedError(
                f"{self.path}, tensor {name}: the number format {info.kind.name} is not read.",
                f"Fetch this model in one of {', '.join(READABLE_TYPES)}.",
            )
        row_bytes = info.shape[-1] // info.kind.elements * info.kind.nbytes
        return QuantisedTensor(info.kind, info.shape, raw.reshape(-1, row_bytes), self._file, span)


def read_gguf(path: Path) -> GgufFile:
    """Open and check a GGUF file.

    Raises ModelFileError with field, offset, expected and got for anything that contradicts itself or the
    file's size, UnsupportedError for versions and byte orders that are not read.
    """
    try:
        file = MappedFile(path)
    except (OSError, ValueError) as error:
        raise ModelFileError(path, f"cannot be opened: {error}", fix="Check the path.") from None
    return _Header(path, file).read()


class _Header:
    """Walks a header once, from its first byte to the start of the data."""

    def __init__(self, path: Path, file: MappedFile) -> None:
        self.path = path
        self.file = file
        self.size = file.size
        self.view = file.bytes.data
        self.position = 0
        self.spent = 0
        self.strings_left = MAX_STRINGS

    def fail(
        self, reason: str, field: str, offset: int, expected: object = None, got: object = None
    ) -> NoReturn:
        raise ModelFileError(self.path, reason, field=field, offset=offset, expected=expected, got=got)

    def take(self, length: int, field: str) -> int:
        """Step over `length` bytes, which must exist, and return where they start."""
        start = self.position
        if length > self.size - start:
            self.fail("the file ends too early", field, start, f"{length} bytes", self.size - start)
        self.position = start + length
        return start

    def u32(self, field: str) -> int:
        """The next four bytes as an unsigned number."""
        return int(_U32.unpack_from(self.view, self.take(4, field))[0])

    def u64(self, field: str) -> int:
        """The next eight bytes as an unsigned number."""
        return int(_U64.unpack_from(self.view, self.take(8, field))[0])

    @property
    def budget(self) -> int:
        """Bytes of memory that the rest of the header may still take."""
        return HEADER_BUDGET + self.size - self.position - self.spent

    def spend(self, amount: int, field: str, offset: int) -> None:
        """Take `amount` bytes off the budget; `field` is refused where that is not enough."""
        if amount > self.budget:
            self.fail("the header takes too much memory", field, offset)
        self.spent += amount

    def string(self, field: str, longest: int) -> str:
        at = self.position
        length = self.u64(field)
        if length > longest:
            self.fail("a string is too long", field, at, f"at most {longest} bytes", length)
        start = self.take(length, field)
        try:
            text = str(self.view[start : start + length], "utf-8")
        except UnicodeDecodeError:
            self.fail("a string is not UTF-8", field, start)
        self.spend(sys.getsizeof(text), field, start)
        return text

    def read(self) -> GgufFile:
        version = self.version()
        tensor_count = self.count("tensor count", MAX_TENSORS, _SMALLEST_TENSOR_INFO)
        key_count = self.count("key count", MAX_KEYS, _SMALLEST_KEY_VALUE)
        metadata: dict[str, Any] = {}
        value_types: dict[str, str] = {}
        alignment = DEFAULT_ALIGNMENT
        for index in range(key_count):
            at = self.position
            key = self.string(f"key {index}", MAX_KEY_BYTES)
            if not key:
                self.fail("a key is empty", f"key {index}", at)
            if key in metadata:
                self.fail("a key appears twice", key, at)
            metadata[key], value_types[key] = self.value(key)
            if key == "general.alignment":
                alignment = self.alignment(metadata[key], value_types[key], at)
        headers = self.tensor_headers(tensor_count)
        data_offset = -(-self.position // alignment) * alignment
        infos = self.tensors(headers, alignment, data_offset)
        return GgufFile(self.path, version, alignment, metadata, value_types, infos, data_offset, self.file)

    def version(self) -> int:
        magic = bytes(self.view[: self.take(4, "magic") + 4])
        if magic != MAGIC:
            self.fail("this is not a GGUF file", "magic", 0, MAGIC, magic)
        version = self.u32("version")
        if version and version & 0xFFFF == 0:
            raise UnsupportedError(
                f"{self.path}: this GGUF file is big-endian.", "Fetch the little-endian file of this model."
            )
        if version == 1 or version > VERSIONS[-1]:
            raise UnsupportedError(
                f"{self.path}: GGUF version {version} is not read, only {VERSIONS[0]} and {VERSIONS[1]}.",
                "Fetch a current file of this model.",
            )
        if version not in VERSIONS:
            self.fail("the version is impossible", "version", 4, VERSIONS, version)
        return version

    def count(self, field: str, limit: int, smallest: int) -> int:
        at = self.position
        count = self.u64(field)
        most = min(limit, (self.size - self.position) // smallest)
        if count > most:
            self.fail("a count is too large for this file", field, at, f"at most {most}", count)
        return count

    def value(self, key: str) -> tuple[Any, str]:
        """The value under `key`, and the name of its stored type."""
        at = self.position
        code = self.u32(key)
        if code == STRING_TYPE:
            return self.string(key, MAX_STRING_BYTES), "STRING"
        if code == ARRAY_TYPE:
            return self.array(key)
        if code not in SCALAR_TYPES:
            self.fail("the value type is unknown", key, at, "0 to 12", code)
        name, packing = SCALAR_TYPES[code]
        start = self.take(packing.size, key)
        if name == "BOOL" and self.view[start] > 1:
            self.fail("a truth value is neither 0 nor 1", key, start, got=self.view[start])
        return packing.unpack_from(self.view, start)[0], name

    def array(self, key: str) -> tuple[Any, str]:
        at = self.position
        code = self.u32(key)
        length_at = self.position
        length = self.u64(key)
        if code == STRING_TYPE:
            return self.strings(key, length, length_at), "ARRAY:STRING"
        if code == ARRAY_TYPE:
            self.fail("arrays inside arrays are not part of any model", key, at)
        if code not in SCALAR_TYPES:
            self.fail("the array's element type is unknown", key, at, "0 to 12", code)
        name, packing = SCALAR_TYPES[code]
        if length > (self.size - self.position) // packing.size:
            self.fail(
                "an array is longer than the file", key, length_at, f"at most {self.size} bytes", length
            )
        start = self.take(length * packing.size, key)
        stored = self.file.bytes[start : self.position]
        if name == "BOOL":
            if stored.size and stored.max() > 1:
                self.fail("a truth value is neither 0 nor 1", key, start)
            return stored.view(np.bool_), "ARRAY:BOOL"
        return stored.view(np.dtype(packing.format)), f"ARRAY:{name}"

    def strings(self, key: str, length: int, length_at: int) -> TextArray:
        """An array of `length` strings, piece by piece so that what one may cost is known before the next."""
        most = min(
            self.strings_left, (self.size - self.position) // 8, self.budget // _SMALLEST_STRING_IN_MEMORY
        )
        if length > most:
            self.fail(
                "an array has too many strings for this file", key, length_at, f"at most {most}", length
            )
        self.strings_left -= length
        pieces: list[Array] = [np.empty(0, np.int32)]
        first, found = self.position, 0
        while found < length:
            start = self.position
            lengths = self._strings_piece(key, min(length - found, _STRINGS_AT_A_TIME))
            if not len(lengths):
                self.fail("a string runs past the end of the file or is too long", key, start)
            self.spend(self._strings_cost(start, lengths), key, start)
            pieces.append(lengths.astype(np.int32))
            found += len(lengths)
        return _texts(self.file.bytes[first : self.position], np.concatenate(pieces))

    def _strings_piece(self, key: str, count: int) -> Array:
        """Lengths of up to `count` strings, as many as lie whole within the next window of bytes."""
        start = self.position
        window = self.file.bytes[start : start + _STRINGS_WINDOW]
        lengths = short_string_lengths(window, count)
        if len(lengths) < min(count, _WORTH_IT):
            lengths = string_lengths(window, count)
        if not len(lengths):
            lengths = string_lengths(self.file.bytes[start : start + 8 + MAX_STRING_BYTES], 1)
        self.position = start + 8 * len(lengths) + int(lengths.sum())
        self._require_utf8(key, start, lengths)
        return lengths

    def _strings_cost(self, start: int, lengths: Array) -> int:
        """Bytes that these strings take once somebody asks for them; here they stay in the file."""
        # Mostly there is room for the worst case, four bytes a letter; only else is it worth measuring.
        worst = 96 * len(lengths) + 4 * (self.position - start)
        if worst <= self.budget:
            return worst
        texts = _texts(self.file.bytes[start : self.position], lengths)
        return 8 * len(lengths) + sum(map(sys.getsizeof, texts))

    def _require_utf8(self, key: str, start: int, lengths: Array) -> None:
        """All at once: with plain ASCII between them, texts are valid together exactly if each one is."""
        window = self.file.bytes[start : self.position]
        long = np.flatnonzero(lengths > _LONGEST_ASCII_LENGTH)
        if len(long):
            window = window.copy()
            window[((np.cumsum(lengths + 8) - lengths - 8)[long, None] + np.arange(8)).ravel()] = 0
        try:
            str(window.data, "utf-8")
        except UnicodeDecodeError:
            self.fail("a string is not UTF-8", key, start)

    def alignment(self, value: Any, kind: str, at: int) -> int:
        if kind != "UINT32":
            self.fail("the alignment has the wrong type", "general.alignment", at, "UINT32", kind)
        if not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            self.fail(
                "the alignment is not a power of two within bounds",
                "general.alignment",
                at,
                f"1 to {MAX_ALIGNMENT}",
                value,
            )
        return int(value)

    def tensor_headers(self, count: int) -> list[tuple[str, tuple[int, ...], BlockType, int, int]]:
        """Name, row-major shape, format, relative offset and header position of each tensor."""
        headers = []
        names = set()
        for index in range(count):
            at = self.position
            name = self.string(f"name of tensor {index}", MAX_TENSOR_NAME_BYTES)
            field = f"tensor {name}" if name else f"tensor {index}"
            if not name:
                self.fail("a tensor has no name", field, at)
            if name in names:
                self.fail("a tensor appears twice", field, at)
            names.add(name)
            shape = self.shape(field)
            code_at = self.position
            code = self.u32(field)
            if code not in BLOCK_TYPES:
                self.fail("the tensor's number format is unknown", field, code_at, got=code)
            headers.append((name, shape, BLOCK_TYPES[code], self.u64(field), at))
        return headers

    def shape(self, field: str) -> tuple[int, ...]:
        at = self.position
        dimensions = self.u32(field)
        if not 0 < dimensions <= MAX_DIMENSIONS:
            self.fail("wrong number of dimensions", field, at, f"1 to {MAX_DIMENSIONS}", dimensions)
        sizes = struct.unpack_from(f"<{dimensions}Q", self.view, self.take(8 * dimensions, field))
        if 0 in sizes:
            self.fail("the tensor is empty", field, at, "sizes of at least 1", sizes)
        return tuple(reversed(sizes))

    def tensors(
        self,
        headers: list[tuple[str, tuple[int, ...], BlockType, int, int]],
        alignment: int,
        data_offset: int,
    ) -> dict[str, TensorInfo]:
        """The tensors, every one of them whole, aligned and alone on its bytes."""
        infos: dict[str, TensorInfo] = {}
        available = self.size - data_offset
        for name, shape, kind, relative, at in headers:
            field = f"tensor {name}"
            if shape[-1] % kind.elements:
                self.fail(
                    f"rows do not fill the blocks of {kind.name}",
                    field,
                    at,
                    f"a multiple of {kind.elements}",
                    shape[-1],
                )
            nbytes = kind.nbytes
            for size in (shape[-1] // kind.elements, *shape[:-1]):
                nbytes *= size
                if nbytes > self.size:
                    self.fail("the tensor is larger than the file", field, at, f"{self.size} bytes", shape)
            if relative % alignment:
                self.fail(
                    "the tensor's offset is not aligned", field, at, f"a multiple of {alignment}", relative
                )
            if relative + nbytes > available:
                self.fail(
                    "the tensor lies outside the file",
                    field,
                    at,
                    f"an end within {max(available, 0)} bytes of data",
                    relative + nbytes,
                )
            infos[name] = TensorInfo(name, shape, kind, data_offset + relative, nbytes)
        ordered = sorted(infos.values(), key=lambda info: info.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                self.fail(f"overlaps tensor {before.name}", f"tensor {after.name}", after.offset)
        return infos


def _texts(data: Array, lengths: Array) -> TextArray:
    """Texts that stand in `data` one after the other, each behind the eight bytes of its length."""
    steps = np.append(np.array(8, lengths.dtype), lengths[:-1] + 8)[: len(lengths)]
    starts = np.cumsum(steps, dtype=np.int32 if len(data) < 1 << 31 else np.int64)
    return TextArray(data, starts, lengths)
