"""Small models on the native runner, through real files, and what they are held to, for tests.

`RoundedAttention` is the slow twin of the native attention: queries, keys, values and softmax weights in
bfloat16, sums in float32. With it the torch decoder differs from the native one by float32 rounding, and by
what that moves across a border of bfloat16.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ayllu.engine.layer_groups import LayerGroup, fitting_block_tokens, layer_groups
from ayllu.engine.native_adapters import NativeAdapters
from ayllu.engine.native_images import TowerRows
from ayllu.engine.native_runner import NativeRunner, native_decoder
from ayllu.engine.packed_weights import pack_weights, unpackable
from ayllu.engine.prepared import PreparedImage
from ayllu.engine.step_runner import RunnerPiece
from ayllu.kernels.native.library import Floats
from ayllu.kernels.reference.quantised import bfloat16_inputs, rounded_inputs
from ayllu.model.attention import Attend, WholeSequence
from ayllu.model.config import LayerSpec, ModelConfig
from ayllu.model.decoder import Decoder
from ayllu.weights.checkpoint import Checkpoint, open_checkpoint
from ayllu.weights.gguf_export import save_gguf
from ayllu.weights.hf_save import save_folder
from ayllu.weights.load import load_decoder
from tests.model.tiny import tiny_llama, tiny_llama4, tiny_qwen2
from tests.weights.small_checkpoints import random_checkpoint

CHUNK_TILES = 16
"""Tiles of keys whose weights are rounded together (kernels.h)."""

CONFIGS: dict[str, ModelConfig] = {
    "llama": tiny_llama(),
    "llama, untied": tiny_llama(tied=False),
    "llama, heads of 20": replace(tiny_llama(tied=False), head_dim=20, hidden_size=56, intermediate_size=90),
    "llama, heads of 6": replace(tiny_llama(), head_dim=6, num_attention_heads=6, num_key_value_heads=1),
    "llama, heads of 80": replace(tiny_llama(), head_dim=80, num_attention_heads=3, num_key_value_heads=3),
    "qwen2": tiny_qwen2(),
    "llama4, step 1": tiny_llama4(layers=4),
    "llama4, step 2, top 2": tiny_llama4(layers=4, expert_step=2, qk_norm=False, top_k=2),
    "llama4, all experts": tiny_llama4(layers=5, expert_step=2, top_k=4),
}


def saved(config: ModelConfig, path: Path, *, encoding: str | None = None, seed: int = 3) -> Checkpoint:
    """A random checkpoint, written and opened again: GGUF if `path` ends so, else a folder of safetensors.

    Norms are near one and matrices of a size that keeps activations near it, as in trained networks.
    """
    checkpoint = random_checkpoint(config, seed)
    rng = np.random.default_rng(seed)
    for name, stored in checkpoint.tensors.items():
        if name.endswith("norm.weight"):
            stored.array[...] = rng.uniform(0.5, 1.5, stored.shape)  # type: ignore[attr-defined]
        else:
            stored.array[...] *= 1.5  # type: ignore[attr-defined]
    if path.suffix == ".gguf":
        return open_checkpoint(save_gguf(checkpoint, path, encoding).path)
    save_folder(checkpoint, path, encoding=encoding)
    return open_checkpoint(path)


@dataclass
class NativeModel:
    """A native runner over a checkpoint, with the groups and the cache that tests share out by hand."""

    runner: NativeRunner
    config: ModelConfig
    groups: tuple[LayerGroup, ...]
    block_tokens: int
    blocks: int
    free: list[list[int]] = field(default_factory=list)

    def shuffle(self, source: random.Random) -> None:
        """All blocks are free again, in another order."""
        self.free = [source.sample(range(self.blocks), self.blocks) for _ in self.groups]

    def sequence(
        self,
        tokens: Sequence[int],
        adapter: str | None = None,
        images: tuple[PreparedImage, ...] = (),
    ) -> NativeSequence:
        if not self.free:
            self.free = [list(range(self.blocks))[::-1] for _ in self.groups]
        return NativeSequence(self, list(tokens), adapter, images)

    def whole(
        self,
        tokens: Sequence[int],
        adapter: str | None = None,
        images: tuple[PreparedImage, ...] = (),
    ) -> Floats:
        """Hidden states [tokens, D], computed in as few steps as the chunks allow; its blocks come back."""
        sequence = self.sequence(tokens, adapter, images)
        while sequence.left:
            step(self, [(sequence, sequence.left)])
        sequence.drop()
        return sequence.hidden

    def logits(self, hidden: Floats) -> Floats:
        return self.runner.logits([(hidden, row) for row in range(len(hidden))])


class NativeSequence:
    """Tokens that go through the runner piece by piece, in blocks of their own."""

    def __init__(
        self,
        model: NativeModel,
        tokens: list[int],
        adapter: str | None,
        images: tuple[PreparedImage, ...],
    ) -> None:
        self.model = model
        self.images = images
        self.tokens = tokens
        self.adapter = adapter
        self.done = 0
        self.tables: list[list[int]] = [[] for _ in model.groups]
        self._parts: list[Floats] = []

    @property
    def left(self) -> int:
        return len(self.tokens) - self.done

    @property
    def hidden(self) -> Floats:
        return np.concatenate(self._parts)

    def piece(self, wanted: int) -> RunnerPiece:
        """The next tokens, at most `wanted`, up to the next border of a chunk."""
        start, stop = self.done, self.done + min(wanted, self.left)
        for group, table, free in zip(self.model.groups, self.tables, self.model.free, strict=True):
            begin = 0
            if group.chunk is not None:
                begin = start // group.chunk * group.chunk
                stop = min(stop, begin + group.chunk)
                if start == begin:
                    free.extend(table)
                    table.clear()
            while len(table) * self.model.block_tokens < stop - begin:
                table.append(free.pop())
        vision = self.model.config.vision
        return RunnerPiece(
            self.tokens[start:stop],
            start,
            [list(table) for table in self.tables],
            self.adapter,
            self.images,
            0 if vision is None else self.tokens[:start].count(vision.patch_token_id),
        )

    def take(self, hidden: Floats) -> None:
        self._parts.append(hidden.copy())
        self.done += len(hidden)

    def drop(self) -> None:
        for table, free in zip(self.tables, self.model.free, strict=True):
            free.extend(table)
            table.clear()


def step(model: NativeModel, wanted: Sequence[tuple[NativeSequence, int]]) -> None:
    """One step with pieces of several sequences."""
    pieces = [sequence.piece(count) for sequence, count in wanted]
    for (sequence, _), hidden in zip(wanted, model.runner.forward(pieces), strict=True):
        sequence.take(hidden)


def native_model(
    checkpoint: Checkpoint,
    *,
    block_tokens: int = 8,
    tokens: int = 512,
    threads: int = 1,
    instructions: str | None = None,
    int8: bool = False,
) -> NativeModel:
    """A checkpoint on the native runner with a cache of about `tokens` per group."""
    assert unpackable(checkpoint) is None, unpackable(checkpoint)
    groups = layer_groups(checkpoint.config)
    size = fitting_block_tokens(groups, block_tokens)
    decoder = native_decoder(
        checkpoint.config,
        pack_weights(checkpoint, threads=1),
        groups,
        threads=threads,
        instruction_set=instructions,
    )
    blocks = -(-tokens // size)
    decoder.make_cache([blocks] * len(groups), size, int8=int8)
    return NativeModel(
        NativeRunner(
            checkpoint.config,
            decoder,
            NativeAdapters(decoder, checkpoint.config),
            (lambda: TowerRows(checkpoint, 1 << 20)) if checkpoint.config.vision else None,
        ),
        checkpoint.config,
        groups,
        size,
        blocks,
    )


@dataclass(frozen=True)
class TorchModel:
    """The oracle in float32 over the same file."""

    decoder: Decoder

    @staticmethod
    def of(checkpoint: Checkpoint) -> TorchModel:
        return TorchModel(load_decoder(checkpoint, dtype=torch.float32))

    @torch.no_grad()
    def whole(
        self,
        tokens: Sequence[int],
        block_tokens: int | None = None,
        images: Sequence[PreparedImage] = (),
    ) -> Floats:
        """Hidden states [tokens, D]; with `block_tokens`, attention rounds as the native runner's does."""
        positions = torch.arange(len(tokens))[None]
        attend: Attend = WholeSequence(self.decoder.config.layers, positions)
        if block_tokens is not None:
            attend = RoundedAttention(self.decoder.config.layers, block_tokens)
        pixels = [torch.from_numpy(image.pixels) for image in images]
        rows = self.decoder.image_rows(torch.cat(pixels)) if pixels else None
        embedded = self.decoder.embed(torch.tensor([list(tokens)]), rows)
        hidden: Tensor = self.decoder(embedded, positions, attend)
        return hidden[0].numpy()

    @torch.no_grad()
    def logits(self, hidden: Floats) -> Floats:
        found: Tensor = self.decoder.logits(torch.from_numpy(hidden))
        return found.numpy()


