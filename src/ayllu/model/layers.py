"""torch's layers without their initial draw.

Weights come from a checkpoint or from `random_decoder`; drawing them first would cost a second and, on the
meta device, pull hundreds of modules into memory.
"""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """nn.Linear whose weights are left as allocated."""

    def reset_parameters(self) -> None:
        pass


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose weights are left as allocated."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding whose weights are left as allocated."""

    def reset_parameters(self) -> None:
        pass
