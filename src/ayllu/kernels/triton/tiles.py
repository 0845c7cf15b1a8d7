"""One tile of a product with weights as they are, or in 8 or 4 bits: what `linear` and `grouped_experts` are
made of. Weights are read in their packed form and widened in registers.

Legend: M rows of a tile, N outputs of a tile.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ayllu.kernels.reference.packed import UNIT, PackedMatrix

PLAIN, INT8, FP8, INT4 = range(4)
_KINDS = {"int8": INT8, "fp8": FP8, "int4": INT4}
_UNIT = tl.constexpr(UNIT)
_INT8, _FP8, _INT4 = tl.constexpr(INT8), tl.constexpr(FP8), tl.constexpr(INT4)


@triton.jit
def load_inputs(x, columns, alive, factors, COLUMNS: tl.constexpr, SCALED: tl.constexpr):
    """Rows of x (pointers [M]) at some columns, scaled by their factors in x's own precision."""
    mask = alive[:, None] & (columns < COLUMNS)[None, :]
    tile = tl.load(x[:, None] + columns[None, :], mask=mask, other=0.0)
    if SCALED:
        tile = (tile.to(tl.float32) * factors[:, None]).to(tile.dtype)
    return tile


@triton.jit
def e4m3_to_float(bits):
    """float8 e4m3 as float32: its bits, shifted into a half, mean 2^-8 of it, subnormals included. Works on
    devices whose hardware does not know the type."""
    wide = bits.to(tl.uint16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def multiply_tile(
    summed, x, alive, factors, values, scales, minimums, outputs, wanted, start,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, MINIMUM: tl.constexpr,
    SCALED: tl.constexpr, TILE_COLUMNS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """summed [M, N] + x[:, start : start + TILE_COLUMNS] w', for one matrix w [*, COLUMNS].

    x: pointers [M] to rows; outputs [N]: rows of w, counted over a whole stack; wanted [N]: which exist. A
    scale that a whole row shares is left to `scale_rows`.
    """
    GROUPS: tl.constexpr = COLUMNS // GROUP
    UNITS: tl.constexpr = TILE_COLUMNS // _UNIT
    # Packed weights stand as [units, columns of a unit, N], so that a unit's scale is read once.
    unit = start // _UNIT + tl.arange(0, UNITS)
    there = (unit * _UNIT < COLUMNS)[:, None] & wanted[None, :]
    place = outputs[None, :] * GROUPS + (unit * _UNIT // GROUP)[:, None]
    if KIND == _INT4:
        HALF: tl.constexpr = _UNIT // 2
        scale = tl.load(scales + place, mask=there, other=0.0).to(tl.float32)
        if MINIMUM:
            shift = tl.load(minimums + place, mask=there, other=0.0).to(tl.float32)
        else:
            shift = scale * -8.0
        byte = (unit * HALF)[:, None, None] + tl.arange(0, HALF)[None, :, None]
        offsets = outputs[None, None, :] * (COLUMNS // 2) + byte
        packed = tl.load(values + offsets, mask=there[:, None, :], other=0)
        # A byte holds two columns that stand 16 apart: two products of half a tile.
        column = tl.arange(0, TILE_COLUMNS // 2)
        low = start + column // HALF * _UNIT + column % HALF
        x_low = load_inputs(x, low, alive, factors, COLUMNS, SCALED)
        x_high = load_inputs(x, low + HALF, alive, factors, COLUMNS, SCALED)
        w_low = ((packed & 15).to(tl.float32) * scale[:, None, :] + shift[:, None, :]).to(x_low.dtype)
        w_high = ((packed >> 4).to(tl.float32) * scale[:, None, :] + shift[:, None, :]).to(x_low.dtype)
        w_low = tl.reshape(w_low, [UNITS * HALF, w_low.shape[2]])
        w_high = tl.reshape(w_high, [UNITS * HALF, w_high.shape[2]])
        summed = tl.dot(x_low.to(OPERAND), w_low.to(OPERAND), summed, input_precision="ieee")
        return tl.dot(x_high.to(OPERAND), w_high.to(OPERAND), summed, input_precision="ieee")
    column = start + tl.arange(0, TILE_COLUMNS)
    x_tile = load_inputs(x, column, alive, factors, COLUMNS, SCALED)
    mask = (column < COLUMNS)[:, None] & wanted[None, :]
    w = tl.load(values + outputs[None, :] * COLUMNS + column[:, None], mask=mask, other=0)
    if KIND == _FP8:
        w = e4m3_to_float(w)
    if KIND == _INT8:
        w = w.to(tl.float32)
        if GROUPS > 1:
            scale = tl.load(scales + place, mask=there, other=0.0)
            w = tl.reshape(w, [UNITS, _UNIT, w.shape[1]]) * scale[:, None, :]
            w = tl.reshape(w, [TILE_COLUMNS, w.shape[2]])
    return tl.dot(x_tile.to(OPERAND), w.to(x_tile.dtype).to(OPERAND), summed, input_precision="ieee")


@triton.jit
def scale_rows(
    summed, scales, outputs, wanted, COLUMNS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr
):
    """A product [M, N] with the scales of 8-bit rows that have one each; anything else as it is."""
    if KIND == _FP8 or (KIND == _INT8 and GROUP == COLUMNS):
        summed = summed * tl.load(scales + outputs, mask=wanted, other=0.0)[None, :]
    return summed


def matrix_arguments(matrix: Tensor | PackedMatrix) -> tuple[tuple[Tensor, Tensor, Tensor], int, int, bool]:
    """(values, scales, minimums), kind, group and whether there are minimums, as the kernels take them."""
    if isinstance(matrix, Tensor):
        assert matrix.is_contiguous()
        return (matrix, matrix, matrix), PLAIN, matrix.shape[-1], False
    assert matrix.values.is_contiguous() and matrix.scale.is_contiguous()
    lowest = matrix.scale if matrix.minimum is None else matrix.minimum
    return (
        (matrix.values, matrix.scale, lowest),
        _KINDS[matrix.kind],
        matrix.group,
        matrix.minimum is not None,
    )
