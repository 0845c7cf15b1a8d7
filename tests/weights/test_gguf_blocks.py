"""GGUF number formats against the `gguf` package, bit for bit, on random blocks and real tensors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

from ayllu.errors import UnsupportedError
from ayllu.weights import gguf_blocks
from ayllu.weights.gguf import read_gguf
from ayllu.weights.gguf_blocks import (
    BLOCK_TYPE_NAMED,
    BLOCK_TYPES,
    QUANTISED_TYPES,
    QuantisedTensor,
    decode_blocks,
    encode_blocks,
)
from ayllu.weights.tensors import Array, Floats

ENCODED_TYPES = ("Q8_0", "Q4_0", "Q4_1")
HALF_POSITIONS = {"Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,)}


def random_rows(name: str, rows: int, columns: int, seed: int) -> Array:
    """Random stored rows with finite scales: all other bytes may hold anything."""
    rng = np.random.default_rng(seed)
    kind = BLOCK_TYPE_NAMED[name]
    blocks = rng.integers(0, 256, (rows * columns // kind.elements, kind.nbytes), dtype=np.uint8)
    for position in HALF_POSITIONS.get(name, (0, 2)):
        scales = rng.normal(size=(len(blocks), 1)).astype("<f2")
        scales[rng.random(len(blocks)) < 0.1] = 0
        blocks[:, position : position + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def assert_same_bits(ours: Floats, theirs: Floats) -> None:
    np.testing.assert_array_equal(ours.view(np.uint32), np.ascontiguousarray(theirs).view(np.uint32))


def weights(seed: int, rows: int = 16, columns: int = 256) -> Floats:
    """Numbers as weights have them, with the awkward ones among them: zero blocks, ties, outliers."""
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=(rows, columns)) * 10.0 ** rng.integers(-6, 4, (rows, 1))).astype(np.float32)
    values[0] = 0
    values[1, :32] = np.arange(-16, 16)
    values[2, :32] = 3.0
    values[3, ::7] *= 50
    values[4] = np.round(values[4] * 2) / 2
    return values


@pytest.mark.parametrize("kind", GGMLQuantizationType, ids=lambda kind: kind.name)
def test_every_known_format_has_the_block_size_of_the_gguf_package(kind: GGMLQuantizationType) -> None:
    ours = BLOCK_TYPES[kind.value]
    assert (ours.name, ours.elements, ours.nbytes) == (kind.name, *GGML_QUANT_SIZES[kind])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", QUANTISED_TYPES)
def test_random_blocks_decode_bit_for_bit_as_the_gguf_package(name: str, seed: int) -> None:
    raw = random_rows(name, 24, 512, seed)
    tensor = QuantisedTensor(BLOCK_TYPE_NAMED[name], (24, 512), raw)
    assert_same_bits(tensor.decode(), dequantize(raw, GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", QUANTISED_TYPES)
def test_rows_decode_the_same_whichever_way_they_are_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = random_rows(name, 30, 768, seed=5)
    tensor = QuantisedTensor(BLOCK_TYPE_NAMED[name], (5, 6, 768), raw)
    whole = tensor.decode()
    assert whole.shape == (5, 6, 768)
    flat = whole.reshape(30, 768)
    monkeypatch.setattr(gguf_blocks, "TILE_ELEMENTS", 512)
    assert_same_bits(tensor.decode_rows(7, 23), flat[7:23])
    assert tensor.decode_rows(4, 4).shape == (0, 768)
    contiguous, strided = np.empty((16, 768), np.float32), np.empty((16, 1536), np.float32)[:, ::2]
    for out in (contiguous, strided):
        tensor.decode_rows_into(7, 23, out)
        np.testing.assert_array_equal(out, flat[7:23])


def test_rows_decode_the_same_in_several_threads() -> None:
    raw = random_rows("Q4_K", 64, 4096, seed=6)
    tensor = QuantisedTensor(BLOCK_TYPE_NAMED["Q4_K"], (64, 4096), raw)
    whole = tensor.decode()
    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(lambda start: tensor.decode_rows(start, start + 4), range(0, 64, 4)))
    assert_same_bits(np.concatenate(pieces), whole)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ENCODED_TYPES)
def test_weights_encode_bit_for_bit_as_the_gguf_package(name: str, seed: int) -> None:
    values = weights(seed)
    ours = encode_blocks(BLOCK_TYPE_NAMED[name], values)
    np.testing.assert_array_equal(ours, quantize(values, GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", ENCODED_TYPES)
def test_encoding_then_decoding_stays_within_one_step(name: str) -> None:
    values = np.random.default_rng(1).normal(size=(8, 256)).astype(np.float32)
    kind = BLOCK_TYPE_NAMED[name]
    tensor = QuantisedTensor(kind, values.shape, encode_blocks(kind, values))
    # Q8_0 has 127 steps to each side of zero, Q4_0 eight, Q4_1 fifteen over the block's whole range.
    steps = {"Q8_0": 127, "Q4_0": 8, "Q4_1": 7.5}[name]
    assert np.abs(tensor.decode() - values).max() <= 1.01 * np.abs(values).max() / steps


@pytest.mark.parametrize("name", ENCODED_TYPES)
def test_numbers_too_small_for_an_inverse_become_zero_instead_of_noise(name: str) -> None:
    kind = BLOCK_TYPE_NAMED[name]
    tiny = np.full((1, 32), 1e-42, np.float32)
    tiny[0, ::2] = -1e-42
    decoded = QuantisedTensor(kind, (1, 32), encode_blocks(kind, tiny)).decode()
    np.testing.assert_array_equal(decoded, np.zeros((1, 32), np.float32))


def test_stored_rows_can_be_reordered_without_decoding() -> None:
    raw = random_rows("Q6_K", 8, 256, seed=3)
    tensor = QuantisedTensor(BLOCK_TYPE_NAMED["Q6_K"], (8, 256), raw)
    order = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    assert_same_bits(tensor.with_rows(raw[order]).decode(), tensor.decode()[order])


def test_formats_that_are_not_read_or_written_say_which_are() -> None:
    with pytest.raises(UnsupportedError, match=r"IQ4_NL is not read.*Q4_K"):
        decode_blocks(BLOCK_TYPE_NAMED["IQ4_NL"], np.zeros((1, 18), np.uint8), np.zeros((1, 32), np.float32))
    with pytest.raises(UnsupportedError, match=r"Q4_K is not written.*Q8_0"):
        encode_blocks(BLOCK_TYPE_NAMED["Q4_K"], np.zeros((1, 256), np.float32))
    with pytest.raises(UnsupportedError, match="33 numbers do not fill Q8_0 blocks of 32"):
        encode_blocks(BLOCK_TYPE_NAMED["Q8_0"], np.zeros((1, 33), np.float32))


def assert_tensors_decode_as_the_gguf_package(path: Path, rows: int) -> set[str]:
    """First and last rows of every tensor of a real file; returns the formats met."""
    file = read_gguf(path)
    met = set()
    for name, info in file.infos.items():
        tensor = file.tensor(name)
        met.add(tensor.encoding)
        if isinstance(tensor, QuantisedTensor):
            kind = GGMLQuantizationType[info.kind.name]
            for start, stop in ((0, min(rows, tensor.rows)), (max(tensor.rows - rows, 0), tensor.rows)):
                assert_same_bits(tensor.decode_rows(start, stop), dequantize(tensor.raw[start:stop], kind))
    return met


def test_smollm2_decodes_bit_for_bit_as_the_gguf_package(smollm2_gguf: Path) -> None:
    assert assert_tensors_decode_as_the_gguf_package(smollm2_gguf, 40) == {"F32", "Q4_1", "Q8_0"}


@pytest.mark.large
def test_qwen_decodes_bit_for_bit_as_the_gguf_package(qwen05_gguf: Path, qwen15_gguf: Path) -> None:
    met = assert_tensors_decode_as_the_gguf_package(qwen05_gguf, 64)
    met |= assert_tensors_decode_as_the_gguf_package(qwen15_gguf, 64)
    assert met == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}
