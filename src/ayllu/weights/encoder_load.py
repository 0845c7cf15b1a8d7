"""Encoder checkpoint to module: every tensor goes once, straight to where it will live.

On the CPU, weights already stored in the wanted precision stay mapped: the file is the memory.
"""

from __future__ import annotations

from ayllu.errors import MissingExtraError

try:
    import torch
except ImportError as error:
    raise MissingExtraError("Running a model with torch", "torch") from error

from torch import Tensor

from ayllu.model.encoder import Encoder
from ayllu.progress import SILENT, Progress
from ayllu.weights.encoder import EncoderCheckpoint
from ayllu.weights.load import require_memory, tensor_of


def load_encoder(
    checkpoint: EncoderCheckpoint,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    progress: Progress = SILENT,
) -> Encoder:
    """The checkpoint's network with its weights, in evaluation mode and without gradients.

    The weights must not be written to: they may be the file itself. Raises NoSpaceError when they cannot fit.
    """
    require_memory(checkpoint.config.parameters * dtype.itemsize, device)
    with torch.device("meta"):
        encoder = Encoder(checkpoint.config)
    state: dict[str, Tensor] = {}
    total = sum(stored.nbytes for stored in checkpoint.tensors.values())
    with progress.task(f"Loading {checkpoint.path.name}", total) as task:
        for name, stored in checkpoint.tensors.items():
            source = tensor_of(stored.array)
            state[name] = source.to(device=device, dtype=dtype)
            if state[name].data_ptr() != source.data_ptr():
                stored.release()
            task.advance(stored.nbytes)
    encoder.load_state_dict(state, assign=True)
    return encoder.eval().requires_grad_(False)
