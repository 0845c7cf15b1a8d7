"""Frozen dataclasses as bytes and back: JSON whose every field is checked on arrival, arrays behind it.

A class is its own schema: what a field may hold is read off its annotation when the first such message
passes, so that a process which has just started pays for no message it never sends. (A validation library
costs 0.15 s of start in each of the two processes; these are ours, and their messages few.)
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Annotated, Any, Generic, Literal, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from ayllu.engine.channel import ChannelError, Frame, Packed
from ayllu.errors import AylluError, clip

MAX_DIMENSIONS = 8
LONGEST_DIMENSION = 1 << 32


@dataclass(frozen=True)
class Behind:
    """Marks an array whose numbers, of this kind, travel behind the header; in it stands the shape."""

    kind: type[np.generic]


Float32Array = Annotated[NDArray[np.float32], Behind(np.float32)]
Int32Array = Annotated[NDArray[np.int32], Behind(np.int32)]

Message = TypeVar("Message")

_Blobs = list[memoryview]
_Writer = Callable[[Any, _Blobs], Any]
_Reader = Callable[[Any, "_Body"], Any]


class _NotAMessageError(Exception):
    """What came differs from its annotation; the text says where and how."""


class _Body:
    """The numbers behind a header, handed out in order."""

    def __init__(self, body: memoryview) -> None:
        self._body = body
        self._taken = 0

    def take(self, shape: object, kind: type[np.generic]) -> NDArray[Any]:
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
            raise _NotAMessageError("an array's place holds no shape")
        if not all(type(size) is int and 0 <= size <= LONGEST_DIMENSION for size in shape):
            raise _NotAMessageError("a shape holds something else than sizes")
        size = math.prod(shape) * np.dtype(kind).itemsize
        if size > self._body.nbytes - self._taken:
            raise _NotAMessageError("an array is longer than the body")
        piece = self._body[self._taken : self._taken + size]
        self._taken += size
        return np.frombuffer(piece, dtype=kind).reshape(shape)

    def require_end(self) -> None:
        if self._taken != self._body.nbytes:
            raise ChannelError(f"{self._body.nbytes - self._taken} bytes of a message belong to no array.")


class Codec(Generic[Message]):
    """Messages of one type (a union of dataclasses told apart by their field `kind`) to bytes and back.

    Fields may hold text, whole numbers, numbers, truth values, None, bytes, literals, unions of these, other
    dataclasses, lists, tuples, frozensets and mappings of them, and arrays marked `Behind`.
    """

    def __init__(self, union: Any) -> None:
        self._kinds: dict[str, type[Any]] = {kind.kind: kind for kind in typing.get_args(union)}

    def pack(self, message: Message) -> Packed:
        """Raises ChannelError for text that is not Unicode, the one thing JSON cannot hold."""
        blobs: _Blobs = []
        try:
            plain = _dataclass_writer(type(message))(message, blobs)
            header = json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode()
        except (TypeError, ValueError) as error:
            raise ChannelError(f"A message cannot be written: {clip(error)}") from error
        return Packed(header, tuple(blobs))

    def unpack(self, frame: Frame) -> Message:
        """Raises ChannelError for whatever is no such message."""
        body = _Body(frame.body)
        try:
            plain = _parsed(frame.header)
            name = plain.get("kind") if isinstance(plain, dict) else None
            kind = self._kinds.get(name) if isinstance(name, str) else None
            if kind is None:
                raise _NotAMessageError(f"kind: {clip(repr(name), 40)} is none of {', '.join(self._kinds)}")
            message: Message = _dataclass_reader(kind)(plain, body)
        except _NotAMessageError as error:
            raise ChannelError(f"A frame holds no message: {clip(error, 300)}.") from error
        except AylluError as error:
            # From dataclasses that check themselves.
            raise ChannelError(f"A frame holds no message: {error.problem}") from error
        except RecursionError as error:
            raise ChannelError("A frame holds no message: it nests too deeply.") from error
        body.require_end()
        return message


_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89abAB]|\\u[dD][c-fC-F]")


def _parsed(header: bytes) -> Any:
    """The JSON of a header. Its text is Unicode: half a character could not be passed on."""
    try:
        plain = json.loads(header.decode())
        # Half characters can come as escapes alone, which `pack` never writes but text may look like.
        if _SURROGATE_ESCAPE.search(header):
            json.dumps(plain, ensure_ascii=False).encode()
    except ValueError as error:
        raise _NotAMessageError(f"the header is no JSON: {clip(error)}") from error
    return plain


def _new_dataclass_writer(kind: type[Any]) -> _Writer:
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = [(f.name, _writer(hints[f.name]), f.default is None) for f in dataclasses.fields(kind)]

    def write(value: Any, blobs: _Blobs) -> dict[str, Any]:
        if type(value) is not kind:
            raise TypeError(f"{type(value).__name__} stands where {kind.__name__} belongs")
        plain: dict[str, Any] = {}
        for name, writer, may_be_left_out in fields:
            item = getattr(value, name)
            if item is None and may_be_left_out:
                continue
            plain[name] = item if writer is None else writer(item, blobs)
        return plain

    return write


def _new_dataclass_reader(kind: type[Any]) -> _Reader:
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(kind)
    readers = {field.name: _reader(hints[field.name]) for field in fields}
    required = {f.name for f in fields if f.default is MISSING and f.default_factory is MISSING}

    def read(plain: Any, body: _Body) -> Any:
        if type(plain) is not dict:
            _refuse(plain, kind.__name__)
        values: dict[str, Any] = {}
        for name, item in plain.items():
            reader = readers.get(name)
            if reader is None:
                raise _NotAMessageError(f"{clip(name, 40)}: {kind.__name__} has no such field")
            try:
                values[name] = reader(item, body)
            except _NotAMessageError as error:
                raise _NotAMessageError(f"{name}.{error}") from None
        if not required <= values.keys():
            raise _NotAMessageError(f"{min(required - values.keys())}: missing in {kind.__name__}")
        try:
            return kind(**values)
        except ValueError as error:
            raise _NotAMessageError(str(error)) from error

    return read


# Looked up when a message needs them, not when another class is read: a class may hold others of itself.
_dataclass_writer: Callable[[Any], _Writer] = cache(_new_dataclass_writer)
_dataclass_reader: Callable[[Any], _Reader] = cache(_new_dataclass_reader)


def _refuse(plain: object, wanted: str) -> NoReturn:
    raise _NotAMessageError(f"{clip(repr(plain), 40)} stands where {wanted} belongs")


def _writer(hint: Any) -> _Writer | None:
    """What makes plain JSON of a value; None where it is that already."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SCALARS or hint in (None, type(None)) or origin is Literal:
        return None
    if hint is bytes:
        return lambda value, blobs: base64.b64encode(value).decode("ascii")
    if origin is Annotated and isinstance(arguments[1], Behind):
        return _array_writer(arguments[1].kind)
    if dataclasses.is_dataclass(hint):
        return lambda value, blobs: _dataclass_writer(hint)(value, blobs)
    if origin in (typing.Union, types.UnionType):
        return _union_writer(arguments)
    if origin in (list, tuple, frozenset):
        item = _writer(arguments[0])
        if item is None:
            return (lambda value, blobs: list(value)) if origin is frozenset else None
        return lambda value, blobs: [item(one, blobs) for one in value]
    if origin in (dict, Mapping):
        value_writer = _writer(arguments[1])
        if value_writer is None:
            return lambda value, blobs: dict(value)
        return lambda value, blobs: {key: value_writer(one, blobs) for key, one in value.items()}

    def refuse(value: Any, blobs: _Blobs) -> NoReturn:
        raise TypeError(f"a {type(value).__name__} cannot be sent")

    return refuse


