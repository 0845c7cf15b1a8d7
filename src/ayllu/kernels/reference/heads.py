"""What happens to queries and keys between projection and attention, and between the two products of a
SwiGLU. Slow twin of `kernels.triton.heads`.

Legend: R rows, H heads, d head width, P pairs (d / 2), F feed-forward width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rotate_heads(
    x_RHd: Tensor, cos_RP: Tensor, sin_RP: Tensor, interleaved: bool, norm_eps: float | None
) -> Tensor:
    """Each pair turned by its angle, then, with `norm_eps`, each head divided by its root mean square.

    cos and sin are float32. interleaved: pairs are (2j, 2j + 1), else (j, j + P). Computed in float32 and
    rounded to x's precision after each of the two (spec 3).
    """
    cos, sin = cos_RP.unsqueeze(-2), sin_RP.unsqueeze(-2)
    wide = x_RHd.float()
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, -1)
    turned = (a * cos - b * sin, a * sin + b * cos)
    out: Tensor = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    out = out.to(x_RHd.dtype)
    if norm_eps is None:
        return out
    wide = out.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_eps)).to(x_RHd.dtype)


def silu_product(gate_RF: Tensor, up_RF: Tensor) -> Tensor:
    """silu(gate) x up."""
    return F.silu(gate_RF) * up_RF
