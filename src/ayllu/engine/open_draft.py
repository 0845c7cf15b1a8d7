"""A model with a smaller one that drafts for it: planned together, loaded one after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ayllu import process
from ayllu.chat.tokenizer import Tokenizer
from ayllu.engine.block_cache import BlockCache
from ayllu.engine.model_files import is_encoder, tokenizer_for
from ayllu.engine.open_core import opening_for
from ayllu.engine.opened import OpenedRunner, planned
from ayllu.engine.options import EngineOptions
from ayllu.engine.speculation_draft import DraftModel, require_same_vocabulary
from ayllu.errors import UsageError
from ayllu.progress import Progress
from ayllu.weights.checkpoint import Checkpoint, open_checkpoint

NOT_A_DRAFT = "Draft with a smaller model of the same family, or leave the draft model out."


@dataclass(frozen=True)
class OpenedDraft:
    """A draft model that is ready, and what to call it."""

    model: DraftModel
    name: str


def open_with_draft(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    draft_path: Path,
    options: EngineOptions,
    progress: Progress,
    model_name: str,
) -> tuple[OpenedRunner, OpenedDraft]:
    """A checkpoint's runner and the draft model at `draft_path`, which runs as the options say, too.

    Raises as `open_core`, and UsageError for a draft model with another vocabulary.
    """
    if is_encoder(draft_path):
        raise UsageError(
            f"{draft_path.name} is an embedding model: it cannot draft.",
            NOT_A_DRAFT,
        )
    draft_checkpoint = open_checkpoint(draft_path)
    require_same_vocabulary(tokenizer, tokenizer_for(draft_checkpoint, deferred=True), draft_path.name)
    # Where experts are is said of the model that has them; a small one has none.
    draft_options = replace(options, experts="auto", speculate=None, draft_model=None)
    opening = opening_for(checkpoint, options, model_name)
    draft_opening = opening_for(draft_checkpoint, draft_options, draft_path.name)
    plan = planned(opening, options, model_name, draft_opening)
    assert plan.draft is not None, "planned with a draft model"
    before = process.resident_bytes()
    opened = opening.load(plan, progress)
    drafting = draft_opening.load(plan.draft, progress)
    # What both took, as neither can tell it from the other's.
    opened = replace(opened, load_peak_bytes=process.peak_resident_bytes() - before)
    model = DraftModel(
        drafting.runner,
        BlockCache(
            plan.draft.groups,
            plan.draft.block_counts,
            plan.draft.block_tokens,
            remembers=options.prefix_cache,
        ),
        vocab_size=checkpoint.config.vocab_size,
        context=plan.draft.context,
        step_tokens=max(options.step_tokens, plan.slots),
    )
    return opened, OpenedDraft(model, draft_path.name)
