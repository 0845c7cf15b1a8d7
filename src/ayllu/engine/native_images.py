"""Images on the native runner: the image tower runs in torch, and hands rows to the native decoder.

A tower reads each picture once, so it is not where the time goes; torch is imported, and the tower loaded,
when the first picture comes.
"""

from __future__ import annotations

import torch

from ayllu.engine.prepared import PreparedImage
from ayllu.engine.runner import FeatureCache
from ayllu.kernels.native.library import Floats
from ayllu.model.decoder import Decoder
from ayllu.weights.checkpoint import Checkpoint
from ayllu.weights.load import tensor_of

_PREFIX = "vision."
_NORM = "norm.weight"


class TowerRows:
    """Rows of images by way of a checkpoint's tower, the last ones remembered. most_bytes: of those."""

    def __init__(self, checkpoint: Checkpoint, most_bytes: int) -> None:
        self.features = FeatureCache(_tower(checkpoint), most_bytes)

    def rows(self, image: PreparedImage) -> Floats:
        """float32 [tiles * tokens_per_tile, D]"""
        with torch.inference_mode():
            rows: Floats = self.features.rows(image).float().numpy()
        return rows


def _tower(checkpoint: Checkpoint) -> Decoder:
    """A decoder of which only the image tower has weights, in the precision of the file."""
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config)
    norm = checkpoint.tensors[_NORM].decode()  # says on which device the tower is
    state = {
        name: torch.from_numpy(stored.decode()).to(_precision(checkpoint))
        for name, stored in checkpoint.tensors.items()
        if name.startswith(_PREFIX)
    }
    decoder.load_state_dict(state | {_NORM: tensor_of(norm)}, strict=False, assign=True)
    return decoder.eval().requires_grad_(False)


def _precision(checkpoint: Checkpoint) -> torch.dtype:
    """bfloat16 where the file has no more."""
    stored = {tensor.encoding for name, tensor in checkpoint.tensors.items() if name.startswith(_PREFIX)}
    return torch.float32 if stored & {"F32", "F16"} else torch.bfloat16
