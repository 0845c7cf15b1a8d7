"""A runner without a network whose logits depend, to the bit, on every cache slot that a token may see.

Into each slot it writes which token stands there, at which position, under which adapter; a row's logits come
from a hash of all slots it sees. One stale or foreign slot changes them. A row is the same however many are
computed together. The last two tokens weigh most, so that texts repeat themselves as real ones do.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ayllu.engine.block_cache import BlockCache
from ayllu.engine.core import EngineCore
from ayllu.engine.layer_groups import LayerGroup
from ayllu.engine.prepared import CoreFacts
from ayllu.engine.scheduler import Scheduler
from ayllu.engine.speculation import Speculation
from ayllu.engine.step_runner import RunnerPiece
from tests.engine.cores import TOKENIZER
from tests.engine.fake_runner import begin_of
from tests.model.tiny import tiny_llama

VOCABULARY = 97
Hidden = list[tuple[int, int]]
"""Of each row: a hash of all it sees, and one of the last two tokens."""


class Clock:
    """Seconds that pass only when something is computed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class HashRunner:
    """seed: another model. noise: how much all that is seen weighs against the last two tokens. costs: by
    the rows of a forward pass, the seconds that it takes on `clock`."""

    batch_invariant = True

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        blocks: Sequence[int],
        block_tokens: int,
        *,
        seed: int = 0,
        noise: float = 0.6,
        clock: Clock | None = None,
        costs: Callable[[int], float] = lambda rows: 1.0,
    ) -> None:
        self.rows: list[int] = []
        """Rows of each forward pass."""
        self._groups = groups
        self._size = block_tokens
        self._memory = [np.full(total * block_tokens, -1, np.int64) for total in blocks]
        self._seed = seed
        self._noise = noise
        self._clock = clock or Clock()
        self._costs = costs

    def forward(self, pieces: Sequence[RunnerPiece]) -> list[Hidden]:
        self.rows.append(sum(piece.rows for piece in pieces))
        self._clock.now += self._costs(self.rows[-1])
        # All are written before any is read, as a network does layer by layer.
        for piece in pieces:
            self._write(piece)
        return [[self._row(piece, row) for row in range(piece.rows)] for piece in pieces]

    def logits(self, rows: Sequence[tuple[Hidden, int]]) -> NDArray[np.float32]:
        return np.stack([self._logits(*hidden[row]) for hidden, row in rows])

    def summed(self, hidden: Hidden) -> NDArray[np.float64]:
        return np.array([sum(seen for seen, _ in hidden)], np.float64)

    def is_fatal(self, error: Exception) -> bool:
        return False

    def _slots(self, piece: RunnerPiece, index: int, stop: int) -> NDArray[np.int64]:
        begin = begin_of(self._groups[index], piece.start)
        held = np.arange(stop - begin)
        return np.array(piece.tables[index], np.int64)[held // self._size] * self._size + held % self._size

    def _write(self, piece: RunnerPiece) -> None:
        positions = np.arange(piece.start, piece.start + piece.rows)
        adapter = zlib.crc32(repr(piece.adapter).encode()) >> 1 << 32
        for index, memory in enumerate(self._memory):
            slots = self._slots(piece, index, piece.start + piece.rows)[-piece.rows :]
            memory[slots] = adapter + (positions << 16) + np.array(piece.tokens)

    def _row(self, piece: RunnerPiece, row: int) -> tuple[int, int]:
        seen = [
            memory[self._slots(piece, index, piece.start + row + 1)]
            for index, memory in enumerate(self._memory)
        ]
        # A chunked layer may see one token alone; the first group sees all.
        last = seen[0][-2:] & 0xFFFF
        return zlib.crc32(b"".join(part.tobytes() for part in seen)), zlib.crc32(last.tobytes())

    def _logits(self, seen: int, last: int) -> NDArray[np.float32]:
        habit = np.random.default_rng((self._seed, last % 12)).normal(0, 3, VOCABULARY)
        return (habit + np.random.default_rng((self._seed, seen)).normal(0, self._noise, VOCABULARY)).astype(
            np.float32
        )


class NoAdapters:
    """For cores whose runner knows none."""

    names = ()

    def acquire(self, name: str) -> str:
        return name

    def release(self, identity: str) -> None:
        pass


def hash_core(
    groups: Sequence[LayerGroup],
    blocks: Sequence[int],
    block_tokens: int = 4,
    *,
    slots: int = 4,
    step_tokens: int = 32,
    prefix_cache: bool = True,
    speculation: Speculation | None = None,
    runner: HashRunner | None = None,
) -> EngineCore:
    """A core over a `HashRunner`."""
    cache = BlockCache(groups, blocks, block_tokens, remembers=prefix_cache)
    return EngineCore(
        tiny_llama(),
        TOKENIZER,
        runner or HashRunner(groups, blocks, block_tokens),
        Scheduler(cache, slots=slots, step_tokens=step_tokens, waiting=1000),
        NoAdapters(),
        facts=CoreFacts(context=256, slots=slots, reads_images=False, vocab_size=VOCABULARY),
        model_identity="hash",
        speculation=speculation,
    )
