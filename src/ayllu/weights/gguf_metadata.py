"""Typed access to the metadata of a GGUF file, where every value is a stranger's claim.

What is missing, of another type or out of bounds becomes an error that names the key, never a default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np

from ayllu.errors import ModelFileError, UnsupportedError
from ayllu.model.config import MAX_LAYERS
from ayllu.text_array import TextArray


class Metadata:
    """Typed reading of metadata. Missing, mistyped or impossible values raise ModelFileError with the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def fail(self, key: str, expected: object, got: object) -> NoReturn:
        raise ModelFileError(
            self.path, "the metadata does not describe a model", field=key, expected=expected, got=got
        )

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str):
            self.fail(key, "text", described(value))
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, "true or false", described(value))
        return value

    def integer(self, key: str, largest: int, *, smallest: int = 1, default: int | None = None) -> int:
        """A whole number within bounds, or an array that holds the same one for every layer."""
        value = self.values.get(key, default)
        if isinstance(value, np.ndarray) and value.size and value.dtype.kind in "iu":
            if value.size > MAX_LAYERS or (value != value[0]).any():
                raise UnsupportedError(
                    f"{self.path}: {key} differs between layers.",
                    "Models whose layers differ so are not read.",
                )
            value = int(value[0])
        if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value <= largest:
            self.fail(key, f"a whole number from {smallest} to {largest}", described(value))
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number. float32 values come back as the shortest decimal that means them: 1e-05, not
        9.999999747378752e-06, so that a config read back equals the one written."""
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            self.fail(key, "a finite number", described(value))
        with np.errstate(over="ignore"):
            single = np.float32(value)
        return float(str(single)) if float(single) == value else float(value)

    def numbers(self, key: str, count: int, kinds: str) -> list[Any]:
        """An array of exactly `count` numbers of numpy kinds `kinds`."""
        value = self.values.get(key)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or value.size != count:
            self.fail(key, f"an array of {count}", described(value))
        return cast(list[Any], value.tolist())


def described(value: object) -> str:
    """A metadata value in the words of an error message: an array by its length, not its contents."""
    if value is None:
        return "nothing"
    if isinstance(value, list | np.ndarray | TextArray):
        return f"an array of {len(value)}"
    return repr(value)
