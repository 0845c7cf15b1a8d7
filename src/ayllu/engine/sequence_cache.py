"""What one sequence remembers between steps: keys and values of every layer, held by an `Attend`.

Layers that see everything keep everything; chunked layers keep at most the chunk that is being written.
This is the plain, contiguous form; it is also the oracle that faster caches are tested against.

Legend: S new tokens, T kept tokens, H query heads, G key-value heads, d head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ayllu.model.attention import attention, visible
from ayllu.model.config import ModelConfig


class _LayerMemory:
    """Keys and values of one layer for positions [first, stop), in buffers that double when full."""

    def __init__(self) -> None:
        self.first = 0
        self.stop = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._buffers is None else sum(buffer.nbytes for buffer in self._buffers)

    def append(self, k_SGd: Tensor, v_SGd: Tensor) -> tuple[Tensor, Tensor]:
        """Everything held, the new rows included, as views [T, G, d]."""
        held, new = self.stop - self.first, k_SGd.shape[0]
        if self._buffers is None or self._buffers[0].shape[0] < held + new:
            self._grow(held, new, k_SGd)
        assert self._buffers is not None
        for buffer, rows in zip(self._buffers, (k_SGd, v_SGd), strict=True):
            buffer[held : held + new] = rows
        self.stop += new
        return self._buffers[0][: held + new], self._buffers[1][: held + new]

    def _grow(self, held: int, new: int, like: Tensor) -> None:
        capacity = max(64, held + new, min(2 * held, held + 4096))
        grown = tuple(like.new_empty(capacity, *like.shape[1:]) for _ in range(2))
        if self._buffers is not None:
            for old, buffer in zip(self._buffers, grown, strict=True):
                buffer[:held] = old[:held]
        self._buffers = (grown[0], grown[1])

    def drop_before(self, position: int) -> None:
        """Forget what no later token of a chunked layer can see."""
        if position <= self.first:
            return
        kept = max(0, self.stop - position)
        if self._buffers is not None:
            # The remainder moves into buffers of its own size: keeping the large ones would hold the memory.
            offset = self.stop - self.first - kept
            parts = [buffer[offset : offset + kept].clone() for buffer in self._buffers]
            self._buffers = (parts[0], parts[1]) if kept else None
        self.first, self.stop = max(position, self.first), max(position, self.stop)

    def cut(self, length: int) -> None:
        """Forget positions from `length` on."""
        self.stop = max(self.first, min(self.stop, length))


class SequenceCache:
    """The memory of one growing sequence. Pass it to the decoder as `attend` with unbatched [S, ...] rows."""

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        self._chunks = [layer.chunk for layer in config.layers]
        self._memories = [_LayerMemory() for _ in config.layers]
        self._device = torch.device(device)
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes held now, spare room of the buffers included."""
        return sum(memory.nbytes for memory in self._memories)

    def tokens_held(self, layer: int) -> int:
        """Positions whose keys layer `layer` holds."""
        memory = self._memories[layer]
        return memory.stop - memory.first

    def next_positions(self, count: int) -> Tensor:
        """Absolute positions [count] of the next tokens."""
        return torch.arange(self.length, self.length + count, device=self._device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        memory, chunk = self._memories[layer], self._chunks[layer]
        keys, values = memory.append(k, v)
        queries = torch.arange(memory.stop - q.shape[0], memory.stop, device=q.device)
        held = torch.arange(memory.first, memory.stop, device=q.device)
        seen = visible(queries, held, chunk)
        return attention(q[None], keys[None], values[None], seen[None])[0]

    def advance(self, count: int) -> None:
        """Note that `count` tokens went through all layers; chunked layers forget finished chunks."""
        self.length += count
        for memory, chunk in zip(self._memories, self._chunks, strict=True):
            if chunk is not None:
                memory.drop_before(self.length // chunk * chunk)

    def rewind(self, length: int) -> int:
        """Go back to at most `length` tokens, and return how many are really kept.

        A chunked layer has forgotten earlier chunks, so going back into one must go on to its beginning:
        from there on, nothing of what was forgotten is needed.
        """
        while True:
            start = length
            for memory, chunk in zip(self._memories, self._chunks, strict=True):
                if chunk is not None and memory.first > start // chunk * chunk:
                    start = start // chunk * chunk
            if start == length:
                break
            length = start
        for memory, chunk in zip(self._memories, self._chunks, strict=True):
            memory.cut(length)
            if chunk is not None and memory.first > length:
                memory.first = memory.stop = length
        self.length = length
        return length
