"""Typed reading of a config.json: each getter checks the kind of one value and names it when it is wrong.

As in transformers, an absent key takes the default of its model type, and null counts as absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ayllu.errors import ModelFileError, UnsupportedError, clip


class Fields:
    """One JSON object of a config. `prefix` is its place in the file, as `rope_scaling.`."""

    def __init__(self, values: Mapping[str, Any], file: Path, prefix: str = "") -> None:
        self.values = values
        self.file = file
        self.prefix = prefix

    def given(self, key: str) -> bool:
        """Whether the key has a value other than null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; without a default the key is required."""
        value = self._value(key, default)
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            self.fail(key, "a whole number", value)
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number; without a default the key is required."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.fail(key, "a number", value)
        if (isinstance(value, int) and abs(value) > 10**300) or not math.isfinite(value):
            self.fail(key, "a finite number", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false; whole numbers other than 0 are true (Llama 4 ships `attn_temperature_tuning: 4`)."""
        value = self._value(key, default)
        if not isinstance(value, int):
            self.fail(key, "true or false", value)
        return bool(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string; without a default the key is required."""
        value = self._value(key, default)
        if not isinstance(value, str):
            self.fail(key, "text", value)
        return value

    def integers(self, key: str, at_most: int) -> list[int] | None:
        """A list of whole numbers (or booleans), None when absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > at_most:
            self.fail(key, f"a list of at most {at_most} whole numbers", value)
        for item in value:
            if not isinstance(item, int):
                self.fail(key, "a list of whole numbers", value)
        return [int(item) for item in value]

    def texts(self, key: str, at_most: int) -> list[str] | None:
        """A list of strings, None when absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > at_most:
            self.fail(key, f"a list of at most {at_most} strings", value)
        for item in value:
            if not isinstance(item, str):
                self.fail(key, "a list of strings", value)
        return list(value)

    def nested(self, key: str) -> Fields | None:
        """An object inside this one, None when absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(key, "an object", value)
        return Fields(value, self.file, f"{self.prefix}{key}.")

    def _value(self, key: str, default: object) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ModelFileError(self.file, "a required value is missing", field=self.prefix + key)
            return default
        return value

    def fail(self, key: str, expected: str, got: object) -> NoReturn:
        """Refuse the value of `key`."""
        shown = clip(repr(got)[:200], 60) if not isinstance(got, int) else f"{str(got)[:40]}"
        raise ModelFileError(
            self.file, "has a wrong value", field=self.prefix + key, expected=expected, got=shown
        )

    def refuse(self, key: str, value: object, why: str = "") -> NoReturn:
        """The value is well formed, but ayllu does not implement what it asks for."""
        reason = f" ({why})" if why else ""
        raise UnsupportedError(
            f"{self.file}: {self.prefix}{key} = {clip(repr(value), 60)} is not supported{reason}.",
            "Use another model; `ayllu list` shows those known to work.",
        )
