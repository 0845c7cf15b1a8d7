"""How an engine is set up: sizes and limits, all finite, all with stated defaults. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ayllu.engine.parameters import require_range

DEFAULT_SLOTS = 8
"""Sequences computed at the same time when none are asked for."""

MAX_SLOTS = 1024
MAX_WAITING = 1 << 16
MAX_STEP_TOKENS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Sizes and limits of one engine.

    context: tokens of prompt and answer of one request (None: the model's own, at most 8,192). slots:
    sequences computed at the same time (None: as many as fit, at most 8). waiting: sequences that may queue;
    more are refused. step_tokens: tokens computed in one step, decoding and prompt pieces together.
    block_tokens: tokens per cache block. kv_bytes: memory of the cache (None: as planned from what is free).
    prefix_cache: whether beginnings of prompts are remembered. image_cache_bytes: memory of image features.
    deterministic: compute each sequence alone and cut prompts at fixed places, so that an answer is the same
    to the bit whatever else runs; slower. command: what was typed to start it, so that a refusal can name a
    command that works (None: `ayllu chat` with the model's name).
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
