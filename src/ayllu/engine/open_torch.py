"""A model with torch: planned, loaded, and ready to compute on the chosen device."""

from __future__ import annotations

from ayllu import process
from ayllu.engine.adapters import AdapterSet
from ayllu.engine.memory_plan import plan_memory
from ayllu.engine.opened import OpenedRunner, free_memory
from ayllu.engine.options import EngineOptions
from ayllu.engine.paged_memory import PagedMemory
from ayllu.engine.runner import Runner
from ayllu.errors import UsageError
from ayllu.progress import Progress
from ayllu.weights.checkpoint import Checkpoint
from ayllu.weights.load import choose_device, choose_dtype, load_decoder, memory_bytes


def open_torch(
    checkpoint: Checkpoint, options: EngineOptions, progress: Progress, model_name: str
) -> OpenedRunner:
    """Plan, then load. Raises NoSpaceError and UsageError before anything is loaded."""
    if options.cache_type != "auto":
        raise UsageError(
            f"A cache in {options.cache_type} needs the native runner.", "Leave --cache-type out."
        )
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    plan = plan_memory(
        checkpoint.config,
        weight_bytes=memory_bytes(checkpoint, device, dtype),
        available_bytes=_available_on(str(device)),
        bytes_per_value=dtype.itemsize,
        options=options,
        model_name=model_name,
        expands_heads=device.type != "cpu",
    )
    before = process.resident_bytes()
    decoder = load_decoder(checkpoint, device=device, dtype=dtype, progress=progress)
    load_peak = process.peak_resident_bytes() - before
    memory = PagedMemory(
        checkpoint.config, plan.groups, plan.block_counts, plan.block_tokens, dtype=dtype, device=device
    )
    adapters = AdapterSet(decoder)
    return OpenedRunner(
        Runner(decoder, memory, adapters, image_cache_bytes=plan.image_cache_bytes),
        adapters,
        plan,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        load_peak_bytes=load_peak,
        reads_images=checkpoint.config.vision is not None,
    )


def _available_on(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()
