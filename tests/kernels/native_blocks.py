"""Stored rows of every format out of random bytes, and the numbers that they stand for, for tests."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ayllu.kernels.native.library import INSTRUCTION_SETS, kernels_name
from ayllu.weights.gguf_blocks import BLOCK_TYPE_NAMED, decode_blocks

SETS = [name for name in INSTRUCTION_SETS if kernels_name(name)]
"""Instruction sets that run here."""

PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

# Where the float16 scales of a block are: bytes of which any other might be infinite.
_SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def whole_columns(encoding: str, wanted: int) -> int:
    """`wanted` columns, or more until they fill whole blocks."""
    size = BLOCK_TYPE_NAMED[encoding].elements
    return -(-wanted // size) * size


def stored_rows(
    encoding: str, rows: int, columns: int, rng: np.random.Generator, scale: float = 0.1
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Random rows as a file stores them, uint8 [rows, bytes], and as float32 [rows, columns]."""
    if encoding in PLAIN:
        array = (rng.normal(size=(rows, columns)) * scale).astype(PLAIN[encoding])
        width = array.dtype.itemsize * columns
        return np.ascontiguousarray(array).view(np.uint8).reshape(rows, width), array.astype(np.float32)
    kind = BLOCK_TYPE_NAMED[encoding]
    blocks = rng.integers(0, 256, (rows * columns // kind.elements, kind.nbytes), np.uint8)
    for place in _SCALES[encoding]:
        size = scale / 16 if kind.elements == 32 else scale / 512
        scales = (rng.normal(size=len(blocks)) * size).astype("<f2")
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    stored = blocks.reshape(rows, columns // kind.elements * kind.nbytes)
    if kind.decode is None:
        return stored, _by_the_gguf_package(encoding, stored, columns)
    numbers = np.empty((len(blocks), kind.elements), np.float32)
    decode_blocks(kind, blocks, numbers)
    return stored, numbers.reshape(rows, columns)


def _by_the_gguf_package(encoding: str, stored: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
    """Formats that only the native runner reads."""
    import gguf

    if not stored.size:
        return np.empty((len(stored), columns), np.float32)
    found = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[encoding])
    return found.astype(np.float32).reshape(len(stored), columns)