def _union_writer(members: tuple[Any, ...]) -> _Writer | None:
    writers = [writer for member in members if (writer := _writer(member)) is not None]
    if not writers:
        return None
    assert len(writers) == 1, f"of {members}, more than one needs its own writing"
    (only,) = writers
    return lambda value, blobs: None if value is None else only(value, blobs)


def _array_writer(kind: type[np.generic]) -> _Writer:
    def write(value: Any, blobs: _Blobs) -> list[int]:
        array = np.ascontiguousarray(value, dtype=kind)
        blobs.append(array.reshape(-1).view(np.uint8).data)
        return list(value.shape)

    return write


_SCALARS: dict[Any, tuple[type[Any], ...]] = {str: (str,), int: (int,), float: (float, int), bool: (bool,)}
"""What JSON may hold where these are annotated. A truth value is no number, a number no truth value."""


def _reader(hint: Any) -> _Reader:
    """What checks a value that came as plain JSON, and makes of it what the annotation says."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SCALARS or hint in (None, type(None)):
        return _scalar_reader((hint,))
    if hint is bytes:
        return _read_bytes
    if origin is Literal:
        return _literal_reader(arguments)
    if origin is Annotated and isinstance(arguments[1], Behind):
        kind = arguments[1].kind
        return lambda plain, body: body.take(plain, kind)
    if dataclasses.is_dataclass(hint):
        return lambda plain, body: _dataclass_reader(hint)(plain, body)
    if origin in (typing.Union, types.UnionType):
        return _union_reader(arguments)
    if origin in (list, tuple, frozenset):
        return _sequence_reader(origin, _reader(arguments[0]))
    if origin in (dict, Mapping):
        return _mapping_reader(arguments[0], _reader(arguments[1]))
    return lambda plain, body: _refuse(plain, "nothing that can be sent")


def _scalar_reader(hints: tuple[Any, ...]) -> _Reader:
    allowed = {kind for hint in hints for kind in _SCALARS.get(hint, (type(None),))}
    only_float = float in hints and int not in hints
    wanted = " or ".join("null" if hint in (None, type(None)) else hint.__name__ for hint in hints)

    def read(plain: Any, body: _Body) -> Any:
        if type(plain) not in allowed:
            _refuse(plain, wanted)
        if only_float and type(plain) is int:
            try:
                return float(plain)
            except OverflowError:
                _refuse(plain, wanted)
        return plain

    return read


def _literal_reader(values: tuple[Any, ...]) -> _Reader:
    def read(plain: Any, body: _Body) -> Any:
        if not any(type(plain) is type(value) and plain == value for value in values):
            _refuse(plain, f"one of {values}")
        return plain

    return read


def _read_bytes(plain: Any, body: _Body) -> bytes:
    try:
        return base64.b64decode(plain.encode("ascii"), validate=True)
    except (AttributeError, UnicodeEncodeError, binascii.Error):
        _refuse(plain, "base64")


def _union_reader(members: tuple[Any, ...]) -> _Reader:
    scalars = tuple(member for member in members if member in _SCALARS or member in (None, type(None)))
    others = [member for member in members if member not in scalars]
    scalar = _scalar_reader(scalars)
    if not others:
        return scalar
    assert len(others) == 1 and set(scalars) <= {type(None)}, f"JSON cannot tell {members} apart"
    other = _reader(others[0])
    return lambda plain, body: None if plain is None else other(plain, body)


def _sequence_reader(kind: type[Any], item: _Reader) -> _Reader:
    def read(plain: Any, body: _Body) -> Any:
        if type(plain) is not list:
            _refuse(plain, "a list")
        try:
            return kind([item(one, body) for one in plain])
        except TypeError:
            _refuse(plain, "a list of what can be in a set")

    return read


def _mapping_reader(key_kind: Any, item: _Reader) -> _Reader:
    def read_key(key: str) -> Any:
        # JSON has text keys alone.
        if key_kind is str:
            return key
        if not re.fullmatch(r"-?[0-9]{1,18}", key):
            _refuse(key, "a whole number")
        return int(key)

    def read(plain: Any, body: _Body) -> Any:
        if type(plain) is not dict:
            _refuse(plain, "an object")
        return {read_key(key): item(one, body) for key, one in plain.items()}

    return read
