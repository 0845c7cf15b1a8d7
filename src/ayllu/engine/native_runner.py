"""Computes steps on a CPU in native code: the fast twin of `runner`, held to it by tests. Needs no torch.

Results of a row do not depend on what else is computed with it, to the bit: so batches, prefixes found in
the cache and drafted tokens change no answer.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ayllu.engine.image_places import image_places
from ayllu.engine.layer_groups import LayerGroup
from ayllu.engine.native_adapters import NativeAdapters
from ayllu.engine.packed_weights import PackedWeights, head_name
from ayllu.engine.prepared import PreparedImage
from ayllu.engine.step_runner import RunnerPiece
from ayllu.kernels.native.decoder import DecoderShape, LayerKind, NativeDecoder, NativePiece
from ayllu.kernels.native.library import Floats
from ayllu.model.config import ModelConfig
from ayllu.model.rope_frequencies import rope_frequencies


class ImageRows(Protocol):
    """What computes the rows of images (`ayllu.engine.native_images.TowerRows` is one)."""

    def rows(self, image: PreparedImage) -> Floats:
        """float32 [tiles * tokens_per_tile, D]"""


class NativeRunner:
    """One native decoder with its cache and adapters. Not for use by two threads.

    open_images: makes what reads images when the first one comes; None for a model that reads none.
    """

    batch_invariant = True

    def __init__(
        self,
        config: ModelConfig,
        decoder: NativeDecoder,
        adapters: NativeAdapters,
        open_images: Callable[[], ImageRows] | None = None,
    ) -> None:
        self.decoder = decoder
        self.adapters = adapters
        self._vision = config.vision
        self._open_images = open_images
        self._images: ImageRows | None = None

    def forward(self, pieces: AbstractSequence[RunnerPiece]) -> list[Floats]:
        """Hidden states float32 [rows, D] of each piece."""
        hidden = self.decoder.forward(
            [
                NativePiece(
                    np.array(piece.tokens, np.int32),
                    piece.start,
                    [np.array(table, np.int32) for table in piece.tables],
                    adapter=self.adapters.number(piece.adapter),
                    given=self._given(piece) if piece.images else None,
                )
                for piece in pieces
            ]
        )
        found, row = [], 0
        for piece in pieces:
            found.append(hidden[row : row + piece.rows])
            row += piece.rows
        return found

    def _given(self, piece: RunnerPiece) -> dict[int, Floats]:
        """Image rows of a piece, by their places in it."""
        assert self._vision is not None and self._open_images is not None, "this model reads no images"
        self._images = self._images or self._open_images()
        given: dict[int, Floats] = {}
        for image, rows, places in image_places(piece, self._vision):
            computed = self._images.rows(image)
            given.update((place, computed[row]) for row, place in zip(rows, places, strict=True))
        return given

    def logits(self, rows: AbstractSequence[tuple[Floats, int]]) -> Floats:
        """Next-token logits [len(rows), vocab_size] of rows of pieces' hidden states."""
        return self.decoder.logits([hidden[row] for hidden, row in rows])

    def summed(self, hidden: Floats) -> NDArray[np.float64]:
        """The sum [D] of a piece's hidden states."""
        total: NDArray[np.float64] = hidden.sum(0, dtype=np.float64)
        return total

    def is_fatal(self, error: Exception) -> bool:
        """No error of one step harms the next."""
        return False


def native_decoder(
    config: ModelConfig,
    weights: PackedWeights,
    groups: AbstractSequence[LayerGroup],
    *,
    threads: int,
    instruction_set: str | None = None,
) -> NativeDecoder:
    """The decoder of a config over its packed weights, without a cache yet."""
    group_of = {layer: index for index, group in enumerate(groups) for layer in group.layers}
    experts, temperature = config.experts, config.temperature
    decoder = NativeDecoder(
        DecoderShape(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            experts=experts.num_experts if experts else 0,
            top_k=experts.top_k if experts else 0,
            interleaved=config.rope.layout == "interleaved",
            qk_norm=config.qk_norm,
            norm_eps=config.rms_norm_eps,
            temperature=(temperature.floor_scale, temperature.attn_scale) if temperature else None,
        ),
        [
            LayerKind(layer.rotates, layer.experts, group_of[index], layer.chunk)
            for index, layer in enumerate(config.layers)
        ],
        rope_frequencies(config.rope, config.head_dim),
        threads=threads,
        instruction_set=instruction_set,
    )
    for index, layer in enumerate(config.layers):
        feed_forward = "feed_forward.shared_expert" if layer.experts else "feed_forward"
        for slot in ("gate", "up", "down"):
            decoder.set_matrix(
                index, slot, weights.matrices[f"layers.{index}.{feed_forward}.{slot}_proj.weight"]
            )
    _place_by_name(decoder, weights)
    head = weights.matrices[head_name(config)]
    decoder.set_head(head)
    embedding = weights.embedding
    if embedding is not None:
        decoder.set_embedding_rows(embedding.encoding, embedding.address, embedding.stride, embedding.owner)
    else:
        decoder.set_embedding(weights.matrices["embed_tokens.weight"])
    return decoder


def _place_by_name(decoder: NativeDecoder, weights: PackedWeights) -> None:
    """Attention, router, experts, norms and biases: their names are the slots."""
    from ayllu.kernels.native.decoder import MATRIX_SLOTS, VECTOR_SLOTS

    slots: list[tuple[dict[str, Any], tuple[str, ...], Any]] = [
        (dict(weights.matrices), MATRIX_SLOTS, decoder.set_matrix),
        (dict(weights.vectors), VECTOR_SLOTS, decoder.set_vector),
    ]
    for named, known, place in slots:
        for name, value in named.items():
            parts = name.split(".", 2)
            if parts[0] == "layers" and parts[2] in known:
                place(int(parts[1]), parts[2], value)
    decoder.set_final_norm(weights.vectors["norm.weight"])
