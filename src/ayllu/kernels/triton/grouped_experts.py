"""Experts side by side: rows sorted by expert, one launch for gate and up with SwiGLU, one for down.

Nothing asks the device how many rows an expert got: the grid covers the most tiles there can be, and each
program finds its expert, or that nothing is left to do. So a step with experts can be captured in a CUDA
graph. Scores scale the input. Slow twin: `kernels.reference.grouped_experts`.

Legend: T tokens, K experts per token, D width, F expert width, E experts.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ayllu.kernels.reference.grouped_experts import Stack
from ayllu.kernels.triton.common import multiprocessors, operand_type, power_of_two
from ayllu.kernels.triton.linear import tile_columns, tile_sizes
from ayllu.kernels.triton.tiles import matrix_arguments, multiply_tile, scale_rows


@triton.jit
def find_tile(
    row_ends, tile_ends, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TILE_ROWS: tl.constexpr
):
    """(expert, first sorted row, end of the expert's rows) of this program; expert EXPERTS: no tile."""
    tile = tl.program_id(1)
    experts = tl.arange(0, EXPERTS_PADDED)
    ends = tl.load(tile_ends + experts, mask=experts < EXPERTS, other=1 << 30)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    exists = expert < EXPERTS
    tiles_before = tl.load(tile_ends + expert - 1, mask=exists & (expert > 0), other=0)
    rows_before = tl.load(row_ends + expert - 1, mask=exists & (expert > 0), other=0)
    end = tl.load(row_ends + expert, mask=exists, other=0)
    return expert, rows_before + (tile - tiles_before) * TILE_ROWS, end


@triton.jit
def gate_up_kernel(
    x, scores, order, hidden, row_ends, tile_ends,
    gate, gate_scales, gate_minimums, up, up_scales, up_minimums,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr,
    OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    MINIMUM: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, TILE_COLUMNS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One tile of hidden [T K, F] in sorted order: silu(s x gate') * (s x up')."""
    expert, first, end = find_tile(row_ends, tile_ends, EXPERTS, EXPERTS_PADDED, TILE_ROWS)
    if expert >= EXPERTS:
        return
    row = (first + tl.arange(0, TILE_ROWS)).to(tl.int64)
    alive = row < end
    entry = tl.load(order + row, mask=alive, other=0).to(tl.int64)
    factors = tl.load(scores + entry, mask=alive, other=0.0).to(tl.float32)
    inputs = x + entry // TOP_K * COLUMNS
    place = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    wanted = place < OUTPUTS
    output = expert.to(tl.int64) * OUTPUTS + place
    gated = tl.zeros([TILE_ROWS, TILE_OUTPUTS], tl.float32)
    raised = tl.zeros([TILE_ROWS, TILE_OUTPUTS], tl.float32)
    for start in range(0, COLUMNS, TILE_COLUMNS):
        gated = multiply_tile(
            gated, inputs, alive, factors, gate, gate_scales, gate_minimums, output, wanted, start,
            COLUMNS, GROUP, KIND, MINIMUM, True, TILE_COLUMNS, OPERAND,
        )  # fmt: skip
        raised = multiply_tile(
            raised, inputs, alive, factors, up, up_scales, up_minimums, output, wanted, start,
            COLUMNS, GROUP, KIND, MINIMUM, True, TILE_COLUMNS, OPERAND,
        )  # fmt: skip
    gated = scale_rows(gated, gate_scales, output, wanted, COLUMNS, GROUP, KIND)
    raised = scale_rows(raised, up_scales, output, wanted, COLUMNS, GROUP, KIND)
    result = gated / (1 + tl.exp(-gated)) * raised
    mask = alive[:, None] & wanted[None, :]
    tl.store(hidden + row[:, None] * OUTPUTS + place[None, :], result.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def down_kernel(
    hidden, order, out, row_ends, tile_ends, down, down_scales, down_minimums,
    EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr,
    OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    MINIMUM: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, TILE_COLUMNS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One tile of hidden down', written back in the order of (token, choice)."""
    expert, first, end = find_tile(row_ends, tile_ends, EXPERTS, EXPERTS_PADDED, TILE_ROWS)
    if expert >= EXPERTS:
        return
    row = (first + tl.arange(0, TILE_ROWS)).to(tl.int64)
    alive = row < end
    entry = tl.load(order + row, mask=alive, other=0).to(tl.int64)
    place = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    wanted = place < OUTPUTS
    output = expert.to(tl.int64) * OUTPUTS + place
    summed = tl.zeros([TILE_ROWS, TILE_OUTPUTS], tl.float32)
    for start in range(0, COLUMNS, TILE_COLUMNS):
        summed = multiply_tile(
            summed, hidden + row * COLUMNS, alive, 0.0, down, down_scales, down_minimums, output, wanted,
            start, COLUMNS, GROUP, KIND, MINIMUM, False, TILE_COLUMNS, OPERAND,
        )  # fmt: skip
    summed = scale_rows(summed, down_scales, output, wanted, COLUMNS, GROUP, KIND)
    mask = alive[:, None] & wanted[None, :]
    tl.store(out + entry[:, None] * OUTPUTS + place[None, :], summed.to(out.dtype.element_ty), mask=mask)


def grouped_swiglu(
    x_TD: Tensor, scores_TK: Tensor, chosen_TK: Tensor, gate: Stack, up: Stack, down: Stack
) -> Tensor:
    """As `reference.grouped_experts.grouped_swiglu`; gate and up are of one kind. May be captured."""
    (tokens, width), top_k = x_TD.shape, chosen_TK.shape[1]
    experts, inner = gate.shape[0], gate.shape[1]
    if tokens == 0:
        return torch.zeros_like(x_TD)
    entries = tokens * top_k
    processors = multiprocessors(x_TD)
    tile_rows, up_outputs = tile_sizes(-(-entries // experts), inner, processors)
    _, down_outputs = tile_sizes(-(-entries // experts), width, processors)
    chosen = chosen_TK.flatten()
    order = chosen.argsort(stable=True)
    counts = (chosen.unsqueeze(0) == torch.arange(experts, device=chosen.device).unsqueeze(1)).sum(1)
    row_ends = counts.cumsum(0)
    tile_ends = ((counts + tile_rows - 1) // tile_rows).cumsum(0)
    most_tiles = entries // tile_rows + min(experts, entries)
    routing = dict(
        EXPERTS=experts, EXPERTS_PADDED=power_of_two(experts, 2, 1 << 14), TILE_ROWS=tile_rows,
        OPERAND=operand_type(x_TD.dtype), num_warps=8 if tile_rows == 64 else 4, num_stages=3,
    )  # fmt: skip

    x_TD = x_TD.contiguous()
    hidden = x_TD.new_empty(entries, inner)
    gate_tensors, kind, group, minimum = matrix_arguments(gate)
    up_tensors, *of_up = matrix_arguments(up)
    assert of_up == [kind, group, minimum], "gate and up are packed differently"
    gate_up_kernel[(-(-inner // up_outputs), most_tiles)](
        x_TD, scores_TK.contiguous(), order, hidden, row_ends, tile_ends, *gate_tensors, *up_tensors,
        TOP_K=top_k, OUTPUTS=inner, COLUMNS=width, GROUP=group, KIND=kind, MINIMUM=minimum,
        TILE_OUTPUTS=up_outputs, TILE_COLUMNS=min(64, tile_columns(width, tile_rows)),
        **routing,
    )  # fmt: skip
    out = x_TD.new_empty(entries, width)
    down_tensors, kind, group, minimum = matrix_arguments(down)
    down_kernel[(-(-width // down_outputs), most_tiles)](
        hidden, order, out, row_ends, tile_ends, *down_tensors,
        OUTPUTS=width, COLUMNS=inner, GROUP=group, KIND=kind, MINIMUM=minimum,
        TILE_OUTPUTS=down_outputs, TILE_COLUMNS=tile_columns(inner, tile_rows), **routing,
    )  # fmt: skip
    return out if top_k == 1 else out.view(tokens, top_k, width).sum(1)
