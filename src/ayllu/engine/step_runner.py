"""What the core asks of whatever computes. A faster runner changes nothing but the class behind these lines.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ayllu.engine.prepared import PreparedImage
from ayllu.weights.adapter import Adapter


@dataclass(frozen=True, eq=False)
class RunnerPiece:
    """Tokens of one sequence from position `start` on. tables: its blocks of every layer group. adapter: the
    identity of its adapter. images: all images of its prompt; patches_before: patch tokens of the prompt
    before this piece."""

    tokens: AbstractSequence[int]
    start: int
    tables: AbstractSequence[AbstractSequence[int]]
    adapter: str | None = None
    images: tuple[PreparedImage, ...] = ()
    patches_before: int = 0

    @property
    def rows(self) -> int:
        return len(self.tokens)


class StepRunner(Protocol):
    """What computes (`ayllu.engine.runner.Runner` is one). Hidden states are the runner's own affair."""

    def forward(self, pieces: AbstractSequence[RunnerPiece]) -> list[Any]:
        """Write the pieces' keys and values into their cache slots; the hidden states of each piece."""

    def logits(self, rows: AbstractSequence[tuple[Any, int]]) -> NDArray[np.float32]:
        """Logits [rows, vocab_size] of rows, each given as a piece's hidden states and a place in them."""

    def summed(self, hidden: Any) -> NDArray[np.float64]:
        """The sum [width] of a piece's hidden states."""

    def is_fatal(self, error: Exception) -> bool:
        """Whether nothing can be computed any more after this error, whoever's request met it."""


class Adapters(Protocol):
    """Which adapters there are (`ayllu.engine.adapters.AdapterSet` is one)."""

    @property
    def names(self) -> tuple[str, ...]: ...
    def load(self, name: str, adapter: Adapter) -> str: ...
    def unload(self, name: str) -> None: ...
    def acquire(self, name: str) -> str: ...
    def release(self, identity: str) -> None: ...
