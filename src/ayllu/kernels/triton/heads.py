"""Rotation with normalisation, and SwiGLU's product, in one launch each instead of ten and two. A decoding
step is short enough to be made of launches. Slow twin: `kernels.reference.heads`.

Legend: R rows, H heads, d head width, P pairs (d / 2), F feed-forward width.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ayllu.kernels.triton.common import power_of_two

TILE = 1024


@triton.jit
def rotate_kernel(
    x, cos, sin, out, eps,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, PAIRS_PADDED: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """One head of one row."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, PAIRS_PADDED)
    mask = pair < PAIRS
    place = (row * HEADS + head) * (2 * PAIRS)
    first = place + (2 * pair if INTERLEAVED else pair)
    second = first + (1 if INTERLEAVED else PAIRS)
    a = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + second, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + row * PAIRS + pair, mask=mask, other=0.0)
    s = tl.load(sin + row * PAIRS + pair, mask=mask, other=0.0)
    left = (a * c - b * s).to(x.dtype.element_ty)
    right = (a * s + b * c).to(x.dtype.element_ty)
    if NORM:
        wide_left, wide_right = left.to(tl.float32), right.to(tl.float32)
        squares = tl.sum(wide_left * wide_left + wide_right * wide_right, 0)
        scale = tl.rsqrt(squares / (2 * PAIRS) + eps)
        left = (wide_left * scale).to(x.dtype.element_ty)
        right = (wide_right * scale).to(x.dtype.element_ty)
    tl.store(out + first, left, mask=mask)
    tl.store(out + second, right, mask=mask)


@triton.jit
def silu_product_kernel(gate, up, out, numbers, TILE_NUMBERS: tl.constexpr):
    """TILE_NUMBERS numbers, wherever they stand."""
    place = tl.program_id(0).to(tl.int64) * TILE_NUMBERS + tl.arange(0, TILE_NUMBERS)
    mask = place < numbers
    g = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=mask)


def rotate_heads(
    x_RHd: Tensor, cos_RP: Tensor, sin_RP: Tensor, interleaved: bool, norm_eps: float | None
) -> Tensor:
    """As `reference.heads.rotate_heads`. May be captured in a CUDA graph."""
    x = x_RHd.contiguous()
    out = torch.empty_like(x)
    heads, width = x.shape[-2:]
    rows = x.numel() // max(1, heads * width)
    if rows > 0:
        rotate_kernel[(rows, heads)](
            x, cos_RP.contiguous(), sin_RP.contiguous(), out, 0.0 if norm_eps is None else norm_eps,
            HEADS=heads, PAIRS=width // 2, PAIRS_PADDED=power_of_two(width // 2, 2, 1 << 13),
            INTERLEAVED=interleaved, NORM=norm_eps is not None, num_warps=1,
        )  # fmt: skip
    return out


def silu_product(gate_RF: Tensor, up_RF: Tensor) -> Tensor:
    """As `reference.heads.silu_product`. May be captured in a CUDA graph."""
    gate, up = gate_RF.contiguous(), up_RF.contiguous()
    out = torch.empty_like(gate)
    if gate.numel() > 0:
        silu_product_kernel[(-(-gate.numel() // TILE),)](gate, up, out, gate.numel(), TILE_NUMBERS=TILE)
    return out
