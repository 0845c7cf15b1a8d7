"""What a caller may ask of generation, and the limits shown to people. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ayllu.errors import UsageError

DEFAULT_CONTEXT = 8192
"""Context window in tokens when none is asked for: fits a small machine, where a model's own longest may be
millions of tokens."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. The defaults are Llama 4's (spec 8.3)."""

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0.0, 100.0)
        _require("top_p", self.top_p, 0.0, 1.0)
        _require("top_k", self.top_k, 0, 1 << 24)
        _require("min_p", self.min_p, 0.0, 1.0)
        _require("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.seed is not None:
            _require("seed", self.seed, 0, (1 << 63) - 1)


def _require(name: str, value: float, low: float, high: float) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and low <= value <= high):
        raise UsageError(f"{name} = {value} is out of range.", f"Use a value from {low:g} to {high:g}.")
