"""GGUF's number formats: which exist, how their blocks are laid out, and float32 out of and into them.

A row is cut into blocks of 32 or 256 numbers that share scales. Decoding works in tiles that stay in the
processor's cache and writes where the caller says, so a model streams through without a second copy.
Layouts are those of ggml (`ggml-common.h`); the `gguf` package is the independent twin in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ayllu.errors import UnsupportedError
from ayllu.weights.tensors import Floats, MappedFile, StoredTensor

Bytes = NDArray[np.uint8]
Decoder = Callable[[Bytes, Floats, Bytes], None]
Encoder = Callable[[Floats], Bytes]

TILE_ELEMENTS = 1 << 18
"""Numbers decoded at a time: 1 MiB of float32. Smaller tiles fit the nearest cache better but measured
slower with two threads, which then meet more often at the interpreter's lock than in the arithmetic."""

_HALF = np.dtype("<f2")
_WORD = np.dtype("<u4")


def _halves(blocks: Bytes, start: int, count: int) -> Floats:
    """`count` float16 numbers at byte `start` of each block, as float32 [blocks, count]."""
    return blocks[:, start : start + 2 * count].view(_HALF).astype(np.float32)


def _nibbles(packed: Bytes, out: Bytes) -> None:
    """Low halves of `packed` [..., n] into out[..., 0, :], high halves into out[..., 1, :]."""
    np.bitwise_and(packed, 0x0F, out=out[..., 0, :])
    np.right_shift(packed, 4, out=out[..., 1, :])


def _decode_q8_0(blocks: Bytes, out: Floats, scratch: Bytes) -> None:
    np.copyto(out, blocks[:, 2:].view(np.int8))
    out *= _halves(blocks, 0, 1)


def _decode_q4_0(blocks: Bytes, out: Floats, scratch: Bytes) -> None:
    _nibbles(blocks[:, 2:], scratch.reshape(-1, 2, 16))
    scratch -= 8
    np.copyto(out, scratch.view(np.int8).reshape(out.shape))
    out *= _halves(blocks, 0, 1)


def _decode_q4_1(blocks: Bytes, out: Floats, scratch: Bytes) -> None:
    _nibbles(blocks[:, 4:], scratch.reshape(-1, 2, 16))
    np.copyto(out, scratch.reshape(out.shape))
    scale_and_minimum = _halves(blocks, 0, 2)
    out *= scale_and_minimum[:, :1]
    out += scale_and_minimum[:, 1:]


def _five_bits(packed: Bytes, high: Bytes, out: Bytes) -> None:
    """Nibbles of `packed` [n, 16] with fifth bits from the 32 bits of `high` [n, 4], into `out` [n * 32]."""
    _nibbles(packed, out.reshape(-1, 2, 16))
    fifth = np.unpackbits(np.ascontiguousarray(high).reshape(-1), bitorder="little")
    fifth <<= 4
    out |= fifth


def _decode_q5_0(blocks: Bytes, out: Floats, scratch: Bytes) -> None:
    _five_bits(blocks[:, 6:], blocks[:, 2:6], scratch)
    scratch -= 16
    np.copyto(out, scratch.view(np.int8).reshape(out.shape))
    out *= _halves(blocks, 0, 1)


def _decode_q5_1(blocks: Bytes, out: Floats, scratch: Bytes) -> None:
    _five_bits(blocks[:, 8:], blocks[:, 4:8], scratch)
    np.copyto(out, scratch.reshape(out.shape))
    scale_and_minimum = _halves(blocks, 0, 2)
    out *= scale_and_minimum[:, :1]
    out += scale_and_minimum[:, 1:]


def _scales_and_minimums(blocks: Bytes) -> tuple[Floats, Floats]:
    """The eight scales and minimums of each Q4_K or Q5_K block, float32 [blocks, 8, 1].

    Twelve bytes hold sixteen 6-bit numbers. As three little-endian words (a, b, c), four at a time:
    scales 0-3 are the low six bits of a's bytes, minimums 0-3 those of b's; scales 4-7 take c's low
    nibbles and a's top two bits, minimums 4-7 c's high nibbles and b's top two bits.
    """
    a, b, c = np.moveaxis(blocks[:, 4:16].view(_WORD), 1, 0)
    packed = np.empty((2, len(blocks), 2), _WORD)
    packed[0, :, 0] = a & 0x3F3F3F3F
    packed[1, :, 0] = b & 0x3F3F3F3F
    packed[0, :, 1] = (c & 0x0F0F0F0F) | ((a >> 2) & 0x30303030)
    packed[1, :, 1] = ((c >> 4) & 0x0F0F0F0F) | ((b >> 2) & 0x30303030)
    scales, minimums = packed.view(np.uint8).astype(np.float32)
    block_scales = _halves(blocks, 0, 2)
    scales *= block_scales[:, :1]
    minimums *= block_scales[:, 1:]
    return scales[..., None], minimums[..., None]


