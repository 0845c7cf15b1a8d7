"""The native decoder as an object: shape and weights go in, steps over a paged cache come out.

Plain data only: what a model's file or a request is, nobody here knows. The slow twin is
`ayllu.model.decoder.Decoder` over `ayllu.engine.paged_memory`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ayllu.errors import UnsupportedError
from ayllu.kernels.native.library import FORMAT_CODES, Floats, PackedMatrix, check, native_library

Int32s = NDArray[np.int32]

MATRIX_SLOTS = (
    *("attention.q_proj.weight", "attention.k_proj.weight", "attention.v_proj.weight"),
    "attention.o_proj.weight",
    *("gate", "up", "down"),
    "feed_forward.router.weight",
    *("feed_forward.experts.gate_proj", "feed_forward.experts.up_proj", "feed_forward.experts.down_proj"),
)
"""Names within a layer, in the order of the C interface; gate, up and down: dense, or the shared expert's."""

VECTOR_SLOTS = (
    "attention_norm.weight",
    "feed_forward_norm.weight",
    *("attention.q_proj.bias", "attention.k_proj.bias", "attention.v_proj.bias"),
)

PROJECTIONS = (
    *("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)
"""What a low-rank adapter may change, in the order of the C interface."""


class _Shape(ctypes.Structure):
    _fields_ = [
        *[
            (name, ctypes.c_int32)
            for name in (
                *("vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_dim"),
                *("experts", "top_k", "interleaved", "qk_norm"),
            )
        ],
        *[(name, ctypes.c_float) for name in ("norm_eps", "temperature_floor", "temperature_scale")],
    ]


class _LowRank(ctypes.Structure):
    _fields_ = [("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("rank", ctypes.c_int64)]


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """Sizes and switches of a decoder. temperature: floor and scale of Llama 4's query sharpening."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int = 0
    top_k: int = 0
    interleaved: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-5
    temperature: tuple[float, float] | None = None


@dataclass(frozen=True)
class LayerKind:
    """What one layer does. group: whose block tables it uses. chunk None: it sees everything earlier."""

    rotates: bool
    mixture: bool
    group: int
    chunk: int | None


@dataclass(frozen=True, eq=False)
class LowRankChange:
    """y += b (a x), with a [rank, inputs] and b [outputs, rank], both packed as F32."""

    a: PackedMatrix
    b: PackedMatrix


@dataclass(frozen=True, eq=False)
class NativePiece:
    """Tokens of one sequence from position `start` on. tables: its blocks per layer group, int32. given: rows
    that take the place of tokens' embeddings, by place in the piece."""

    tokens: Int32s
    start: int
    tables: Sequence[Int32s]
    adapter: int | None = None
    given: Mapping[int, Floats] | None = None


class NativeDecoder:
    """A decoder in native code with its cache. Not for use by two threads at once.

    Raises UnsupportedError where the library or the wanted instruction set is not there.
    """

    def __init__(
        self,
        shape: DecoderShape,
        layers: Sequence[LayerKind],
        frequencies: Sequence[float],
        *,
        threads: int,
        instruction_set: str | None = None,
    ) -> None:
        self._library = native_library()
        self.shape = shape
        self.groups = 1 + max(layer.group for layer in layers)
        self._kept: list[object] = []
        floor, scale = shape.temperature or (0.0, 0.0)
        given = _Shape(
            *(shape.vocab_size, shape.hidden_size, shape.layers, shape.heads, shape.kv_heads),
            *(shape.head_dim, shape.experts, shape.top_k, shape.interleaved, shape.qk_norm),
            *(shape.norm_eps, floor, scale),
        )
        angles = np.array(frequencies, np.float32)
        name = None if instruction_set is None else instruction_set.encode()
        self._handle = self._library.ayllu_decoder_new(ctypes.byref(given), angles.ctypes.data, name, threads)
        if not self._handle:
            raise UnsupportedError(
                f"This processor does not run the {instruction_set} kernels.", "Leave the choice to ayllu."
            )
        for index, layer in enumerate(layers):
            self._library.ayllu_decoder_set_layer(
                self._handle, index, layer.rotates, layer.mixture, layer.group, layer.chunk or 0
            )

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.ayllu_decoder_free(self._handle)

    def set_matrix(self, layer: int, slot: str, matrix: PackedMatrix) -> None:
        """Give a layer one of `MATRIX_SLOTS`; the memory is kept."""
        self._set_matrix(layer, MATRIX_SLOTS.index(slot), matrix)

    def set_head(self, matrix: PackedMatrix) -> None:
        """Give the output head."""
        self._set_matrix(-1, 1, matrix)

    def set_embedding(self, matrix: PackedMatrix) -> None:
        """Give the embedding as a packed matrix, which may be the head's."""
        self._set_matrix(-1, 0, matrix)

    def set_embedding_rows(self, encoding: str, address: int, stride: int, owner: object) -> None:
        """Give the embedding as stored rows, `stride` bytes apart."""
        self._kept.append(owner)
        self._library.ayllu_decoder_set_embedding_rows(self._handle, FORMAT_CODES[encoding], address, stride)

    def _set_matrix(self, layer: int, slot: int, matrix: PackedMatrix) -> None:
        self._kept.append(matrix)
        self._library.ayllu_decoder_set_matrix(
            self._handle, layer, slot, matrix.code, matrix.rows, matrix.cols, matrix.address
        )

    def set_vector(self, layer: int, slot: str, values: Floats) -> None:
        """Give a layer one of `VECTOR_SLOTS`."""
        self._set_vector(layer, VECTOR_SLOTS.index(slot), values)

    def set_final_norm(self, values: Floats) -> None:
        """Give the norm before the head."""
        self._set_vector(-1, 0, values)

    def _set_vector(self, layer: int, slot: int, values: Floats) -> None:
        values = np.ascontiguousarray(values, np.float32)
        self._kept.append(values)
        self._library.ayllu_decoder_set_vector(self._handle, layer, slot, values.ctypes.data)

    def make_cache(self, blocks: Sequence[int], block_tokens: int, *, int8: bool = False) -> None:
        """Set aside cache blocks per layer group. Memory that no sequence has needed yet costs nothing.

        Raises NoSpaceError.
        """
        counts = np.array(blocks, np.int64)
        code = self._library.ayllu_decoder_make_cache(
            self._handle, len(counts), counts.ctypes.data, block_tokens, int8
        )
        check(code, "the cache")

    @property
    def cache_bytes(self) -> int:
        """Bytes set aside for keys and values."""
        return int(self._library.ayllu_decoder_cache_bytes(self._handle))

    def advise_experts(self) -> None:
        """Ask the system for the chosen experts' pages ahead of their use: for experts mapped from a file."""
        self._library.ayllu_decoder_advise_experts(self._handle, True)

    @property
    def experts_read(self) -> int:
        """How many times an expert's matrices were read."""
        return int(self._library.ayllu_decoder_experts_read(self._handle))

    def add_adapter(self, changes: Mapping[tuple[int, str], LowRankChange]) -> int:
        """Make an adapter's changes, by layer and one of `PROJECTIONS`, available to pieces; its number. The
        matrices must live until `remove_adapter`."""
        parts = (_LowRank * (self.shape.layers * len(PROJECTIONS)))()
        for (layer, projection), change in changes.items():
            place = layer * len(PROJECTIONS) + PROJECTIONS.index(projection)
            parts[place] = _LowRank(change.a.address, change.b.address, change.a.rows)
        number = self._library.ayllu_decoder_add_adapter(self._handle, ctypes.byref(parts), len(parts))
        assert number >= 0, "the native runner has no memory left for an adapter"
        return int(number)

    def remove_adapter(self, number: int) -> None:
        """Forget an adapter; its matrices may go."""
        self._library.ayllu_decoder_remove_adapter(self._handle, number)

    def forward(self, pieces: Sequence[NativePiece]) -> Floats:
        """Write the pieces' keys and values; their hidden states, float32 [all rows, hidden_size]."""
        count = len(pieces)
        rows = np.fromiter((len(piece.tokens) for piece in pieces), np.int32, count)
        starts = np.fromiter((piece.start for piece in pieces), np.int64, count)
        adapters = np.fromiter(
            (-1 if piece.adapter is None else piece.adapter for piece in pieces), np.int32, count
        )
        tables = [table for piece in pieces for table in piece.tables]
        pointers = np.fromiter((table.ctypes.data for table in tables), np.uintp, len(tables))
        tokens = np.concatenate([piece.tokens for piece in pieces])
        given, kept = self._given(pieces, int(rows.sum()))
        hidden = np.empty((len(tokens), self.shape.hidden_size), np.float32)
        code = self._library.ayllu_decoder_forward(
            self._handle,
            count,
            rows.ctypes.data,
            starts.ctypes.data,
            adapters.ctypes.data,
            pointers.ctypes.data,
            self.groups,
            tokens.ctypes.data,
            None if given is None else given.ctypes.data,
            hidden.ctypes.data,
        )
        check(code, "a step")
        del kept
        return hidden

    def _given(
        self, pieces: Sequence[NativePiece], rows: int
    ) -> tuple[NDArray[np.uintp] | None, list[Floats]]:
        if not any(piece.given for piece in pieces):
            return None, []
        pointers = np.zeros(rows, np.uintp)
        kept = []
        first = 0
        for piece in pieces:
            for place, row in (piece.given or {}).items():
                row = np.ascontiguousarray(row, np.float32)
                kept.append(row)
                pointers[first + place] = row.ctypes.data
            first += len(piece.tokens)
        return pointers, kept

    def logits(self, rows: Sequence[Floats]) -> Floats:
        """Logits [len(rows), vocab_size] of rows [hidden_size] of hidden states."""
        pointers = np.fromiter((row.ctypes.data for row in rows), np.uintp, len(rows))
        out = np.empty((len(rows), self.shape.vocab_size), np.float32)
        check(
            self._library.ayllu_decoder_logits(
                self._handle, pointers.ctypes.data, len(rows), out.ctypes.data
            ),
            "logits",
        )
        return out
