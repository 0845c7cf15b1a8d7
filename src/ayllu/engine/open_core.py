"""From a path to a core that is ready: memory is planned before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ayllu.engine.block_cache import BlockCache
from ayllu.engine.core import EngineCore
from ayllu.engine.memory_plan import MemoryPlan
from ayllu.engine.model_files import is_encoder, tokenizer_for
from ayllu.engine.opened import OpenedRunner, Opening, planned
from ayllu.engine.options import EngineOptions
from ayllu.engine.prepared import CoreFacts
from ayllu.engine.runner_choice import chooses_native
from ayllu.engine.scheduler import Scheduler
from ayllu.engine.speculation import speculation_for
from ayllu.progress import SILENT, Progress
from ayllu.weights.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from ayllu.engine.encoder_core import EncoderCore
    from ayllu.engine.open_draft import OpenedDraft


def open_core(
    path: Path, options: EngineOptions, progress: Progress = SILENT, model_name: str | None = None
) -> EngineCore | EncoderCore:
    """Open and load what is at `path`: a .gguf file, a folder of safetensors, or an encoder's folder.

    Raises ModelFileError, UnsupportedError, NoSpaceError, MissingExtraError (torch) or UsageError.
    """
    if is_encoder(path):
        return _open_encoder(path, options, progress)
    checkpoint = open_checkpoint(path)
    # Texts are encoded where requests are prepared; here ids become text.
    tokenizer = tokenizer_for(checkpoint, deferred=True)
    draft: OpenedDraft | None = None
    if options.draft_model is None:
        opened = open_runner(checkpoint, options, progress, model_name or path.name)
    else:
        from ayllu.engine.open_draft import open_with_draft

        opened, draft = open_with_draft(
            checkpoint, tokenizer, options.draft_model, options, progress, model_name or path.name
        )
    plan = opened.plan
    step_tokens = max(options.step_tokens, plan.slots)
    piece = _fixed_piece(step_tokens, plan) if options.deterministic else None
    cache = BlockCache(
        plan.groups,
        plan.block_counts,
        plan.block_tokens,
        remembers=options.prefix_cache,
        alignment=piece or 1,
    )
    return EngineCore(
        checkpoint.config,
        tokenizer,
        opened.runner,
        Scheduler(
            cache, slots=plan.slots, step_tokens=step_tokens, waiting=options.waiting, fixed_piece=piece
        ),
        opened.adapters,
        facts=_facts(checkpoint, opened, draft),
        model_identity=f"{path.resolve()}:{path.stat().st_mtime_ns}",
        deterministic=options.deterministic,
        speculation=speculation_for(options, opened.runner, draft.model if draft else None),
    )


def open_runner(
    checkpoint: Checkpoint, options: EngineOptions, progress: Progress, model_name: str
) -> OpenedRunner:
    """The runner that computes this model under these options, loaded."""
    opening = opening_for(checkpoint, options, model_name)
    return opening.load(planned(opening, options, model_name), progress)


def opening_for(checkpoint: Checkpoint, options: EngineOptions, model_name: str) -> Opening:
    """The model with the runner that suits the options, not loaded yet. Raises UsageError and
    MissingExtraError."""
    if chooses_native(checkpoint, options):
        from ayllu.engine.open_native import NativeOpening

        return NativeOpening(checkpoint, options, model_name)
    from ayllu.engine.open_torch import TorchOpening

    return TorchOpening(checkpoint, options)


def _open_encoder(path: Path, options: EngineOptions, progress: Progress) -> EncoderCore:
    from ayllu.engine.embedding import open_embedding_model
    from ayllu.engine.encoder_core import EncoderCore

    model = open_embedding_model(
        path, context=options.context, device=options.device, dtype=options.dtype, progress=progress
    )
    return EncoderCore(model, waiting=options.waiting)


def _fixed_piece(step_tokens: int, plan: MemoryPlan) -> int:
    """Tokens of a prompt piece in deterministic mode: it always fits beside the other slots' tokens, and
    is whole blocks where possible, because prefixes are found in multiples of both."""
    piece = max(1, (step_tokens - plan.slots + 1) // 2)
    return piece - piece % plan.block_tokens if piece >= plan.block_tokens else piece


def _facts(checkpoint: Checkpoint, opened: OpenedRunner, draft: OpenedDraft | None) -> CoreFacts:
    plan = opened.plan
    facts: dict[str, str | int | float] = {
        "device": opened.device,
        "dtype": opened.dtype,
        "memory": "; ".join(plan.lines()),
        "load_peak_bytes": opened.load_peak_bytes,
    }
    if draft is not None:
        facts["draft_model"] = draft.name
    return CoreFacts(
        context=plan.context,
        slots=plan.slots,
        reads_images=opened.reads_images,
        vocab_size=checkpoint.config.vocab_size,
        facts=facts | plan.facts(),
    )