def _decode_q4_k(blocks: Bytes, out: Floats, scratch: Bytes) -> None:
    _nibbles(blocks[:, 16:].reshape(-1, 4, 32), scratch.reshape(-1, 4, 2, 32))
    np.copyto(out, scratch.reshape(out.shape))
    scales, minimums = _scales_and_minimums(blocks)
    groups = out.reshape(-1, 8, 32)
    groups *= scales
    groups -= minimums


def _decode_q5_k(blocks: Bytes, out: Floats, scratch: Bytes) -> None:
    _nibbles(blocks[:, 48:].reshape(-1, 4, 32), scratch.reshape(-1, 4, 2, 32))
    high = np.ascontiguousarray(blocks[:, 16:48])
    numbers = scratch.reshape(-1, 8, 32)
    for group in range(8):
        fifth = high << (4 - group) if group < 4 else high >> (group - 4)
        fifth &= 0x10
        numbers[:, group] |= fifth
    np.copyto(out, scratch.reshape(out.shape))
    scales, minimums = _scales_and_minimums(blocks)
    groups = out.reshape(-1, 8, 32)
    groups *= scales
    groups -= minimums


def _decode_q6_k(blocks: Bytes, out: Floats, scratch: Bytes) -> None:
    _nibbles(blocks[:, :128].reshape(-1, 2, 64), scratch.reshape(-1, 2, 2, 64))
    high = np.ascontiguousarray(blocks[:, 128:192]).reshape(-1, 2, 32)
    numbers = scratch.reshape(-1, 2, 4, 32)
    for quarter in range(4):
        top = high << (4 - 2 * quarter) if quarter < 2 else high >> (2 * quarter - 4)
        top &= 0x30
        numbers[:, :, quarter] |= top
    scratch -= 32
    np.copyto(out, scratch.view(np.int8).reshape(out.shape))
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    scales *= _halves(blocks, 208, 1)
    groups = out.reshape(-1, 16, 16)
    groups *= scales[..., None]


def _inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 where the scale is 0 or so small that its inverse would be infinite."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=np.abs(scale) > 3e-39)


def _encode_q8_0(blocks: Floats) -> Bytes:
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scale)
    # Halves are rounded away from zero, as C's roundf does and numpy's rint does not.
    size = np.abs(scaled)
    whole = np.floor(size)
    whole += np.floor(2 * (size - whole))
    numbers = np.copysign(whole, scaled).astype(np.int8)
    return np.concatenate([scale.astype(_HALF).view(np.uint8), numbers.view(np.uint8)], axis=1)


def _pack_nibbles(numbers: Bytes) -> Bytes:
    return numbers[:, :16] | (numbers[:, 16:] << np.uint8(4))


