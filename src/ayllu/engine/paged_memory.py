"""Keys and values in blocks: where a step writes them, and the attention that reads them back.

`PagedMemory` is the storage, one pair of tensors per layer. `PagedAttention` is the decoder's `attend` for
one step over packed pieces of many sequences. Plain torch; its slow twin is `sequence_cache`.

Legend: S rows of one piece, B pieces of one row, T keys, H query heads, G key-value heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ayllu.engine.layer_groups import LayerGroup
from ayllu.model.attention import attention, visible
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


class PagedAttention:
    """The `Attend` of one step. Writes the step's keys and values into the memory, then attends."""

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
