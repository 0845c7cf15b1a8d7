"""Products with inputs rounded to whole numbers, obviously: what the native kernels compute, in numpy.

Each block of 32 inputs shares the scale that makes its largest 127 (Jacob et al. 2018, arXiv 1712.05877,
symmetric). A block is off by at most half a scale per number, which bounds the error of a product. Slow twin
of `kernels.native`; weights are given as the float32 numbers that they stand for.

Legend: X rows of inputs, K inputs, N outputs.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

BLOCK = 32
LARGEST = np.float32(127)
SMALLEST = np.float32(1e-36)
"""A block of numbers below this counts as zeros: 127 divided by one would overflow."""


def quantised(x_XK: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Whole numbers [X, blocks, 32] and scales [X, blocks] of inputs; the last block is filled with zeros.

    A block with infinity or NaN has the scale NaN, so that it shows in the result.
    """
    rows, columns = x_XK.shape
    blocks = -(-columns // BLOCK)
    padded = np.zeros((rows, blocks * BLOCK), np.float32)
    padded[:, :columns] = x_XK
    cut = padded.reshape(rows, blocks, BLOCK)
    most = np.abs(cut).max(-1)
    finite = np.isfinite(most)
    inverse = np.divide(LARGEST, most, out=np.zeros_like(most), where=finite & (most > SMALLEST))
    numbers = np.rint(np.where(finite[..., None], cut, 0) * inverse[..., None]).astype(np.int8)
    return numbers, np.where(finite, most / LARGEST, np.float32(np.nan))


def rounded_inputs(x_XK: Floats) -> Doubles:
    """Inputs [X, K] as a quantised matrix sees them."""
    numbers, scales = quantised(x_XK)
    rounded = numbers * scales[..., None].astype(np.float64)
    return rounded.reshape(len(x_XK), scales.shape[1] * BLOCK)[:, : x_XK.shape[1]]


def bfloat16_inputs(x_XK: Floats) -> Doubles:
    """Inputs [X, K] as a bfloat16 matrix sees them."""
    return x_XK.astype(ml_dtypes.bfloat16).astype(np.float64)


def rounding_bound(x_XK: Floats, weights_NK: Floats) -> Doubles:
    """How far a product with rounded inputs [X, N] can be from the exact one: half a scale per input."""
    _, scales = quantised(x_XK)
    half = np.repeat(scales.astype(np.float64) / 2, BLOCK, -1)[:, : x_XK.shape[1]] + float(SMALLEST)
    bound: Doubles = half @ np.abs(weights_NK.astype(np.float64)).T
    return bound
