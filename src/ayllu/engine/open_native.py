"""A model on the CPU in native code: planned, packed, and ready to compute. Needs no torch."""

from __future__ import annotations

from ayllu import process
from ayllu.engine.memory_plan import plan_memory
from ayllu.engine.native_adapters import NativeAdapters
from ayllu.engine.native_runner import ImageRows, NativeRunner, native_decoder
from ayllu.engine.opened import OpenedRunner, free_memory
from ayllu.engine.options import EngineOptions
from ayllu.engine.packed_weights import pack_weights, packed_weight_bytes
from ayllu.engine.runner_choice import torch_is_installed
from ayllu.kernels.native.library import default_threads, kernels_name
from ayllu.progress import Progress
from ayllu.weights.checkpoint import Checkpoint

BYTES_PER_VALUE = 2
"""Of the cache, in bfloat16. In int8 it is half, and a scale for every head and position."""


def open_native(
    checkpoint: Checkpoint, options: EngineOptions, progress: Progress, model_name: str
) -> OpenedRunner:
    """Plan, then pack. Raises NoSpaceError and UsageError before anything is packed."""
    reads_images = checkpoint.config.vision is not None and torch_is_installed()
    plan = plan_memory(
        checkpoint.config,
        weight_bytes=packed_weight_bytes(checkpoint) + (_tower_bytes(checkpoint) if reads_images else 0),
        available_bytes=free_memory(),
        bytes_per_value=BYTES_PER_VALUE,
        options=options,
        model_name=model_name,
    )
    threads = options.threads or default_threads()
    before = process.resident_bytes()
    weights = pack_weights(checkpoint, threads=threads, progress=progress)
    load_peak = process.peak_resident_bytes() - before
    decoder = native_decoder(checkpoint.config, weights, plan.groups, threads=threads)
    decoder.make_cache(plan.block_counts, plan.block_tokens, int8=options.cache_type == "int8")
    adapters = NativeAdapters(decoder, checkpoint.config)

    def open_images() -> ImageRows:
        from ayllu.engine.native_images import TowerRows

        return TowerRows(checkpoint, plan.image_cache_bytes)

    without = "" if reads_images or checkpoint.config.vision is None else "; images need ayllu[torch]"
    return OpenedRunner(
        NativeRunner(checkpoint.config, decoder, adapters, open_images if reads_images else None),
        adapters,
        plan,
        device=f"cpu ({kernels_name()}, {threads} threads{without})",
        dtype="as stored",
        load_peak_bytes=load_peak,
        reads_images=reads_images,
    )


def _tower_bytes(checkpoint: Checkpoint) -> int:
    return sum(stored.nbytes for name, stored in checkpoint.tensors.items() if name.startswith("vision."))
