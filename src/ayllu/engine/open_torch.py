"""A model with torch: what it needs on the chosen device, and how it is loaded there."""

from __future__ import annotations

from typing import NoReturn

import torch

from ayllu import process
from ayllu.engine.adapters import AdapterSet
from ayllu.engine.gpu_weights import PLANS, load_for_gpu, packed_bytes
from ayllu.engine.memory_plan import MemoryPlan
from ayllu.engine.opened import OpenedRunner, free_memory
from ayllu.engine.options import EngineOptions
from ayllu.engine.paged_memory import PagedMemory
from ayllu.engine.runner import Runner
from ayllu.engine.runner_needs import ModelNeeds, TorchNeeds
from ayllu.errors import UnsupportedError, UsageError
from ayllu.kernels.registry import kernels_for
from ayllu.model.decoder import Decoder
from ayllu.progress import Progress
from ayllu.weights.adapter import Adapter
from ayllu.weights.checkpoint import Checkpoint
from ayllu.weights.load import choose_device, choose_dtype, load_decoder, memory_bytes


class TorchOpening:
    """An `Opening` on the device and in the precision that the options mean.

    Raises UsageError for a device that is not there, and for what torch, or that device, cannot do.
    """

    def __init__(self, checkpoint: Checkpoint, options: EngineOptions) -> None:
        if options.cache_type != "auto":
            raise UsageError(
                f"A cache in {options.cache_type} needs the native runner.", "Leave --cache-type out."
            )
        self._checkpoint = checkpoint
        self._options = options
        self._device = choose_device(options.device)
        self._dtype = choose_dtype(options.dtype, self._device)
        if options.weights is not None and self._device.type != "cuda":
            raise UsageError(
                f"Weights in {options.weights} need an NVIDIA GPU, and this would run on {self._device}.",
                "Leave --weights out; on a CPU, a quantised GGUF file is computed as it is.",
            )

    @property
    def needs(self) -> tuple[ModelNeeds, ...]:
        config, weights = self._checkpoint.config, self._options.weights
        if weights is None:
            weight_bytes = memory_bytes(self._checkpoint, self._device, self._dtype)
        else:
            weight_bytes = packed_bytes(config, PLANS[weights], self._dtype.itemsize)
        # Triton's attention reads shared heads where they lie.
        expands = self._device.type != "cpu" and kernels_for(self._device).name != "triton"
        return (ModelNeeds(config, weight_bytes, TorchNeeds(config, self._dtype.itemsize, expands)),)

    @property
    def available_bytes(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.mem_get_info(self._device)[0])
        return free_memory()

    def load(self, plan: MemoryPlan, progress: Progress) -> OpenedRunner:
        """Load the weights. Raises NoSpaceError."""
        config = self._checkpoint.config
        before = process.resident_bytes()
        decoder = self._decoder(progress)
        load_peak = process.peak_resident_bytes() - before
        memory = PagedMemory(
            config,
            plan.groups,
            plan.block_counts,
            plan.block_tokens,
            dtype=self._dtype,
            device=self._device,
        )
        adapters = AdapterSet(decoder) if self._options.weights is None else _NoAdapters(decoder)
        dtype = str(self._dtype).removeprefix("torch.")
        return OpenedRunner(
            Runner(decoder, memory, adapters, image_cache_bytes=plan.image_cache_bytes),
            adapters,
            plan,
            device=str(self._device),
            dtype=dtype if self._options.weights is None else f"{dtype}, weights in {self._options.weights}",
            load_peak_bytes=load_peak,
            reads_images=config.vision is not None,
        )

    def _decoder(self, progress: Progress) -> Decoder:
        if self._device.type != "cuda":
            return load_decoder(self._checkpoint, device=self._device, dtype=self._dtype, progress=progress)
        return load_for_gpu(
            self._checkpoint,
            device=self._device,
            dtype=self._dtype,
            weights=self._options.weights,
            progress=progress,
        )


class _NoAdapters(AdapterSet):
    """Beside packed weights: an adapter changes numbers of a precision that these do not have."""

    def load(self, name: str, adapter: Adapter) -> NoReturn:
        raise UnsupportedError(
            "Adapters cannot be loaded beside packed weights.", "Open the model without --weights."
        )
