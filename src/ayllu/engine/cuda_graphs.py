"""Decoding steps that are recorded once and replayed: a GPU then waits for memory, not for Python.

A step in which every sequence computes one token has the same shape as the one before. So its numbers
(tokens, positions, slots, tables) go into buffers that stay where they are, the step is recorded over them
for a few sizes, and each later step fills the buffers and replays. Rows are padded by repeating the last
one: it chooses no other experts, looks at no other blocks and writes what is written anyway. On a CPU
nothing is recorded; the tests replay by computing again, so that everything but the recording itself is the
same.

Legend: B rows of a recorded step, N blocks in a table, D width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ayllu.engine.paged_memory import KernelAttention, KernelStep, PagedMemory, written_slots
from ayllu.engine.step_runner import RunnerPiece
from ayllu.kernels.reference.paged_attention import Pieces
from ayllu.kernels.registry import kernels_for
from ayllu.model.attention import Attend
from ayllu.model.decoder import Decoder
from ayllu.model.feed_forward import Experts
from ayllu.model.rope import rope_angles
from ayllu.model.rope_frequencies import rope_frequencies

MOST_ROWS = 128
"""Beyond, a step computes long enough to hide its launches."""

LEAST_BLOCKS = 64
MOST_RECORDINGS = 64
"""Sizes kept, the longest unused dropped first."""

WARM_UPS = 2
"""Runs before recording: kernels are compiled and libraries set up outside of it."""

Compute = Callable[[], Tensor]


class Recording(Protocol):
    """A step that can be run again over the same buffers."""

    output: Tensor

    def replay(self) -> None:
        """Compute again: `output` then holds the result for what the buffers hold now."""


class ComputedAgain:
    """A recording that records nothing: for devices without graphs, and for tests."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self.output = compute()

    def replay(self) -> None:
        self.output.copy_(self._compute())


class CudaGraphs:
    """Records in CUDA graphs that share their memory: two are never replayed at the same time, and what one
    has computed is copied before the next begins."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Recording:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(aside)
        return _CudaGraph(compute, self._pool)


class _CudaGraph:
    def __init__(self, compute: Compute, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: another thread of this process may allocate meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.output = compute()

    def replay(self) -> None:
        self._graph.replay()


def recorded_decoding(decoder: Decoder, memory: PagedMemory) -> RecordedDecoding | None:
    """What replays this decoder's decoding steps, where its device, kernels and modules can be recorded."""
    if memory.device.type != "cuda" or not kernels_for(memory.device).capturable or not recordable(decoder):
        return None
    return RecordedDecoding(decoder, memory, CudaGraphs())


def recordable(decoder: Decoder) -> bool:
    """Whether a step never waits for the device: plain experts ask it how many rows each got
    (`gpu_weights.prepare` exchanges them), and an embedding that stayed in its file is read on the host."""
    waits = any(isinstance(module, Experts) for module in decoder.modules())
    return isinstance(decoder.embed_tokens, nn.Embedding) and not waits


