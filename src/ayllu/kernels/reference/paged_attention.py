"""Attention over keys and values that lie in cache blocks, as the formula reads.

A prompt piece and a decoding step are the same thing here: rows that follow each other in one sequence, the
last of them at the end of what its sequence holds. Slow twin of `kernels.triton.paged_attention`.

Legend: R rows of the step, P pieces, N blocks in a table, S cache slots, H query heads, G key-value heads,
d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """Which rows of a step belong together, and which blocks they look at. Integer tensors on the device.

    first_row, rows, held [P]: piece p is rows [first_row, first_row + rows) of the step; its last row sees
    the first `held` tokens of the piece's table, the row before it one less, and so on (rows <= held; a
    piece with held 0 sees nothing and gets zeros). tables [P, N]: blocks in the order of their tokens;
    entries behind the last token held are not read. most_rows, most_held: no piece has more, known without
    asking the device.
    """

    first_row: Tensor
    rows: Tensor
    held: Tensor
    tables: Tensor
    most_rows: int
    most_held: int


def paged_attention(
    q_RHd: Tensor, keys_SGd: Tensor, values_SGd: Tensor, pieces: Pieces, block_tokens: int, out_RHd: Tensor
) -> None:
    """Write softmax(q k / sqrt(d)) v into the pieces' rows of `out_RHd`; other rows stay as they are.

    Block b is slots [b * block_tokens, (b + 1) * block_tokens). Query head h looks at key-value head
    h // (H / G). Scores and sums are float32, the result is in q's precision.
    """
    heads, groups = q_RHd.shape[1], keys_SGd.shape[1]
    facts = zip(pieces.first_row.tolist(), pieces.rows.tolist(), pieces.held.tolist(), strict=True)
    for piece, (first, rows, held) in enumerate(facts):
        if held == 0:
            out_RHd[first : first + rows] = 0
            continue
        places = torch.arange(held, device=q_RHd.device)
        slots = pieces.tables[piece][places // block_tokens].long() * block_tokens + places % block_tokens
        keys = keys_SGd[slots].float().repeat_interleave(heads // groups, 1)
        values = values_SGd[slots].float().repeat_interleave(heads // groups, 1)
        scores = torch.einsum("rhd,khd->hrk", q_RHd[first : first + rows].float(), keys)
        last_seen = places[held - rows :].unsqueeze(-1)
        scores = (scores * q_RHd.shape[-1] ** -0.5).masked_fill(places > last_seen, -torch.inf)
        out_RHd[first : first + rows] = torch.einsum("hrk,khd->rhd", scores.softmax(-1), values).to(
            q_RHd.dtype
        )