def _encode_q4_0(blocks: Floats) -> Bytes:
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scale = largest / np.float32(-8)
    numbers = (blocks * _inverse(scale) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate([scale.astype(_HALF).view(np.uint8), _pack_nibbles(numbers)], axis=1)


def _encode_q4_1(blocks: Floats) -> Bytes:
    minimum = blocks.min(axis=1, keepdims=True)
    scale = (blocks.max(axis=1, keepdims=True) - minimum) / np.float32(15)
    numbers = ((blocks - minimum) * _inverse(scale) + np.float32(0.5)).astype(np.uint8).clip(0, 15)
    head = np.concatenate([scale, minimum], axis=1).astype(_HALF).view(np.uint8)
    return np.concatenate([head, _pack_nibbles(numbers)], axis=1)


@dataclass(frozen=True)
class BlockType:
    """A ggml number format: `elements` numbers take `nbytes` bytes. Without a decoder only the size."""

    code: int
    name: str
    elements: int
    nbytes: int
    decode: Decoder | None = None
    encode: Encoder | None = None


BLOCK_TYPES: dict[int, BlockType] = {
    kind.code: kind
    for kind in (
        BlockType(0, "F32", 1, 4),
        BlockType(1, "F16", 1, 2),
        BlockType(2, "Q4_0", 32, 18, _decode_q4_0, _encode_q4_0),
        BlockType(3, "Q4_1", 32, 20, _decode_q4_1, _encode_q4_1),
        BlockType(6, "Q5_0", 32, 22, _decode_q5_0),
        BlockType(7, "Q5_1", 32, 24, _decode_q5_1),
        BlockType(8, "Q8_0", 32, 34, _decode_q8_0, _encode_q8_0),
        BlockType(9, "Q8_1", 32, 40),
        BlockType(10, "Q2_K", 256, 84),
        BlockType(11, "Q3_K", 256, 110),
        BlockType(12, "Q4_K", 256, 144, _decode_q4_k),
        BlockType(13, "Q5_K", 256, 176, _decode_q5_k),
        BlockType(14, "Q6_K", 256, 210, _decode_q6_k),
        BlockType(15, "Q8_K", 256, 292),
        BlockType(16, "IQ2_XXS", 256, 66),
        BlockType(17, "IQ2_XS", 256, 74),
        BlockType(18, "IQ3_XXS", 256, 98),
        BlockType(19, "IQ1_S", 256, 50),
        BlockType(20, "IQ4_NL", 32, 18),
        BlockType(21, "IQ3_S", 256, 110),
        BlockType(22, "IQ2_S", 256, 82),
        BlockType(23, "IQ4_XS", 256, 136),
        BlockType(24, "I8", 1, 1),
        BlockType(25, "I16", 1, 2),
        BlockType(26, "I32", 1, 4),
        BlockType(27, "I64", 1, 8),
        BlockType(28, "F64", 1, 8),
        BlockType(29, "IQ1_M", 256, 56),
        BlockType(30, "BF16", 1, 2),
        BlockType(34, "TQ1_0", 256, 54),
        BlockType(35, "TQ2_0", 256, 66),
        BlockType(39, "MXFP4", 32, 17),
        BlockType(40, "NVFP4", 64, 36),
        BlockType(41, "Q1_0", 128, 18),
    )
}
"""Every format that ggml numbers today. Codes missing here were withdrawn, or are not GGUF."""

BLOCK_TYPE_NAMED = {kind.name: kind for kind in BLOCK_TYPES.values()}

PLAIN_TYPES = ("F32", "F16", "BF16")
QUANTISED_TYPES = tuple(kind.name for kind in BLOCK_TYPES.values() if kind.decode is not None)
READABLE_TYPES = PLAIN_TYPES + QUANTISED_TYPES
WRITABLE_TYPES = PLAIN_TYPES + tuple(kind.name for kind in BLOCK_TYPES.values() if kind.encode is not None)


def decode_blocks(kind: BlockType, blocks: Bytes, out: Floats) -> None:
    """`blocks` [n, kind.nbytes] as float32 into `out`, C-contiguous [n, kind.elements], tile by tile."""
    if kind.decode is None:
        raise UnsupportedError(f"{kind.name} is not read.", f"Use one of {', '.join(READABLE_TYPES)}.")
    per_tile = TILE_ELEMENTS // kind.elements
    scratch = np.empty(min(per_tile, len(blocks)) * kind.elements, np.uint8)
    for start in range(0, len(blocks), per_tile):
        tile = blocks[start : start + per_tile]
        kind.decode(tile, out[start : start + per_tile], scratch[: len(tile) * kind.elements])


def encode_blocks(kind: BlockType, rows: Floats) -> Bytes:
    """float32 `rows` [n, columns] as bytes [n, columns / kind.elements * kind.nbytes].

    Raises UnsupportedError where the format is not written or the columns do not fill whole blocks.
    """
    if kind.encode is None:
        raise UnsupportedError(f"{kind.name} is not written.", f"Use one of {', '.join(WRITABLE_TYPES)}.")
    if rows.shape[1] % kind.elements:
        raise UnsupportedError(
            f"Rows of {rows.shape[1]} numbers do not fill {kind.name} blocks of {kind.elements}.", "Use F16."
        )
    blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, kind.elements)
    return kind.encode(blocks).reshape(rows.shape[0], -1)


class QuantisedTensor(StoredTensor):
    """Blocks as stored: `raw` is uint8 [rows, bytes of a row], where experts lie under each other as rows."""

    def __init__(
        self,
        kind: BlockType,
        shape: tuple[int, ...],
        raw: Bytes,
        file: MappedFile | None = None,
        span: tuple[int, int] | None = None,
    ) -> None:
        self.kind = kind
        self.encoding = kind.name
        self.shape = shape
        self.raw = raw
        self._file, self._span = file, span

    @property
    def nbytes(self) -> int:
        return int(self.raw.nbytes)

    def decode_rows_into(self, start: int, stop: int, out: Floats) -> None:
        blocks = self.raw[start:stop].reshape(-1, self.kind.nbytes)
        if out.flags.c_contiguous and out.dtype == np.float32:
            decode_blocks(self.kind, blocks, out.reshape(-1, self.kind.elements))
        else:
            out[...] = self.decode_rows(start, stop)

    def decode_rows(self, start: int, stop: int) -> Floats:
        out = np.empty((len(self.raw[start:stop]), self.shape[-1]), np.float32)
        self.decode_rows_into(start, stop, out)
        return out

    def with_rows(self, raw: Bytes) -> QuantisedTensor:
        """The same tensor with its stored rows in another order: values stay as they are."""
        return QuantisedTensor(self.kind, self.shape, raw, self._file, self._span)

    def release(self) -> None:
        if self._file is not None and self._span is not None:
            self._file.release(*self._span)
