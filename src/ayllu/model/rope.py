"""Rotary position embedding: angles on demand (no tables: 10M positions would not fit) and the rotation.

Legend: B leading axes, H heads, P pairs (head_dim / 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ayllu.model.config import RopeLayout


def rope_angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each [*B, 1, P] in float32, for integer positions [*B] and frequencies [P]."""
    angles = positions.unsqueeze(-1).float() * frequencies
    return angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: RopeLayout) -> Tensor:
    """Turn each pair of x [*B, H, 2P] by its angle. Computed in float32, returned in x's dtype."""
    if layout == "interleaved":
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = x.float().chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return turned.to(x.dtype)
