"""A request on its way to the engine's core: tokens instead of words, everything resolved and checked.

What upper rooms ask (`GenerateRequest`) is prepared in the caller's process; only this crosses into the
engine's. Needs no torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ayllu.engine.parameters import Sampling


@dataclass(frozen=True)
class GrammarSpec:
    """A grammar in llguidance's own form (Lark text, or JSON with several grammars), ready to compile."""

    source: str


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """Tiles of one image, float32 [tiles, channels, size, size], and the SHA-256 of its content and shape."""

    pixels: NDArray[np.float32]
    digest: str

    @classmethod
    def of(cls, pixels: NDArray[np.float32]) -> PreparedImage:
        pixels = np.ascontiguousarray(pixels, dtype=np.float32)
        head = repr((pixels.shape, pixels.dtype.str)).encode()
        return cls(pixels, hashlib.sha256(head + pixels.tobytes()).hexdigest())


@dataclass(frozen=True, kw_only=True)
class PreparedRequest:
    """One prompt as tokens, to be answered `n` times with at most `max_new_tokens` each.

    stop_ids end an answer (empty: nothing does but the limit); their token is not part of the answer. images
    stand in the prompt in this order, one run of patch tokens per tile row.
    """

    id: str
    token_ids: list[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    images: tuple[PreparedImage, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: GrammarSpec | None = None
    adapter: str | None = None
    priority: int = 0
    tenant: str = ""
    skip_specials: bool = True
    continuation: bool = False


@dataclass(frozen=True, kw_only=True)
class CoreFacts:
    """What the engine's core tells once it is ready."""

    context: int
    slots: int
    reads_images: bool
    vocab_size: int
    facts: dict[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PreparedEmbedding:
    """Inputs as tokens, to become one vector each."""

    id: str
    inputs: list[list[int]]
    normalise: bool = True
    tenant: str = ""
    priority: int = 0


@dataclass(frozen=True, eq=False)
class EmbeddingsReady:
    """Vectors float32 [inputs, width] of a `PreparedEmbedding`."""

    vectors: NDArray[np.float32]
