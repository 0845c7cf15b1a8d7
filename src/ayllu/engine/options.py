"""How an engine is set up: sizes and limits, all finite, all with stated defaults. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ayllu.engine.parameters import require_range
from ayllu.errors import UsageError, clip

DEFAULT_SLOTS = 8
"""Sequences computed at the same time when none are asked for."""

MAX_SLOTS = 1024
MAX_WAITING = 1 << 16
MAX_STEP_TOKENS = 1 << 16
MAX_DRAFTED = 64

Speculate = Literal["off", "lookup", "draft"]
"""Where drafted tokens come from: nowhere, the text itself, or that and a model with the same tokenizer."""

RunnerName = Literal["auto", "native", "torch"]
"""What computes: native code on the CPU, torch on any device, or the first of them that can."""

CacheType = Literal["auto", "int8"]
"""How keys and values are kept: in the runner's own numbers, or in 8 bits with a scale per position."""

ExpertPlace = Literal["auto", "memory", "disk"]
"""Where a mixture's experts are on the native runner: in memory, in a packed file of which only chosen ones
are read, or there when they do not fit into memory."""

GpuWeights = Literal["int4", "int4-128", "int8", "fp8"]
"""How weights are packed on a GPU (`gpu_weights.PLANS` says what each means): in 4 bits with a scale for 32,
or for 128 with a minimum, or in 8 bits with a scale per row."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Sizes and limits of one engine.

    context: tokens of prompt and answer of one request (None: the model's own, at most 8,192). slots:
    sequences computed at the same time (None: as many as fit, at most 8). waiting: sequences that may queue;
    more are refused. step_tokens: tokens computed in one step, decoding and prompt pieces together.
    block_tokens: tokens per cache block. kv_bytes: memory of the cache (None: as planned from what is free).
    prefix_cache: whether beginnings of prompts are remembered. image_cache_bytes: memory of image features.
    deterministic: compute each sequence alone and cut prompts at fixed places, so that an answer is the same
    to the bit whatever else runs; slower. speculate: how tokens are drafted to be computed together (None: by
    `draft_model` if there is one, otherwise by lookup where the runner computes each row alike however many
    are computed together; off where it does not, or when deterministic). draft_model: the smaller model of
    "draft". most_drafted: tokens drafted for one answer in one step; fewer where that is faster. runner,
    cache_type, experts: see `RunnerName`, `CacheType` and `ExpertPlace`. threads: of the native runner (None:
    one per processor). weights: pack them on a GPU, see `GpuWeights` (None: they have the precision `dtype`).
    command: what was typed to start it, so that a refusal can name a command that works (None: `ayllu chat`
    with the model's name).
    """

    context: int | None = None
    slots: int | None = None
    waiting: int = 1024
    step_tokens: int = 512
    block_tokens: int = 16
    kv_bytes: int | None = None
    prefix_cache: bool = True
    image_cache_bytes: int = 256 << 20
    deterministic: bool = False
    device: str = "auto"
    dtype: str = "auto"
    speculate: Speculate | None = None
    draft_model: Path | None = None
    most_drafted: int = 16
    runner: RunnerName = "auto"
    cache_type: CacheType = "auto"
    experts: ExpertPlace = "auto"
    threads: int | None = None
    weights: GpuWeights | None = None
    command: str | None = None

    def __post_init__(self) -> None:
        if self.context is not None:
            require_range("context", self.context, 2, 1 << 31)
        if self.slots is not None:
            require_range("slots", self.slots, 1, MAX_SLOTS)
        require_range("waiting", self.waiting, 0, MAX_WAITING)
        require_range("step_tokens", self.step_tokens, 1, MAX_STEP_TOKENS)
        require_range("block_tokens", self.block_tokens, 1, 4096)
        if self.kv_bytes is not None:
            require_range("kv_bytes", self.kv_bytes, 0, 1 << 50)
        require_range("image_cache_bytes", self.image_cache_bytes, 0, 1 << 50)
        require_range("most_drafted", self.most_drafted, 1, MAX_DRAFTED)
        for name, value, known in (
            ("runner", self.runner, get_args(RunnerName)),
            ("cache_type", self.cache_type, get_args(CacheType)),
            ("experts", self.experts, get_args(ExpertPlace)),
            ("weights", self.weights, (None, *get_args(GpuWeights))),
        ):
            if value not in known:
                raise UsageError(
                    f"{name} = {clip(value)} is unknown.", f"Use {' or '.join(filter(None, known))}."
                )
        if self.threads is not None:
            require_range("threads", self.threads, 1, 1024)
        self._require_possible_speculation()

    def _require_possible_speculation(self) -> None:
        if self.speculate not in (None, *get_args(Speculate)):
            raise UsageError(
                f"speculate = {clip(self.speculate)} is unknown.", "Use 'off', 'lookup' or 'draft'."
            )
        if self.speculate == "draft" and self.draft_model is None:
            raise UsageError(
                "Drafting by a model needs the model.",
                "Name a smaller one with the same tokenizer as draft_model.",
            )
        if self.draft_model is not None and self.speculate not in (None, "draft"):
            raise UsageError(
                f"There is a draft model, but speculate = {self.speculate!r}.", "Leave one of them out."
            )
        if self.deterministic and (self.draft_model is not None or self.speculate not in (None, "off")):
            raise UsageError(
                "A deterministic engine computes each token alone and cannot speculate.",
                "Leave speculation or deterministic out.",
            )
