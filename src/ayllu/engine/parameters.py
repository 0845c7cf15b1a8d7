"""What a caller may ask of generation, and the limits shown to people. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ayllu.errors import UsageError, clip

DEFAULT_CONTEXT = 8192
"""Context window in tokens when none is asked for: fits a small machine, where a model's own longest may be
millions of tokens."""

MAX_LOGIT_BIASES = 1024


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. The defaults are Llama 4's (spec 8.3).

    repetition_penalty looks at prompt and answer (CTRL, 4.1); presence and frequency penalties at the answer
    alone, as OpenAI defines them. logit_bias is added to the logits of single tokens; -100 bans one.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        require_range("temperature", self.temperature, 0.0, 100.0)
        require_range("top_p", self.top_p, 0.0, 1.0)
        require_range("top_k", self.top_k, 0, 1 << 24)
        require_range("min_p", self.min_p, 0.0, 1.0)
        require_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        require_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        require_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        require_range("logit_bias entries", len(self.logit_bias), 0, MAX_LOGIT_BIASES)
        for token, bias in self.logit_bias.items():
            require_range("logit_bias token", token, 0, 1 << 24)
            require_range("logit_bias", bias, -100.0, 100.0)
        if self.seed is not None:
            require_range("seed", self.seed, 0, (1 << 63) - 1)


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Raises UsageError, naming the range, unless `value` is a finite number from `low` to `high`.

    An integer range takes whole numbers alone.
    """
    whole = isinstance(low, int) and isinstance(high, int)
    kinds = int if whole else (int, float)
    if (
        isinstance(value, bool)
        or not isinstance(value, kinds)
        or not (isinstance(value, int) or math.isfinite(value))  # isfinite fails for very large ones
        or not low <= value <= high
    ):
        kind = "a whole number" if whole else "a value"
        raise UsageError(
            f"{name} = {clip(repr(value), 40)} is out of range.", f"Use {kind} from {low:g} to {high:g}."
        )
