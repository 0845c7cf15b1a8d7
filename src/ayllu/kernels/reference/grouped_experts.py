"""A stack of SwiGLU experts, one product after another. Slow twin of `kernels.triton.grouped_experts`.

The score scales an expert's input (Llama 4; spec 5), not its output.

Legend: T tokens, K experts per token, D width, F expert width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ayllu.kernels.reference.packed import PackedMatrix, unpack

Stack = Tensor | PackedMatrix
"""Expert matrices [E, outputs, inputs], as they are or packed."""


def grouped_swiglu(
    x_TD: Tensor, scores_TK: Tensor, chosen_TK: Tensor, gate: Stack, up: Stack, down: Stack
) -> Tensor:
    """Sum over each token's K experts of (silu(s x gate') * (s x up')) down', [T, D]."""
    gate, up, down = (_plain(stack, x_TD.dtype) for stack in (gate, up, down))
    out_TD = torch.zeros_like(x_TD)
    for expert in range(gate.shape[0]):
        tokens, places = (chosen_TK == expert).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        x = x_TD[tokens] * scores_TK[tokens, places].to(x_TD.dtype).unsqueeze(-1)
        hidden = F.silu(F.linear(x, gate[expert])) * F.linear(x, up[expert])
        out_TD.index_add_(0, tokens, F.linear(hidden, down[expert]))
    return out_TD


def _plain(stack: Stack, dtype: torch.dtype) -> Tensor:
    return unpack(stack).to(dtype) if isinstance(stack, PackedMatrix) else stack
