"""Rotary frequencies as plain numbers, shared by the torch modules and the file writers. Needs no torch."""

from __future__ import annotations

import math

from ayllu.model.config import RopeConfig, RopeScaling


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[float, ...]:
    """Angle per position of each of the head_dim/2 pairs, in radians (RoFormer; scaling: spec 4.1)."""
    base = [rope.theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]
    if rope.scaling is not None:
        return tuple(_scaled(frequency, rope.scaling) for frequency in base)
    if rope.divisors is not None:
        return tuple(frequency / divisor for frequency, divisor in zip(base, rope.divisors, strict=True))
    return tuple(base)


def _scaled(frequency: float, scaling: RopeScaling) -> float:
    # How often the pair turns within the original context decides: rarely -> slow down, often -> keep.
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    if turns >= scaling.high_freq_factor:
        return frequency
    # Only reached when the factors differ, so that the band has a width to divide by.
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - kept) * frequency / scaling.factor + kept * frequency
