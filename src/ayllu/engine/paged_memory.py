"""Keys and values in blocks: where a step writes them, and the attention that reads them back.

`PagedMemory` is the storage, one pair of tensors per layer. `attend_for` gives the decoder's `attend` for one
step over packed pieces of many sequences: `PagedAttention`, in plain torch, or `KernelAttention`, which reads
the blocks where they lie. The slow twin of both is `sequence_cache`.

Legend: R rows of the step, S rows of one piece, B pieces of one row, T keys, H query heads, G key-value
heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ayllu.engine.layer_groups import LayerGroup
from ayllu.kernels.reference.paged_attention import Pieces
from ayllu.kernels.registry import Kernels, kernels_for
from ayllu.model.attention import Attend, attention, visible
from ayllu.model.config import ModelConfig

TILE_TOKENS = 4096
"""Keys looked at together when a prompt is long: bounds the memory of its scores."""


class PagedMemory:
    """Cache slots of every layer: block b of a group is slots [b * block_tokens, (b + 1) * block_tokens)."""

    def __init__(
        self,
        config: ModelConfig,
        groups: AbstractSequence[LayerGroup],
        blocks: AbstractSequence[int],
        block_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.groups = tuple(groups)
        self.block_tokens = block_tokens
        self.device = device
        self.group_of = {layer: index for index, group in enumerate(groups) for layer in group.layers}
        shape = (config.num_key_value_heads, config.head_dim)
        # Not zeroed: memory that no sequence has needed yet costs nothing.
        self.layers = [
            tuple(
                torch.empty(blocks[self.group_of[layer]] * block_tokens, *shape, dtype=dtype, device=device)
                for _ in range(2)
            )
            for layer in range(config.num_hidden_layers)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes set aside for keys and values."""
        return sum(tensor.nbytes for pair in self.layers for tensor in pair)


@dataclass(frozen=True)
class PagedPiece:
    """Rows [start, stop) of one sequence in this step, with the sequence's block table of every group."""

    start: int
    stop: int
    tables: tuple[NDArray[np.int64], ...]

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class _Span:
    """One piece of several rows in one group: its rows [first, last) of the step, and the slots it reads."""

    first: int
    last: int
    key_start: int
    start: int
    slots: Tensor


@dataclass(frozen=True)
class _Singles:
    """Pieces of one row each, of similar length: rows [B], slots [B, T] padded, and which of them count."""

    rows: Tensor
    slots: Tensor
    seen: Tensor


