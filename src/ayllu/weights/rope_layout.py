"""The one permutation between the two layouts of rotary heads.

Rows of a query or key projection are grouped by head. Interleaved heads turn dimensions (2j, 2j+1)
together, half-rotation heads (j, j + head_dim/2). Reordering rows moves between them; values never change,
so quantised rows can be moved as they are. Value projections are never permuted (spec 4).
"""

from __future__ import annotations

from ayllu.model.config import RopeLayout
from ayllu.weights.tensors import Array


def permute_rope_rows(rows: Array, heads: int, *, source: RopeLayout, target: RopeLayout) -> Array:
    """`rows` [heads * head_dim, ...] in the target's order; a view where the layouts agree, else a copy."""
    if source == target:
        return rows
    per_head = rows.shape[0] // heads
    inner = (per_head // 2, 2) if source == "interleaved" else (2, per_head // 2)
    return rows.reshape(heads, *inner, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
