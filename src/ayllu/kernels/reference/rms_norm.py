"""RMS normalisation, as the network does it (spec 2). Slow twin of `kernels.triton.rms_norm`."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), rounded to x's precision, times the weight, [*X, D]."""
    wide = x_XD.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x_XD.dtype) * weight_D
