"""Layers that remember alike share cache blocks: one group keeps everything, one per chunk size a chunk.

Needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ayllu.model.config import ModelConfig


@dataclass(frozen=True)
class LayerGroup:
    """Layers with the same reach. chunk None: they see every earlier token; else the same block of `chunk`
    positions, so that nothing older is kept."""

    chunk: int | None
    layers: tuple[int, ...]

    @property
    def name(self) -> str:
        return "global" if self.chunk is None else f"chunk {self.chunk}"

    def held_tokens(self, length: int) -> int:
        """The most tokens that a sequence of `length` has in this group at any time."""
        return length if self.chunk is None else min(length, self.chunk)


def layer_groups(config: ModelConfig) -> tuple[LayerGroup, ...]:
    """The groups of a network, the global one first. Every layer is in exactly one."""
    chunks = sorted({layer.chunk for layer in config.layers}, key=lambda chunk: chunk or 0)
    return tuple(
        LayerGroup(chunk, tuple(i for i, layer in enumerate(config.layers) if layer.chunk == chunk))
        for chunk in chunks
    )


def fitting_block_tokens(groups: tuple[LayerGroup, ...], wanted: int) -> int:
    """The largest number of tokens per block, at most `wanted`, that divides every chunk."""
    common = math.gcd(*(group.chunk for group in groups if group.chunk is not None))
    if common == 0:
        return wanted
    return max(size for size in range(1, min(wanted, common) + 1) if common % size == 0)
