"""How values of settings are read from what a flag, the environment or a file gives: text, or a TOML value.

Each reader raises ValueError with what the value should be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args


def text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("it should be text")
    return value


def texts(value: object) -> tuple[str, ...]:
    """A list, or texts with commas between them."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ValueError("it should be a list of texts")
    return tuple(item.strip() for item in items if item.strip())


def path(value: object) -> Path:
    if not isinstance(value, str | Path):
        raise ValueError("it should be a path")
    return Path(value)


def switch(value: object) -> bool:
    """true or false; in the environment also on, off, yes, no, 1, 0."""
    words = {
        "true": True,
        "on": True,
        "yes": True,
        "1": True,
        "false": False,
        "off": False,
        "no": False,
        "0": False,
    }
    read = words.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(read, bool):
        raise ValueError("it should be true or false")
    return read


def number(low: float, high: float, *, above: bool = False) -> Callable[[object], float]:
    """A finite number from `low` (or above it) to `high`."""

    def read(value: object) -> float:
        try:
            given = float(value) if isinstance(value, str | int | float) and value is not True else math.nan
        except (ValueError, OverflowError):
            given = math.nan
        if not (low < given if above else low <= given) or not given <= high:
            raise ValueError(
                f"it should be a number {'above' if above else 'from'} {low:g} "
                f"{'and at most' if above else 'to'} {high:g}"
            )
        return given

    return read


def whole(low: int, high: int) -> Callable[[object], int]:
    """A whole number from `low` to `high`."""

    def read(value: object) -> int:
        count = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 20 else value
        if not isinstance(count, int) or isinstance(count, bool) or not low <= count <= high:
            raise ValueError(f"it should be a whole number from {low} to {high}")
        return count

    return read


_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def size(value: object) -> int:
    """Bytes, or a number with K, M, G or T behind it (powers of 1024; KiB and the like are taken too)."""
    given = value
    if isinstance(value, str):
        word = value.strip().lower().removesuffix("ib").removesuffix("b") or "?"
        digits = word.rstrip("kmgt")
        unit = _UNITS.get(word[len(digits) :])
        try:
            given = int(float(digits) * unit) if unit and len(digits) < 20 else None
        except (ValueError, OverflowError):
            given = None
    if not isinstance(given, int) or isinstance(given, bool) or not 0 < given <= 1 << 50:
        raise ValueError("it should be a size such as 8G or 512M")
    return given


def one_of(kind: Any) -> Callable[[object], str]:
    """One of the names of `kind`, a Literal."""
    names = get_args(kind)

    def read(value: object) -> str:
        if value not in names:
            raise ValueError(f"it should be {', '.join(names[:-1])} or {names[-1]}")
        return str(value)

    return read