class _GroupStep:
    """What one kind of layer needs to know of a step: all its layers share it."""

    def __init__(
        self, pieces: AbstractSequence[PagedPiece], index: int, chunk: int | None, memory: PagedMemory
    ) -> None:
        size, device = memory.block_tokens, memory.device
        write: list[NDArray[np.int64]] = []
        self.spans: list[_Span] = []
        single: list[tuple[int, NDArray[np.int64]]] = []
        row = 0
        for piece in pieces:
            begin = 0 if chunk is None else piece.start // chunk * chunk
            held = np.arange(piece.stop - begin)
            slots = piece.tables[index][held // size] * size + held % size
            write.append(slots[piece.start - begin :])
            if piece.rows == 1:
                single.append((row, slots))
            else:
                on_device = torch.from_numpy(slots).to(device)
                self.spans.append(_Span(row, row + piece.rows, begin, piece.start, on_device))
            row += piece.rows
        self.write = torch.from_numpy(np.concatenate(write)).to(device)
        self.singles = [_padded(bucket, device) for bucket in _buckets(single)]


def _buckets(
    single: list[tuple[int, NDArray[np.int64]]],
) -> list[list[tuple[int, NDArray[np.int64]]]]:
    """Rows of similar length together: padding then costs at most a factor of two."""
    buckets: dict[int, list[tuple[int, NDArray[np.int64]]]] = {}
    for row, slots in single:
        buckets.setdefault(max(8, len(slots).bit_length()), []).append((row, slots))
    return list(buckets.values())


def _padded(bucket: list[tuple[int, NDArray[np.int64]]], device: torch.device) -> _Singles:
    longest = max(len(slots) for _, slots in bucket)
    padded = np.zeros((len(bucket), longest), np.int64)
    seen = np.zeros((len(bucket), longest), np.bool_)
    for index, (_, slots) in enumerate(bucket):
        padded[index, : len(slots)] = slots
        padded[index, len(slots) :] = slots[-1]
        seen[index, : len(slots)] = True
    rows = torch.tensor([row for row, _ in bucket], device=device)
    return _Singles(rows, torch.from_numpy(padded).to(device), torch.from_numpy(seen).to(device))


def attend_for(memory: PagedMemory, pieces: AbstractSequence[PagedPiece]) -> Attend:
    """The `Attend` of one step that is fastest on the memory's device."""
    kernels = kernels_for(memory.device)
    if kernels.name == "reference":
        return PagedAttention(memory, pieces)
    return KernelAttention(memory, kernel_steps(memory, pieces), kernels)


class PagedAttention:
    """The `Attend` of one step in plain torch. Writes the step's keys and values, then attends."""

    def __init__(self, memory: PagedMemory, pieces: AbstractSequence[PagedPiece]) -> None:
        self._memory = memory
        self._steps = [
            _GroupStep(pieces, index, group.chunk, memory) for index, group in enumerate(memory.groups)
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._memory.layers[layer]
        step = self._steps[self._memory.group_of[layer]]
        keys.index_copy_(0, step.write, k)
        values.index_copy_(0, step.write, v)
        if len(step.spans) == 1 and not step.singles:
            return _attend_span(q, step.spans[0], keys, values)
        out = torch.empty_like(q)
        for span in step.spans:
            out[span.first : span.last] = _attend_span(q[span.first : span.last], span, keys, values)
        for singles in step.singles:
            out[singles.rows] = attention(
                q[singles.rows].unsqueeze(1),
                keys[singles.slots],
                values[singles.slots],
                singles.seen.unsqueeze(1),
            ).squeeze(1)
        return out


def _attend_span(q_SHd: Tensor, span: _Span, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of one piece over what its sequence holds, [S, H, d]."""
    if len(span.slots) > TILE_TOKENS:
        return tiled_attention(q_SHd, span.start, span.key_start, span.slots, keys, values)
    held = torch.arange(len(span.slots), device=q_SHd.device) + span.key_start
    seen = visible(held[len(held) - q_SHd.shape[0] :], held, None)
    return attention(q_SHd[None], keys[span.slots][None], values[span.slots][None], seen[None])[0]


def tiled_attention(
    q_SHd: Tensor, start: int, key_start: int, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """The same, a tile of keys at a time with a running softmax (Milakov and Gimelshein, 2018), in float32.

    Queries stand at positions start, start + 1, ...; the keys in `slots` at key_start, key_start + 1, ...
    Memory is S x H x TILE_TOKENS scores, however long the sequence.
    """
    rows, heads, width = q_SHd.shape
    groups = keys.shape[1]
    q = (q_SHd.float() * width**-0.5).view(rows, groups, heads // groups, width)
    q = q.permute(1, 2, 0, 3).reshape(groups, -1, width)
    positions = torch.arange(start, start + rows, device=q.device).repeat(heads // groups)
    best = q.new_full((groups, q.shape[1], 1), -torch.inf)
    total = torch.zeros_like(best)
    summed = torch.zeros_like(q)
    for first in range(0, len(slots), TILE_TOKENS):
        tile = slots[first : first + TILE_TOKENS]
        scores = q @ keys[tile].float().permute(1, 2, 0)
        if key_start + first + len(tile) > start:
            held = torch.arange(len(tile), device=q.device) + key_start + first
            scores.masked_fill_(held > positions.unsqueeze(-1), -torch.inf)
        higher = torch.maximum(best, scores.amax(-1, keepdim=True))
        scores.sub_(higher).exp_()
        kept = (best - higher).exp()
        total = total * kept + scores.sum(-1, keepdim=True)
        summed = summed * kept + scores @ values[tile].float().permute(1, 0, 2)
        best = higher
    out = (summed / total).view(groups, heads // groups, rows, width).permute(2, 0, 1, 3)
    return out.reshape(rows, heads, width).to(q_SHd.dtype)


@dataclass(frozen=True)
class KernelStep:
    """What one kind of layer needs of a step, on the device: the slots [R] its rows are written to, and the
    pieces that one launch each computes."""

    write: Tensor
    launches: tuple[Pieces, ...]


class KernelAttention:
    """The `Attend` of one step through `ayllu.kernels`: keys and values stay in their blocks."""

    def __init__(self, memory: PagedMemory, steps: AbstractSequence[KernelStep], kernels: Kernels) -> None:
        self._memory, self._steps, self._kernels = memory, steps, kernels

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._memory.layers[layer]
        step = self._steps[self._memory.group_of[layer]]
        keys.index_copy_(0, step.write, k)
        values.index_copy_(0, step.write, v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for pieces in step.launches:
            self._kernels.paged_attention(q, keys, values, pieces, self._memory.block_tokens, out)
        return out


def kernel_steps(memory: PagedMemory, pieces: AbstractSequence[PagedPiece]) -> list[KernelStep]:
    """The step of every layer group. Single rows and longer pieces want other tiles: two launches."""
    first_rows = np.cumsum([0, *(piece.rows for piece in pieces)])
    single = [index for index, piece in enumerate(pieces) if piece.rows == 1]
    longer = [index for index, piece in enumerate(pieces) if piece.rows > 1]
    parcel = _Parcel()
    planned = []
    for group, kind in enumerate(memory.groups):
        begins = [0 if kind.chunk is None else piece.start // kind.chunk * kind.chunk for piece in pieces]
        write = [
            written_slots(piece.tables[group], piece.start - begin, piece.stop - begin, memory.block_tokens)
            for piece, begin in zip(pieces, begins, strict=True)
        ]
        held = np.array([piece.stop - begin for piece, begin in zip(pieces, begins, strict=True)])
        launches = []
        for chosen in (single, longer):
            if chosen:
                rows = np.array([pieces[index].rows for index in chosen])
                blocks = -(-held[chosen] // memory.block_tokens)
                tables = np.zeros((len(chosen), blocks.max()), np.int64)
                for line, index, count in zip(tables, chosen, blocks, strict=True):
                    line[:count] = pieces[index].tables[group][:count]
                numbers = [parcel.add(array) for array in (first_rows[chosen], rows, held[chosen], tables)]
                launches.append((numbers, int(rows.max()), int(held[chosen].max())))
        planned.append((parcel.add(np.concatenate(write)), launches))
    sent = parcel.sent_to(memory.device)
    return [
        KernelStep(
            sent[write],
            tuple(
                Pieces(sent[first], sent[rows], sent[held], sent[tables], most_rows, most_held)
                for (first, rows, held, tables), most_rows, most_held in launches
            ),
        )
        for write, launches in planned
    ]


def written_slots(table: NDArray[np.int64], first: int, stop: int, block_tokens: int) -> NDArray[np.int64]:
    """The slots of tokens [first, stop) of a block table."""
    held = np.arange(first, stop)
    return table[held // block_tokens] * block_tokens + held % block_tokens


class _Parcel:
    """Arrays of whole numbers that travel to the device together: one copy costs as much as ten."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.int64]] = []

    def add(self, array: NDArray[np.int64]) -> int:
        """The number under which the array will be found."""
        self._arrays.append(array.astype(np.int64, copy=False))
        return len(self._arrays) - 1

    def sent_to(self, device: torch.device) -> list[Tensor]:
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in self._arrays])).to(device)
        parts = flat.split([array.size for array in self._arrays])
        return [part.view(array.shape) for part, array in zip(parts, self._arrays, strict=True)]
