"""What the native runner takes of memory beside weights: its cache to the byte, and a bound of one step.

Follows `kernels/native/decoder.cpp`, where `make_cache` lays tiles out and `reserve` and `plan` size the
buffers of a step, which are kept from step to step. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ayllu.engine.layer_groups import layer_groups
from ayllu.engine.working_memory import FIXED_BYTES, LOGIT_ROWS, MARGIN, NUMBER_BYTES, image_numbers
from ayllu.model.config import ModelConfig

TILE_TOKENS = 16
"""Positions that a tile has room for, whether a block fills them or not."""

CHUNK_TILES = 16
"""Tiles that one task of attention goes through at a time, with one partial result for each row and head."""

SPLIT_ROWS = 16
"""Rows of a piece up to which its attention is split over the keys."""

QUERY_ROWS = 32
"""Rows of a longer piece that pass over the keys together."""

INPUT_BYTES = 8
"""Of one number that a matrix takes: as float32, bfloat16 and quantised, where a file has matrices of all
three (formats.h: blocks of 32 in 128, 64 and 48 bytes)."""

TASK_BYTES = 128
"""Of one task of attention, and of sorting it."""

TOWER_LIBRARY_BYTES = 256 << 20
"""torch itself, which is imported when the first image comes."""


@dataclass(frozen=True)
class NativeNeeds:
    """Of the native runner. int8: how it keeps keys and values. reads_images: whether torch may come in."""

    config: ModelConfig
    threads: int
    int8: bool = False
    reads_images: bool = False

    def block_bytes(self, block_tokens: int) -> int:
        """Tiles of keys and of values, whose rows are padded to 16 numbers: in bfloat16, or in 8 bits and
        then with a scale for every position."""
        config = self.config
        numbers = (config.head_dim + _padded(config.head_dim)) * TILE_TOKENS
        tile = numbers + 2 * TILE_TOKENS * NUMBER_BYTES if self.int8 else 2 * numbers
        return block_tokens // tile_tokens(block_tokens) * config.num_key_value_heads * tile

    def working_bytes(self, *, context: int, slots: int, step_tokens: int, block_tokens: int) -> int:
        """5/4 x (rows, partial attention, scratch of every thread, logits, and the largest of them twice, as
        a buffer is copied to grow) and 64 MiB; with images their tower's as well."""
        rows = max(step_tokens, slots, LOGIT_ROWS)
        buffers = [
            *self._row_buffers(rows),
            self._partial_bytes(context, slots, rows, tile_tokens(block_tokens)),
            self.threads * self._scratch_bytes(),
            (max(slots, LOGIT_ROWS) + 6) * self.config.vocab_size * NUMBER_BYTES,
        ]
        total = sum(buffers) + max(buffers)
        vision = self.config.vision
        if self.reads_images and vision is not None:
            total += image_numbers(vision, self.config.hidden_size) * NUMBER_BYTES + TOWER_LIBRARY_BYTES
        return total * MARGIN[0] // MARGIN[1] + FIXED_BYTES

    def in_bfloat16(self) -> None:
        """It computes in the file's precision, whatever is asked for."""
        return

    def _row_buffers(self, rows: int) -> list[int]:
        """Everything that there is once for each row of a step."""
        config, experts = self.config, self.config.experts
        queries = config.num_attention_heads * config.head_dim
        # x, its normalised copy, and what is handed out of this step and the one before.
        numbers = 4 * [config.hidden_size]
        # q, k and v together, queries once more, what attention gives, the angles of rotation.
        numbers += [queries + 2 * config.num_key_value_heads * config.head_dim]
        numbers += [queries, queries, config.head_dim]
        copies, hidden, dense = 1, self._dense_width(), self._dense_width()
        if experts is not None and config.expert_layers:
            copies = experts.top_k
            hidden = max(dense, copies * experts.intermediate_size)
            numbers += [experts.num_experts, 3 * copies, *2 * [copies * config.hidden_size]]
        # Gate and up lie apart where their formats differ or an adapter changes them.
        numbers += [hidden, dense]
        inputs = rows * copies * (self._widest() + 32) * INPUT_BYTES
        return [*(rows * count * NUMBER_BYTES for count in numbers), inputs]

    def _dense_width(self) -> int:
        """Of the widest feed-forward that every row goes through: a mixture's is its shared expert's."""
        config = self.config
        widths = [config.intermediate_size] if any(not layer.experts for layer in config.layers) else []
        if config.experts is not None and config.expert_layers:
            widths.append(config.experts.shared_intermediate_size)
        return max(TILE_TOKENS, *widths)

    def _widest(self) -> int:
        """Of all that a matrix takes."""
        config = self.config
        experts = config.experts.intermediate_size if config.experts and config.expert_layers else 0
        queries = config.num_attention_heads * config.head_dim
        return max(config.hidden_size, queries, self._dense_width(), experts)

    def _partial_bytes(self, context: int, slots: int, rows: int, tile: int) -> int:
        """Results of attention to some tiles each, of pieces that are split over keys, and the tasks."""
        config = self.config
        keys = max(group.held_tokens(context) for group in layer_groups(config))
        chunks = -(-keys // (CHUNK_TILES * tile))
        split = min(rows, slots * SPLIT_ROWS)
        each = (_padded(config.head_dim) + 16) * NUMBER_BYTES
        tasks = min(slots, rows) * (chunks + 1) + rows // QUERY_ROWS
        groups = len(layer_groups(config))
        partials = split * config.num_attention_heads * chunks * each
        return partials + groups * tasks * config.num_key_value_heads * TASK_BYTES

    def _scratch_bytes(self) -> int:
        """Of one thread: unpacked panels or tiles, and the attention of a task (choose.cpp)."""
        config = self.config
        width, padded = self._widest(), _padded(config.head_dim)
        panels, tiles = 2 * -(-width // 32) * (512 + 256), CHUNK_TILES * 2 * padded * 32
        queries = QUERY_ROWS * (config.num_attention_heads // config.num_key_value_heads) + 8
        return max(panels, tiles, width * 64 + 4096) + 128 + (padded + 16) * queries * NUMBER_BYTES


def tile_tokens(block_tokens: int) -> int:
    """Positions in a tile: as many as there is room for that divide a block."""
    return next(size for size in range(min(TILE_TOKENS, block_tokens), 0, -1) if block_tokens % size == 0)


def _padded(head_dim: int) -> int:
    return -(-head_dim // 16) * 16
