"""x W' with W in 4 or 8 bits. Slow twin: `kernels.reference.packed.packed_linear`."""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ayllu.kernels.reference.packed import UNIT, PackedMatrix
from ayllu.kernels.triton.common import multiprocessors, operand_type, power_of_two
from ayllu.kernels.triton.tiles import matrix_arguments, multiply_tile, scale_rows


@triton.jit
def linear_kernel(
    x, out, bias, values, scales, minimums, rows,
    OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    MINIMUM: tl.constexpr, BIAS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, TILE_COLUMNS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One tile [TILE_ROWS, TILE_OUTPUTS] of the product."""
    row = (tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)
    output = (tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)).to(tl.int64)
    alive, wanted = row < rows, output < OUTPUTS
    summed = tl.zeros([TILE_ROWS, TILE_OUTPUTS], tl.float32)
    for start in range(0, COLUMNS, TILE_COLUMNS):
        summed = multiply_tile(
            summed, x + row * COLUMNS, alive, 0.0, values, scales, minimums, output, wanted, start,
            COLUMNS, GROUP, KIND, MINIMUM, False, TILE_COLUMNS, OPERAND,
        )  # fmt: skip
    summed = scale_rows(summed, scales, output, wanted, COLUMNS, GROUP, KIND)
    if BIAS:
        summed += tl.load(bias + output, mask=wanted, other=0.0).to(tl.float32)[None, :]
    mask = alive[:, None] & wanted[None, :]
    tl.store(out + row[:, None] * OUTPUTS + output[None, :], summed.to(out.dtype.element_ty), mask=mask)


def packed_linear(x_XK: Tensor, packed: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """As `reference.packed.packed_linear`, for one matrix. May be captured in a CUDA graph."""
    outputs, columns = packed.shape
    x = x_XK.reshape(-1, columns).contiguous()
    out = x.new_empty(x.shape[0], outputs)
    if x.shape[0] > 0:
        tensors, kind, group, minimum = matrix_arguments(packed)
        tile_rows, tile_outputs = tile_sizes(x.shape[0], outputs, multiprocessors(x))
        linear_kernel[(-(-outputs // tile_outputs), -(-x.shape[0] // tile_rows))](
            x, out, x if bias is None else bias, *tensors, x.shape[0],
            OUTPUTS=outputs, COLUMNS=columns, GROUP=group, KIND=kind, MINIMUM=minimum, BIAS=bias is not None,
            TILE_ROWS=tile_rows, TILE_OUTPUTS=tile_outputs, TILE_COLUMNS=tile_columns(columns, tile_rows),
            OPERAND=operand_type(x.dtype), num_warps=8 if tile_rows == 64 else 4, num_stages=3,
        )  # fmt: skip
    return out.view(*x_XK.shape[:-1], outputs)


def tile_sizes(rows: int, outputs: int, processors: int) -> tuple[int, int]:
    """Rows and outputs of a tile: narrow tiles while wide ones would leave multiprocessors idle."""
    tile_rows = power_of_two(rows, 16, 64)
    tile_outputs = 128 if tile_rows == 64 else 64
    while tile_outputs > 16 and -(-outputs // tile_outputs) * -(-rows // tile_rows) < processors:
        tile_outputs //= 2
    return tile_rows, tile_outputs


def tile_columns(columns: int, tile_rows: int) -> int:
    """Inputs multiplied at once: long runs for few rows, where reading weights is all; at least one unit."""
    return power_of_two(columns, UNIT, 64 if tile_rows == 64 else 128)
