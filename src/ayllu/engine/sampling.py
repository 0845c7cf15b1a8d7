"""From logits to the next token: temperature, top-k, top-p, min-p, repetition penalty, seed.

Order of steps: penalty, temperature, top-k, top-p, min-p, draw. Temperature 0 is greedy and ignores the rest.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ayllu.engine.parameters import Sampling
from ayllu.errors import UnsupportedError


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
        if not bool(logits.max().isfinite()):
            raise UnsupportedError(
                "The model computed no finite numbers.", "Use --dtype float32, or fetch the model again."
            )
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
    ordered, order = (
        ((logits - logits.max()) / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    )
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        keep[sampling.top_k :] = False
        ordered = ordered * keep / (ordered * keep).sum()
    keep &= ordered.cumsum(-1) - ordered <= sampling.top_p
    keep &= ordered >= sampling.min_p * ordered[0]
    keep[0] = True
    kept = ordered * keep
    return torch.zeros_like(logits).scatter(0, order, kept / kept.sum())
