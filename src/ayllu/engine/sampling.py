"""From logits to the next token: temperature, top-k, top-p, min-p, repetition penalty, seed.

Order of steps: penalty, temperature, top-k, top-p, min-p, draw. Temperature 0 is greedy and ignores the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ayllu.errors import UsageError


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


class Sampler:
    """Draws tokens for one answer. The same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def next_token(self, logits: Tensor, history: Iterable[int] = ()) -> int:
        """A token drawn from logits [vocab_size]. `history` is what the repetition penalty looks at."""
        logits = logits.float().cpu()
        if self.sampling.repetition_penalty != 1.0:
            logits = penalise_repetition(logits, history, self.sampling.repetition_penalty)
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = kept_probabilities(logits, self.sampling)
        return int(torch.multinomial(probabilities, 1, generator=self._random))


def penalise_repetition(logits: Tensor, history: Iterable[int], penalty: float) -> Tensor:
    """Logits of tokens seen before, divided by `penalty` if positive, multiplied if negative (CTRL, 4.1)."""
    seen = torch.tensor(sorted(set(history)), dtype=torch.long)
    if seen.numel() == 0:
        return logits
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def kept_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [vocab_size] that is drawn from: sums to 1, zero where a rule drops the token.

    top_p drops tokens whose more likely ones already exceed p together (spec 8.3); min_p those less likely
    than that share of the best. The best token always stays.
    """
    ordered, order = (logits / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        keep[sampling.top_k :] = False
        ordered = ordered * keep / (ordered * keep).sum()
    keep &= ordered.cumsum(-1) - ordered <= sampling.top_p
    keep &= ordered >= sampling.min_p * ordered[0]
    keep[0] = True
    kept = ordered * keep
    return torch.zeros_like(logits).scatter(0, order, kept / kept.sum())
