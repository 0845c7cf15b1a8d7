"""From a path to a core that is ready: memory is planned before anything is loaded."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ayllu import process
from ayllu.engine.core import EngineCore
from ayllu.engine.encoder_core import EncoderCore
from ayllu.engine.memory_plan import MemoryPlan, plan_memory
from ayllu.engine.model_files import tokenizer_for
from ayllu.engine.options import EngineOptions
from ayllu.engine.prepared import CoreFacts
from ayllu.machine_memory import available_memory
from ayllu.progress import SILENT, Progress
from ayllu.weights.checkpoint import Checkpoint, open_checkpoint
from ayllu.weights.encoder import is_encoder_folder

UNKNOWN_MEMORY = 1 << 50
"""Where the system does not tell what is free, nothing is refused."""


def open_core(
    path: Path, options: EngineOptions, progress: Progress = SILENT, model_name: str | None = None
) -> EngineCore | EncoderCore:
    """Open and load what is at `path`: a .gguf file, a folder of safetensors, or an encoder's folder.

    Raises ModelFileError, UnsupportedError, NoSpaceError, MissingExtraError (torch) or UsageError.
    """
    if is_encoder_folder(path):
        from ayllu.engine.embedding import open_embedding_model

        model = open_embedding_model(
            path, context=options.context, device=options.device, dtype=options.dtype, progress=progress
        )
        return EncoderCore(model, waiting=options.waiting)
    checkpoint = open_checkpoint(path)
    with ThreadPoolExecutor(1) as pool:
        # Importing torch takes longer than building a large vocabulary, and neither needs the other.
        importing = pool.submit(importlib.import_module, "ayllu.weights.load")
        tokenizer = tokenizer_for(checkpoint)
        importing.result()

    from ayllu.engine.adapters import AdapterSet
    from ayllu.engine.block_cache import BlockCache
    from ayllu.engine.paged_memory import PagedMemory
    from ayllu.engine.runner import Runner
    from ayllu.engine.scheduler import Scheduler
    from ayllu.weights.load import choose_device, choose_dtype, load_decoder, memory_bytes

    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    plan = plan_memory(
        checkpoint.config,
        weight_bytes=memory_bytes(checkpoint, device, dtype),
        available_bytes=_available_on(str(device)),
        bytes_per_value=dtype.itemsize,
        options=options,
        model_name=model_name or path.name,
        expands_heads=device.type != "cpu",
    )
    before = process.resident_bytes()
    decoder = load_decoder(checkpoint, device=device, dtype=dtype, progress=progress)
    load_peak = process.peak_resident_bytes() - before
    step_tokens = max(options.step_tokens, plan.slots)
    piece = _fixed_piece(step_tokens, plan) if options.deterministic else None
    cache = BlockCache(
        plan.groups,
        plan.block_counts,
        plan.block_tokens,
        remembers=options.prefix_cache,
        alignment=piece or 1,
    )
    memory = PagedMemory(
        checkpoint.config, plan.groups, plan.block_counts, plan.block_tokens, dtype=dtype, device=device
    )
    adapters = AdapterSet(decoder)
    return EngineCore(
        checkpoint.config,
        tokenizer,
        Runner(decoder, memory, adapters, image_cache_bytes=plan.image_cache_bytes),
        Scheduler(
            cache, slots=plan.slots, step_tokens=step_tokens, waiting=options.waiting, fixed_piece=piece
        ),
        adapters,
        facts=_facts(checkpoint, plan, str(device), str(dtype).removeprefix("torch."), load_peak),
        model_identity=f"{path.resolve()}:{path.stat().st_mtime_ns}",
        deterministic=options.deterministic,
    )


def _fixed_piece(step_tokens: int, plan: MemoryPlan) -> int:
    """Tokens of a prompt piece in deterministic mode: it always fits beside the other slots' tokens, and
    is whole blocks where possible, because prefixes are found in multiples of both."""
    piece = max(1, (step_tokens - plan.slots + 1) // 2)
    return piece - piece % plan.block_tokens if piece >= plan.block_tokens else piece


def _available_on(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    free = available_memory()
    return UNKNOWN_MEMORY if free is None else free


def _facts(
    checkpoint: Checkpoint, plan: MemoryPlan, device: str, dtype: str, load_peak_bytes: int
) -> CoreFacts:
    return CoreFacts(
        context=plan.context,
        slots=plan.slots,
        reads_images=checkpoint.config.vision is not None,
        vocab_size=checkpoint.config.vocab_size,
        facts={
            "device": device,
            "dtype": dtype,
            "memory": "; ".join(plan.lines()),
            "load_peak_bytes": load_peak_bytes,
            **plan.facts(),
        },
    )
