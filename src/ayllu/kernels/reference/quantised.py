"""Products with inputs rounded to whole numbers, obviously: what the native kernels compute, in numpy.

Each block of 32 inputs shares the scale that makes the number farthest from zero -128 (ggml's Q4_0 does the
same in 4 bits). A number is off by at most half a scale, or by a whole one where it would be +128, and that
bounds the error of a product. Slow twin of `kernels.native`; weights are given as the float32 numbers that
they stand for.

Legend: X rows of inputs, K inputs, N outputs.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

BLOCK = 32
FARTHEST = np.float32(-128)
LARGEST = np.float32(127)
SMALLEST = np.float32(1e-36)
"""A block of numbers below this counts as zeros: 128 divided by one would overflow."""


def quantised(x_XK: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Whole numbers [X, blocks, 32] and scales [X, blocks] of inputs; the last block is filled with zeros.

    A block with infinity or NaN has the scale NaN, so that it shows in the result.
    """
    rows, columns = x_XK.shape
    blocks = -(-columns // BLOCK)
    padded = np.zeros((rows, blocks * BLOCK), np.float32)
    padded[:, :columns] = x_XK
    cut = padded.reshape(rows, blocks, BLOCK)
    most, least = cut.max(-1), cut.min(-1)
    farthest = np.where(-least > most, least, most)
    finite = np.isfinite(farthest)
    inverse = np.zeros_like(farthest)
    np.divide(FARTHEST, farthest, out=inverse, where=finite & (np.abs(farthest) > SMALLEST))
    scaled = np.where(finite[..., None], cut, 0) * inverse[..., None]
    numbers = np.rint(np.minimum(scaled, LARGEST)).astype(np.int8)
    return numbers, np.where(finite, farthest / FARTHEST, np.float32(np.nan))


def rounded_inputs(x_XK: Floats) -> Doubles:
    """Inputs [X, K] as a quantised matrix sees them."""
    numbers, scales = quantised(x_XK)
    rounded: Doubles = numbers.astype(np.float64) * scales[..., None].astype(np.float64)
    return rounded.reshape(len(x_XK), scales.shape[1] * BLOCK)[:, : x_XK.shape[1]]


def bfloat16_inputs(x_XK: Floats) -> Doubles:
    """Inputs [X, K] as a bfloat16 matrix sees them."""
    rounded: Doubles = x_XK.astype(ml_dtypes.bfloat16).astype(np.float64)
    return rounded


def rounding_bound(x_XK: Floats, weights_NK: Floats) -> Doubles:
    """How far a product with rounded inputs [X, N] can be from the exact one: half a scale per input, a whole
    one for the largest."""
    numbers, scales = quantised(x_XK)
    steps = np.where(numbers == LARGEST, 1.0, 0.5) * np.abs(scales)[..., None].astype(np.float64)
    off = steps.reshape(len(x_XK), scales.shape[1] * BLOCK)[:, : x_XK.shape[1]] + float(SMALLEST)
    bound: Doubles = off @ np.abs(weights_NK.astype(np.float64)).T
    return bound
