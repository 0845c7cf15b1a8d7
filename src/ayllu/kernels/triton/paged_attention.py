"""Paged attention: keys and values are read from their cache blocks, never gathered. Decoding and prefill.

One kernel for pieces of any number of rows (FlashAttention's running softmax: Dao et al., 2022). Query heads
that share a key-value head stand in one tile beside each other, so that few rows still fill a matrix product.
Few and long pieces are also split along their keys, and a second kernel merges the parts (Flash-Decoding, Dao
et al., 2023). Slow twin: `kernels.reference.paged_attention`.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ayllu.kernels.reference.paged_attention import Pieces
from ayllu.kernels.triton.common import multiprocessors, operand_type, power_of_two

MOST_SPLITS = 32
LEAST_KEYS_PER_SPLIT = 128


@triton.jit
def attend_kernel(
    q, keys, values, out, part_values, part_best, part_sum,
    first_row, rows, held, tables,
    table_stride, most_rows, scale,
    BLOCK_TOKENS: tl.constexpr, SHARED: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_KEYS: tl.constexpr, SPLITS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One tile of (row, query head) pairs of one piece against one part of its keys, for one key-value head.

    SHARED: query heads per key-value head. Tile entry e is row e // SHARED and head e % SHARED of the group.
    scale: 1 / sqrt(WIDTH) x log2(e), since powers of two are what the hardware computes.
    """
    tile = tl.program_id(0)
    piece = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    group = tl.program_id(2)
    piece_rows = tl.load(rows + piece).to(tl.int32)
    if tile * TILE_ROWS >= piece_rows * SHARED:
        return
    keys_held = tl.load(held + piece).to(tl.int32)
    first = tl.load(first_row + piece).to(tl.int64)

    entry = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    row = entry // SHARED
    head = group * SHARED + entry % SHARED
    alive = row < piece_rows
    last_seen = keys_held - piece_rows + row
    dims = tl.arange(0, WIDTH_PADDED)
    places = ((first + row) * (GROUPS * SHARED) + head) * WIDTH
    wide = alive[:, None] & (dims < WIDTH)[None, :]
    queries = tl.load(q + places[:, None] + dims[None, :], mask=wide, other=0.0)

    # The keys that any row of this tile sees, cut into parts of whole tiles.
    tile_last = tl.minimum(piece_rows - 1, (tile * TILE_ROWS + TILE_ROWS - 1) // SHARED)
    stop = tl.maximum(keys_held - piece_rows + tile_last + 1, 0)
    per_split = tl.cdiv(tl.cdiv(stop, TILE_KEYS), SPLITS) * TILE_KEYS
    low = split * per_split
    high = tl.minimum(stop, low + per_split)

    best = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    summed = tl.zeros([TILE_ROWS, WIDTH_PADDED], tl.float32)
    for start in range(low, high, TILE_KEYS):
        key = start + tl.arange(0, TILE_KEYS)
        inside = key < high
        block = tl.load(tables + piece * table_stride + key // BLOCK_TOKENS, mask=inside, other=0).to(
            tl.int64
        )
        slot = (block * BLOCK_TOKENS + key % BLOCK_TOKENS) * GROUPS + group
        there = inside[:, None] & (dims < WIDTH)[None, :]
        offsets = slot[:, None] * WIDTH + dims[None, :]
        k = tl.load(keys + offsets, mask=there, other=0.0)
        v = tl.load(values + offsets, mask=there, other=0.0)
        scores = tl.dot(queries.to(OPERAND), tl.trans(k.to(OPERAND)), input_precision="ieee") * scale
        seen = inside[None, :] & (key[None, :] <= last_seen[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        # A row that has seen nothing yet has -inf here; -inf - -inf would be NaN.
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - anchor[:, None])
        kept = tl.exp2(best - anchor)
        total = total * kept + tl.sum(weights, 1)
        weights = weights.to(values.dtype.element_ty).to(OPERAND)
        summed = summed * kept[:, None] + tl.dot(weights, v.to(OPERAND), input_precision="ieee")
        best = higher

    if SPLITS == 1:
        # Nothing to see gives 0 / 1; only scores of -inf give 0 / 0, which is NaN as in the reference.
        result = summed / (tl.where(stop > 0, total, 1.0)[:, None])
        tl.store(out + places[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=wide)
    else:
        part = ((piece.to(tl.int64) * most_rows + row) * (GROUPS * SHARED) + head) * SPLITS + split
        tl.store(part_best + part, best, mask=alive)
        tl.store(part_sum + part, total, mask=alive)
        tl.store(part_values + part[:, None] * WIDTH + dims[None, :], summed, mask=wide)


@triton.jit
def merge_kernel(
    out, part_values, part_best, part_sum, first_row, rows, held, most_rows,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One row and head: the parts weighted by what each had seen."""
    piece, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if row >= tl.load(rows + piece):
        return
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, WIDTH_PADDED)
    narrow = (dims < WIDTH)[None, :]
    part = ((piece.to(tl.int64) * most_rows + row) * HEADS + head) * SPLITS + splits
    best = tl.load(part_best + part)
    total = tl.load(part_sum + part)
    summed = tl.load(part_values + part[:, None] * WIDTH + dims[None, :], mask=narrow, other=0.0)
    highest = tl.max(best, 0)
    weights = tl.exp2(best - tl.where(highest == float("-inf"), 0.0, highest))
    divisor = tl.where(tl.load(held + piece) > 0, tl.sum(total * weights, 0), 1.0)
    result = tl.sum(summed * weights[:, None], 0) / divisor
    place = ((tl.load(first_row + piece).to(tl.int64) + row) * HEADS + head) * WIDTH
    tl.store(out + place + dims, result.to(out.dtype.element_ty), mask=dims < WIDTH)


def paged_attention(
    q_RHd: Tensor,
    keys_SGd: Tensor,
    values_SGd: Tensor,
    pieces: Pieces,
    block_tokens: int,
    out_RHd: Tensor,
    *,
    splits: int | None = None,
) -> None:
    """As `reference.paged_attention`. splits: parts of the keys, a power of two (None: fills the device).

    Waits for nothing and reads no tensor here: may be captured in a CUDA graph.
    """
    count = pieces.rows.shape[0]
    if count == 0 or pieces.most_rows == 0:
        return
    _, heads, width = q_RHd.shape
    groups = keys_SGd.shape[1]
    tile_rows = power_of_two(pieces.most_rows * heads // groups, 16, 64)
    tiles = -(-pieces.most_rows * (heads // groups) // tile_rows)
    if splits is None:
        splits = _splits(tiles * count * groups, pieces, multiprocessors(q_RHd))
    assert splits & (splits - 1) == 0, f"{splits} splits are no power of two"
    q_RHd, padded = q_RHd.contiguous(), power_of_two(width, 16, 1 << 14)
    assert out_RHd.is_contiguous() and keys_SGd.is_contiguous() and values_SGd.is_contiguous()
    parts = count * pieces.most_rows * heads * splits if splits > 1 else 0
    part_values = torch.empty(parts * width, dtype=torch.float32, device=q_RHd.device)
    part_best = torch.empty(parts, dtype=torch.float32, device=q_RHd.device)
    part_sum = torch.empty_like(part_best)
    attend_kernel[(tiles, count * splits, groups)](
        q_RHd, keys_SGd, values_SGd, out_RHd, part_values, part_best, part_sum,
        pieces.first_row, pieces.rows, pieces.held, pieces.tables,
        pieces.tables.stride(0), pieces.most_rows, width**-0.5 * math.log2(math.e),
        BLOCK_TOKENS=block_tokens, SHARED=heads // groups, GROUPS=groups, WIDTH=width, WIDTH_PADDED=padded,
        TILE_ROWS=tile_rows, TILE_KEYS=64 if padded <= 128 else 32, SPLITS=splits,
        OPERAND=operand_type(q_RHd.dtype), num_warps=8 if tile_rows == 64 else 4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(count, pieces.most_rows, heads)](
            out_RHd, part_values, part_best, part_sum,
            pieces.first_row, pieces.rows, pieces.held, pieces.most_rows,
            HEADS=heads, WIDTH=width, WIDTH_PADDED=padded, SPLITS=splits, num_warps=1 if splits <= 8 else 4,
        )  # fmt: skip


def _splits(programs: int, pieces: Pieces, processors: int) -> int:
    """Parts of the keys so that there are two programs per multiprocessor, none for a handful of keys."""
    wanted = min(-(-2 * processors // programs), pieces.most_held // LEAST_KEYS_PER_SPLIT, MOST_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)
