"""One answer under way, as the scheduler and the cache see it: tokens, and how far they have been computed.

Everything a step does to it is the same: compute tokens [computed, some end). A prompt piece and a decoding
step differ in their length alone. Needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Owner(Protocol):
    """What the scheduler needs to know of the request behind a sequence."""

    @property
    def id(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def tenant(self) -> str: ...


class BlockKeys:
    """SHA-256 keys of a sequence's full blocks: each covers its own tokens and images and all before them.

    root: what else must agree (tenant, model, adapter). images: digest and number of patch rows of each, in
    order. A patch token looks alike for every image, so the image's digest and the place in it are hashed
    beside the tokens.
    """

    def __init__(
        self,
        root: bytes,
        block_tokens: int,
        images: AbstractSequence[tuple[str, int]] = (),
        patch_token: int | None = None,
    ) -> None:
        self._keys: list[bytes] = []
        self._root = root
        self.block_tokens = block_tokens
        self._patch_token = patch_token
        self._starts = np.cumsum([0, *(rows for _, rows in images)])
        self._digests = [digest for digest, _ in images]
        self._patches_seen = 0

    @property
    def has_images(self) -> bool:
        return bool(self._digests)

    def up_to(self, tokens: AbstractSequence[int], count: int) -> list[bytes]:
        """Keys of the first `count` blocks of `tokens`; earlier ones are not computed again."""
        size = self.block_tokens
        while len(self._keys) < count:
            start = len(self._keys) * size
            block = np.array(tokens[start : start + size], dtype=np.int64)
            state = hashlib.sha256(self._keys[-1] if self._keys else self._root)
            state.update(block.tobytes())
            if self._digests:
                self._add_images(state, block)
            self._keys.append(state.digest())
        return self._keys[:count]

    def _add_images(self, state: hashlib._Hash, block: NDArray[np.int64]) -> None:
        patches = int((block == self._patch_token).sum())
        first, last = self._patches_seen, self._patches_seen + patches
        self._patches_seen = last
        for digest, start, stop in zip(self._digests, self._starts[:-1], self._starts[1:], strict=True):
            if start < last and stop > first:
                state.update(f"{digest}:{first - start};".encode())


@dataclass(eq=False)
class Sequence:
    """tokens: prompt and answer so far. computed: how many have keys and values in the cache; furthest: how
    many ever had. limit: the most tokens it may ever have. leader: a sequence with the same prompt that goes
    first, so that this one finds the prompt in the cache. prompt_done: whether its prompt was ever computed
    whole. arrived, number: the scheduler's clock when it came, and how many had come before. rank: its place
    in every order, lower is earlier; None until its turn in its tenant's line. tables: its blocks, one list
    per layer group while it runs, empty while it does not."""

    tokens: list[int]
    prompt_tokens: int
    limit: int
    keys: BlockKeys
    owner: Owner
    leader: Sequence | None = None
    uses_cached_prefix: bool = True
    computed: int = 0
    prompt_done: bool = False
    cached_tokens: int | None = None
    furthest: int = 0
    arrived: float = 0.0
    number: int = 0
    rank: float | None = None
    preemptions: int = 0
    tables: list[list[int]] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        """Tokens that are still to be computed before the next one can be drawn."""
        return len(self.tokens) - self.computed

    @property
    def order(self) -> tuple[float, int]:
        """Sort key of every queue: rank, then arrival."""
        assert self.rank is not None, f"sequence {self.number} has not had its turn"
        return (self.rank, self.number)
