"""Which runner computes a model: native code on the CPU where it can, torch for everything else.

Needs no torch, and looks for it without importing it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ayllu.engine.options import EngineOptions
from ayllu.engine.packed_weights import unpackable
from ayllu.errors import MissingExtraError, UsageError
from ayllu.kernels.native.library import native_is_built
from ayllu.weights.checkpoint import Checkpoint

_GPU_DRIVER = Path("/dev/nvidiactl")


def chooses_native(checkpoint: Checkpoint, options: EngineOptions) -> bool:
    """Whether the native runner computes this model under these options.

    Raises UsageError when it was asked for and cannot, MissingExtraError when it cannot and torch is absent.
    """
    reason = None if options.runner == "torch" else _against_native(checkpoint, options)
    if options.runner == "native" and reason is not None:
        raise UsageError(
            f"The native runner cannot run {checkpoint.path.name}: {reason}.", "Use --runner torch."
        )
    if options.runner != "torch" and reason is None:
        return True
    if not torch_is_installed():
        because = f" ({reason})" if reason else ""
        raise MissingExtraError(f"Running {checkpoint.path.name} with torch{because}", "torch")
    return False


def torch_is_installed() -> bool:
    return importlib.util.find_spec("torch") is not None


def _against_native(checkpoint: Checkpoint, options: EngineOptions) -> str | None:
    if not native_is_built():
        return "this installation was made without it"
    if options.device not in ("auto", "cpu"):
        return f"it computes on the CPU, not on {options.device}"
    if options.weights is not None:
        return f"it computes in the file's precision, weights in {options.weights} are for a GPU"
    if options.dtype != "auto":
        return f"it computes in the file's precision, not in {options.dtype}"
    if (
        options.runner == "auto"
        and options.device == "auto"
        and torch_is_installed()
        and _GPU_DRIVER.exists()
    ):
        return "there is a GPU"
    return unpackable(checkpoint)
