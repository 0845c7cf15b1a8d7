"""The safetensors container: 8 bytes of header length, a JSON header, then the tensors' bytes.

The header comes from strangers, so it is not given to a general JSON parser (a few megabytes can become
gigabytes of objects). A tokeniser for exactly this schema reads it from the mapped bytes, and every rule of
the format is checked before a tensor is handed out: no holes, overlaps or duplicates, sizes that add up.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ayllu.errors import ModelFileError, UnsupportedError
from ayllu.weights.tensors import PLAIN_ENCODINGS, MappedFile, PlainTensor

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 1 << 17
"""The reference allows 100 MB and any number. The largest real models have about 100,000 tensors a file."""
MAX_NAME_BYTES = 1024
MAX_METADATA_BYTES = 8 << 20
MAX_DIMENSIONS = 16

_BITS = {
    **{name: dtype.itemsize * 8 for name, dtype in PLAIN_ENCODINGS.items()},
    "U16": 16,
    "U32": 32,
    "U64": 64,
    "C64": 64,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""Width of every encoding of the format. Those outside PLAIN_ENCODINGS can be listed, not read."""
_ENCODINGS = tuple(_BITS)
_BITS_BY_CODE = tuple(_BITS.values())
_CODE = {name.encode(): code for code, name in enumerate(_ENCODINGS)}

_SPACE = rb"[ \t\r\n]*+"
_SPACES = re.compile(_SPACE)
_STRING = rb'"([^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+)"'
_KEY = re.compile(_SPACE + _STRING + _SPACE + rb":" + _SPACE)
_VALUE_STRING = re.compile(_STRING + _SPACE)
_INTEGER = rb"(?:0|[1-9][0-9]{0,18})"
_FIELD = re.compile(
    _SPACE
    + rb'"(dtype|shape|data_offsets)"'
    + _SPACE
    + rb":"
    + _SPACE
    + rb'(?:"([A-Z0-9_]{1,16})"|\['
    + _SPACE
    + rb"((?:%s%s,%s){0,15}%s)?" % (_INTEGER, _SPACE, _SPACE, _INTEGER)
    + _SPACE
    + rb"\])"
    + _SPACE
    + rb"([,}])"
    + _SPACE
)
_USUAL_FIELDS = {
    "dtype": rb'"dtype": ?"(?P<dtype>[A-Z0-9_]{1,16})"',
    "shape": rb'"shape": ?\[(?P<shape>[0-9, ]{0,160}+)\]',
    "data_offsets": rb'"data_offsets": ?\[(?P<begin>%s), ?(?P<end>%s)\]' % (_INTEGER, _INTEGER),
}


def _usual_entry(*order: str) -> re.Pattern[bytes]:
    name = rb'"(?P<name>[^"\\\x00-\x1f]{1,%d}+)"' % MAX_NAME_BYTES
    return re.compile(
        name + rb": ?\{" + b", ?".join(_USUAL_FIELDS[field] for field in order) + rb"\}(?P<mark>,?) ?"
    )


_USUAL_ENTRIES = (
    _usual_entry("dtype", "shape", "data_offsets"),
    _usual_entry("data_offsets", "dtype", "shape"),
)
"""An entry as the reference lays it out, and as writers that sort keys do: read at once, several times faster
than field by field. The same checks follow."""
_NUMBERS = re.compile(rb"(?:%s(?:, ?%s){0,%d})?" % (_INTEGER, _INTEGER, MAX_DIMENSIONS - 1))