class RecordedDecoding:
    """Computes steps of one row per sequence over recordings, which it makes when a size is first met."""

    def __init__(self, decoder: Decoder, memory: PagedMemory, record: Callable[[Compute], Recording]) -> None:
        self._decoder, self._memory, self._record = decoder, memory, record
        frequencies = rope_frequencies(decoder.config.rope, decoder.config.head_dim)
        self._frequencies = torch.tensor(frequencies, dtype=torch.float32, device=memory.device)
        vision = decoder.config.vision
        self._patch_token = None if vision is None else vision.patch_token_id
        self._recordings: OrderedDict[tuple[int, ...], tuple[_Buffers, Recording]] = OrderedDict()
        self._too_large: set[tuple[int, ...]] = set()

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Sizes recorded now: rows, then blocks per table of every layer group."""
        return tuple(self._recordings)

    def takes(self, pieces: AbstractSequence[RunnerPiece]) -> bool:
        """Whether this step can be replayed: one token per sequence, no adapters, no part of an image."""
        return (
            0 < len(pieces) <= MOST_ROWS
            and all(piece.rows == 1 and piece.adapter is None for piece in pieces)
            and not any(piece.images and piece.tokens[0] == self._patch_token for piece in pieces)
            and self._size(pieces) not in self._too_large
        )

    @torch.inference_mode()
    def forward(self, pieces: AbstractSequence[RunnerPiece]) -> list[Tensor]:
        """Hidden states [1, D] of each piece, as `Runner.forward` gives them."""
        size = self._size(pieces)
        if size not in self._recordings:
            hidden = self._first(size, pieces)
        else:
            self._recordings.move_to_end(size)
            buffers, recording = self._recordings[size]
            buffers.fill(pieces)
            recording.replay()
            hidden = recording.output
        # A copy, because the next replay writes over it.
        return list(hidden[: len(pieces)].clone().split(1))

    def _size(self, pieces: AbstractSequence[RunnerPiece]) -> tuple[int, ...]:
        blocks = (max(len(piece.tables[group]) for piece in pieces) for group in range(self._groups))
        return (_rounded(len(pieces), 1), *(_rounded(count, LEAST_BLOCKS) for count in blocks))

    @property
    def _groups(self) -> int:
        return len(self._memory.groups)

    def _first(self, size: tuple[int, ...], pieces: AbstractSequence[RunnerPiece]) -> Tensor:
        """Record a size over the step at hand; without memory for it, compute it and never try again."""
        buffers = _Buffers(self._memory, size)
        buffers.fill(pieces)

        def compute() -> Tensor:
            kernels = kernels_for(self._memory.device)
            attend = KernelAttention(self._memory, buffers.steps, kernels)
            return self._hidden(buffers.ids, buffers.positions, attend)

        try:
            recording = self._record(compute)
        except RuntimeError as error:
            if not _lacks_memory(error):
                raise
            self._too_large.add(size)
            return compute()
        # Recording computes nothing yet.
        recording.replay()
        self._recordings[size] = (buffers, recording)
        if len(self._recordings) > MOST_RECORDINGS:
            self._recordings.popitem(last=False)
        return recording.output

    def _hidden(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """As `Decoder.forward`, with frequencies that are on the device already: it makes them on the host,
        and nothing may come from there while a graph is recorded."""
        x = self._decoder.embed(ids)
        angles = rope_angles(positions, self._frequencies)
        for layer in self._decoder.layers:
            x = layer(x, positions, angles, attend)
        hidden: Tensor = self._decoder.norm(x)
        return hidden


class _Buffers:
    """The numbers of one recorded step in one tensor that never moves, and views of its parts."""

    def __init__(self, memory: PagedMemory, size: tuple[int, ...]) -> None:
        self._memory = memory
        rows, *blocks = size
        shapes: list[tuple[int, ...]] = [(rows,), (rows,)]
        for count in blocks:
            shapes += [(rows,), (rows,), (rows, count)]
        total = sum(int(np.prod(shape)) for shape in shapes)
        pinned = memory.device.type == "cuda"
        self._host = torch.zeros(total, dtype=torch.int64, pin_memory=pinned)
        self._device = torch.zeros(total, dtype=torch.int64, device=memory.device)
        self._parts = [part.numpy() for part in _views(self._host, shapes)]
        self.ids, self.positions, *of_groups = _views(self._device, shapes)
        each = torch.arange(rows, device=memory.device)
        ones = torch.ones_like(each)
        self.steps = []
        for group, count in enumerate(blocks):
            write, held, tables = of_groups[3 * group : 3 * group + 3]
            pieces = Pieces(each, ones, held, tables, most_rows=1, most_held=count * memory.block_tokens)
            self.steps.append(KernelStep(write, (pieces,)))

    def fill(self, pieces: AbstractSequence[RunnerPiece]) -> None:
        """Put a step in, its last piece repeated in the rows that are left."""
        size = self._memory.block_tokens
        ids, positions, *of_groups = self._parts
        for row in range(len(ids)):
            piece = pieces[min(row, len(pieces) - 1)]
            ids[row], positions[row] = piece.tokens[0], piece.start
            for group, kind in enumerate(self._memory.groups):
                write, held, tables = of_groups[3 * group : 3 * group + 3]
                place = piece.start if kind.chunk is None else piece.start % kind.chunk
                count = place // size + 1
                tables[row, :count] = piece.tables[group][:count]
                held[row] = place + 1
                write[row : row + 1] = written_slots(tables[row], place, place + 1, size)
        self._device.copy_(self._host)


def _views(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    parts = flat.split([int(np.prod(shape)) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _lacks_memory(error: BaseException | None) -> bool:
    """Whether an allocation failed; ending a recording that broke off may raise another error over it."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None


def _rounded(count: int, least: int) -> int:
    """The next power of two, at least `least`: few sizes are recorded."""
    return max(least, 1 << (count - 1).bit_length()) if count else least