@contextmanager
def rounding_inputs(decoder: Decoder, encoding: str) -> Iterator[None]:
    """Inside, every matrix sees its inputs rounded as the native runner's of `encoding` does."""
    if encoding in ("F32", "F16"):
        yield
        return
    rounded = bfloat16_inputs if encoding == "BF16" else rounded_inputs

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0].detach()
        return (torch.from_numpy(rounded(x.flatten(0, -2).numpy()).astype(np.float32)).view_as(x),)

    hooks = [m.register_forward_pre_hook(before) for m in decoder.modules() if isinstance(m, nn.Linear)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class RoundedAttention:
    """An `Attend` for one whole sequence, [1, S, heads, head_dim], that rounds where the native one does.

    Queries are scaled so that weights are powers of two before anything is rounded. Keys are taken in chunks
    of sixteen tiles; a tile is the largest part of a block of at most 16 keys. Weights relative to their
    chunk's best are rounded, what they are divided by is not.
    """

    def __init__(self, layers: Sequence[LayerSpec], block_tokens: int) -> None:
        tile = max(size for size in range(1, min(16, block_tokens) + 1) if block_tokens % size == 0)
        self._layers = layers
        self._keys = CHUNK_TILES * tile

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        share, dim = q.shape[2] // k.shape[2], q.shape[3]
        q = _rounded(q[0] * (dim**-0.5 / math.log(2)))
        k, v = (_rounded(x[0]).repeat_interleave(share, 1) for x in (k, v))
        out = torch.empty_like(q)
        chunk = self._layers[layer].chunk
        for row in range(len(q)):
            begin = 0 if chunk is None else row // chunk * chunk
            out[row] = self._one(q[row], k[begin : row + 1], v[begin : row + 1])
        return out[None]

    def _one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [H, d], k and v [T, H, d] -> [H, d]."""
        sums, totals, bests = [], [], []
        for keys, values in zip(k.split(self._keys), v.split(self._keys), strict=True):
            scores = torch.einsum("hd,thd->ht", q, keys)
            bests.append(scores.amax(-1))
            weights = (scores - bests[-1][:, None]).exp2()
            totals.append(weights.sum(-1))
            sums.append(torch.einsum("ht,thd->hd", _rounded(weights), values))
        shares = (torch.stack(bests) - torch.stack(bests).amax(0)).exp2()
        total = (shares * torch.stack(totals)).sum(0)
        return (shares[..., None] * torch.stack(sums)).sum(0) / total[:, None]


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()
