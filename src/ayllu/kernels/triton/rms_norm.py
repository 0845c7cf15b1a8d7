"""RMS normalisation in one launch instead of six. Slow twin: `kernels.reference.rms_norm`."""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ayllu.kernels.triton.common import power_of_two


@triton.jit
def rms_norm_kernel(x, weight, out, eps, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, WIDTH_PADDED)
    mask = dims < WIDTH
    wide = tl.load(x + row * WIDTH + dims, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    rounded = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
    scaled = rounded * tl.load(weight + dims, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + dims, scaled.to(out.dtype.element_ty), mask=mask)


def rms_norm(x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`. May be captured in a CUDA graph."""
    x = x_XD.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width
    if rows > 0:
        padded = power_of_two(width, 16, 1 << 20)
        rms_norm_kernel[(rows,)](
            x, weight_D, out, eps, WIDTH=width, WIDTH_PADDED=padded, num_warps=8 if padded >= 2048 else 4
        )
    return out