class SafetensorsFile(Mapping[str, PlainTensor]):
    """An opened file: tensor names to views of the mapped bytes, in the order of the header.

    Tensors are made when asked for, so a file of many costs little to open. Raises ModelFileError if any rule
    of the format is broken; asking for a tensor of an encoding we do not read raises UnsupportedError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = MappedFile(path)
        except OSError as error:
            raise ModelFileError(path, f"cannot be opened: {error.strerror or error}") from error
        length = self._header_length()
        header = _Header(path, self._file.bytes[8 : 8 + length])
        self._data_start = 8 + length
        header.check_layout(self._file.size - self._data_start)
        self._header = header
        self.metadata: dict[str, str] = header.metadata

    def _header_length(self) -> int:
        size = self._file.size
        if size < 8:
            raise ModelFileError(
                self.path, "is too short for safetensors", expected="at least 8 bytes", got=size
            )
        length = int.from_bytes(self._file.bytes[:8].tobytes(), "little")
        if length > MAX_HEADER_BYTES:
            raise ModelFileError(
                self.path,
                "is not safetensors, or its header is too large",
                field="header length",
                offset=0,
                expected=f"at most {MAX_HEADER_BYTES}",
                got=length,
            )
        if length > size - 8:
            raise ModelFileError(
                self.path,
                "ends inside its header",
                field="header length",
                offset=0,
                expected=size - 8,
                got=length,
            )
        return length

    def __getitem__(self, name: str) -> PlainTensor:
        encoding, shape, begin, end = self._header.entry(name)
        if encoding not in PLAIN_ENCODINGS:
            raise UnsupportedError(
                f"{self.path}: tensor {name} is stored as {encoding}, which ayllu does not read.",
                "Use a copy of the model in BF16, F16 or F32.",
            )
        start = self._data_start + begin
        raw = self._file.bytes[start : start + end - begin]
        values = raw.view(PLAIN_ENCODINGS[encoding]).reshape(shape)
        return PlainTensor(values, self._file, (start, end - begin))

    def __contains__(self, name: object) -> bool:
        return name in self._header.index

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.index)

    def __len__(self) -> int:
        return len(self._header.index)


class _Header:
    """The parsed header, as columns rather than objects: `index` maps a name to its row."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path = path
        self.index: dict[str, int] = {}
        self.metadata: dict[str, str] = {}
        self._buffer = data.data
        self._codes = array("B")
        self._begins, self._ends = array("q"), array("q")
        self._shapes, self._shape_ends = array("q"), array("q")
        self._parse()
        self._buffer.release()

    def entry(self, name: str) -> tuple[str, tuple[int, ...], int, int]:
        """(encoding, shape, begin, end) of a tensor; KeyError for an unknown name."""
        row = self.index[name]
        first = self._shape_ends[row - 1] if row else 0
        shape = tuple(self._shapes[first : self._shape_ends[row]])
        return _ENCODINGS[self._codes[row]], shape, self._begins[row], self._ends[row]

    def check_layout(self, data_bytes: int) -> None:
        """Tensors must tile the data exactly: no hole, no overlap, nothing before or after."""
        begins, ends = np.array(self._begins, np.int64), np.array(self._ends, np.int64)
        order = np.lexsort((ends, begins))
        begins, ends = begins[order], ends[order]
        expected = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(begins)]
        wrong = np.flatnonzero(begins != expected)
        if len(wrong):
            at = int(wrong[0])
            name = list(self.index)[int(order[at])]
            what = "overlaps another tensor" if begins[at] < expected[at] else "leaves a hole before it"
            raise ModelFileError(
                self.path, what, field=name, expected=f"data offset {expected[at]}", got=int(begins[at])
            )
        last = int(ends[-1]) if len(ends) else 0
        if last != data_bytes:
            problem = "is cut short" if last > data_bytes else "has bytes after its last tensor"
            raise ModelFileError(
                self.path, problem, field="data", expected=f"{last} bytes", got=f"{data_bytes} bytes"
            )

    def _fail(
        self, reason: str, at: int, field: str | None = None, *, expected: object = None, got: object = None
    ) -> NoReturn:
        raise ModelFileError(
            self.path, reason, field=field or "header", offset=8 + at, expected=expected, got=got
        )

    def _parse(self) -> None:
        if len(self._buffer) == 0 or self._buffer[0] != ord("{"):
            self._fail("is not safetensors: its header does not start with '{'", 0)
        at, seen_metadata = self._skip_space(1), False
        if self._byte(at) == "}":
            return self._end(at + 1)
        while True:
            at = self._usual_entries(at)
            start = at
            name, at = self._key(at)
            if self._byte(at) != "{":
                self._fail("has an entry that is not an object", at, name)
            if name == "__metadata__":
                if seen_metadata:
                    self._fail("names an entry twice", start, name)
                seen_metadata, at = True, self._metadata(at + 1)
            else:
                if name in self.index:
                    self._fail("names a tensor twice", start, name)
                if len(self.index) >= MAX_TENSORS:
                    self._fail("has too many tensors", start, expected=f"at most {MAX_TENSORS}")
                at = self._tensor(name, at + 1)
                self.index[name] = len(self.index)
            mark = self._byte(at)
            if mark == "}":
                return self._end(at + 1)
            if mark != ",":
                self._fail("is not valid JSON here", at)
            at += 1

    def _usual_entries(self, at: int) -> int:
        """Take as many entries of one usual layout as follow each other, but for the last of the header: the
        general path takes that, as it knows how headers end. The position of the first not taken."""
        index = self.index
        for pattern in _USUAL_ENTRIES:
            while (found := pattern.match(self._buffer, at)) is not None:
                raw, encoding, shape, begin, end, mark = found.group(
                    "name", "dtype", "shape", "begin", "end", "mark"
                )
                code = _CODE.get(encoding)
                if code is None or not mark or raw == b"__metadata__" or _NUMBERS.fullmatch(shape) is None:
                    return at
                if len(index) >= MAX_TENSORS:
                    return at
                name = self._text(raw, at)
                if name in index:
                    return at
                self._add(name, at, code, shape, begin, end)
                index[name] = len(index)
                at = found.end()
        return at

    def _tensor(self, name: str, at: int) -> int:
        """Read the fields of one tensor from just after its '{'; the position after its '}' and spaces."""
        start = at
        code: int | None = None
        shape: bytes | None = None
        offsets: bytes | None = None
        while True:
            found = _FIELD.match(self._buffer, at)
            if found is None:
                self._fail("has a tensor entry that is not dtype, shape and data_offsets", at, name)
            key, text, numbers, mark = found.groups()
            if (text is None) != (key != b"dtype"):
                self._fail(f"has the wrong type of value for {key.decode()}", at, name)
            if key == b"dtype":
                if code is not None:
                    self._fail("names dtype twice", at, name)
                code = _CODE.get(text)
                if code is None:
                    self._fail("has an unknown dtype", at, name, got=text.decode())
            elif key == b"shape":
                if shape is not None:
                    self._fail("names shape twice", at, name)
                shape = numbers or b""
            else:
                if offsets is not None:
                    self._fail("names data_offsets twice", at, name)
                offsets = numbers or b""
            at = found.end()
            if mark == b"}":
                break
        if code is None or shape is None or offsets is None:
            self._fail("has a tensor without dtype, shape or data_offsets", start, name)
        begin, comma, end = offsets.partition(b",")
        if not comma or b"," in end:
            self._fail("data_offsets must be two numbers", start, name)
        self._add(name, start, code, shape, begin, end)
        return at

    def _add(
        self, name: str, at: int, code: int, shape_text: bytes, begin_text: bytes, end_text: bytes
    ) -> None:
        shape = [int(size) for size in shape_text.split(b",")] if shape_text else []
        begin, end = int(begin_text), int(end_text)
        if not begin <= end < 1 << 62:
            self._fail("data_offsets are not in order", at, name, got=f"{begin}, {end}")
        bits = math.prod(shape) * _BITS_BY_CODE[code]
        if bits != (end - begin) * 8:
            self._fail(
                "data_offsets do not match shape and dtype", at, name, expected=bits / 8, got=end - begin
            )
        if bits == 0 and any(size >= 1 << 62 for size in shape):
            self._fail("has an impossible shape", at, name, got=shape)
        self._codes.append(code)
        self._begins.append(begin)
        self._ends.append(end)
        self._shapes.extend(shape)
        self._shape_ends.append(len(self._shapes))

    def _metadata(self, at: int) -> int:
        start = at
        if self._byte(self._skip_space(at)) == "}":
            return self._skip_space(self._skip_space(at) + 1)
        while True:
            key, at = self._key(at)
            found = _VALUE_STRING.match(self._buffer, at)
            if found is None:
                self._fail("has metadata that is not text", at, key)
            if key in self.metadata:
                self._fail("names a metadata key twice", at, key)
            if found.end() - start > MAX_METADATA_BYTES:
                self._fail("has too much metadata", at, expected=f"at most {MAX_METADATA_BYTES} bytes")
            self.metadata[key] = self._text(found.group(1), at)
            at = found.end()
            mark = self._byte(at)
            if mark == "}":
                return self._skip_space(at + 1)
            if mark != ",":
                self._fail("is not valid JSON here", at)
            at += 1

    def _key(self, at: int) -> tuple[str, int]:
        found = _KEY.match(self._buffer, at)
        if found is None:
            self._fail("is not valid JSON here", at)
        raw = found.group(1)
        if len(raw) > MAX_NAME_BYTES:
            self._fail("has a name that is too long", at, expected=f"at most {MAX_NAME_BYTES}", got=len(raw))
        return self._text(raw, at), found.end()

    def _text(self, raw: bytes, at: int) -> str:
        try:
            text = raw.decode("utf-8")
            if "\\" in text:
                text = str(json.loads(f'"{text}"'))
                text.encode("utf-8")
        except ValueError:
            self._fail("has text that is not valid UTF-8", at)
        return text

    def _skip_space(self, at: int) -> int:
        found = _SPACES.match(self._buffer, at)
        return found.end() if found is not None else at

    def _byte(self, at: int) -> str:
        return chr(self._buffer[at]) if at < len(self._buffer) else ""

    def _end(self, at: int) -> None:
        if self._skip_space(at) != len(self._buffer):
            self._fail("has something after its header", at)
