"""Small JSON files beside a model (config.json, indexes), read within bounds.

A few megabytes of `[[],[],...` would become gigabytes of Python objects, and duplicate keys or NaN mean
different things to different readers: here values are counted before parsing, and the other two refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from ayllu.errors import ModelFileError, clip

MAX_VALUES = 100_000
_OPENERS = (b"[", b"{", b",")


def read_json_object(path: Path, *, max_bytes: int, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises ModelFileError when it is missing, larger than `max_bytes`, holds more than `max_values` values,
    is not strict JSON, names a key twice, or is nested too deeply.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ModelFileError(path, "is too large", expected=f"at most {max_bytes} bytes", got=size)
        with path.open("rb") as file:
            data = file.read(size)
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror or error}") from error
    # Each value but the first follows a comma or opens inside a bracket; text can only raise the count.
    values = 1 + sum(data.count(opener) for opener in _OPENERS)
    if values > max_values:
        raise ModelFileError(path, "holds too many values", expected=f"at most {max_values}", got=values)
    return parse_json_object(data, path)


def parse_json_object(data: bytes, path: Path) -> dict[str, Any]:
    """As `read_json_object`, for bytes whose size and number of values are known to be harmless."""

    def refuse_constant(name: str) -> NoReturn:
        raise ModelFileError(path, "holds a number that is not finite", got=name)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise ModelFileError(path, "names a key twice", field=clip(key))
                seen.add(key)
        return found

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse_constant, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, f"is not valid JSON: {clip(error)}") from error
    if not isinstance(value, dict):
        raise ModelFileError(path, "does not hold a JSON object", got=type(value).__name__)
    return value
