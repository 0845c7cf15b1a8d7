"""The native runner against the torch decoder, and against itself however its work is cut up.

Weights are float32 here, so what is left is attention's rounding to bfloat16 (8 bits: each query, key, value
and weight is off by at most 0.4%). Against plain float32 that moves the largest number of a row of tiny
random networks by 1-7% of the numbers' size; against a twin that rounds in the same places by 0.001% usually,
1-2% where a number falls on the other side of a border.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ayllu.kernels.native.decoder import NativePiece
from ayllu.kernels.native.library import Floats
from ayllu.model.config import LayerSpec, ModelConfig
from ayllu.weights.checkpoint import Checkpoint
from tests.engine.native_models import (
    CONFIGS,
    NativeModel,
    TorchModel,
    native_model,
    rounding_inputs,
    saved,
    step,
)
from tests.kernels.native_blocks import SETS
from tests.model.tiny import tiny_llama, tiny_llama4

each_set = pytest.mark.parametrize("instructions", SETS)
ALIKE = ("llama", "llama, heads of 6", "qwen2", "llama4, step 2, top 2")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Every config as float32: odd ones as folders of safetensors, even ones as GGUF."""
    folder = tmp_path_factory.mktemp("models")
    return {
        name: saved(config, folder / (f"{index}" if index % 2 else f"{index}.gguf"), encoding=None)
        for index, (name, config) in enumerate(CONFIGS.items())
    }


def some_tokens(count: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(97) for _ in range(count)]


def usual_worst(name: str, errors: Floats) -> float:
    """The largest error; where experts are chosen, the usual one: rounding sends a token whose experts are
    almost equally good to another one, as any other rounding would, and later tokens see that."""
    chooses = "llama4" in name and "all experts" not in name
    return float(np.median(errors) if chooses else errors.max())


def distances(found: Floats, expected: Floats) -> Floats:
    """The largest difference of each row, in units of the usual size of a number."""
    return np.abs(found - expected).max(1) / np.sqrt((expected**2).mean())


@each_set
@pytest.mark.parametrize("name", list(CONFIGS))
def test_hidden_states_and_logits_are_the_oracles(
    checkpoints: dict[str, Checkpoint], name: str, instructions: str
) -> None:
    tokens = some_tokens(70)
    oracle = TorchModel.of(checkpoints[name])
    native = native_model(checkpoints[name], instructions=instructions)
    hidden = native.whole(tokens)
    expected = oracle.whole(tokens)
    assert usual_worst(name, distances(hidden, expected)) < 0.1
    assert np.median(distances(hidden, expected)) < 0.04
    rounded = distances(hidden, oracle.whole(tokens, native.block_tokens))
    assert rounded.max() < 0.03
    assert np.median(rounded) < 0.002
    logits, expected_logits = native.logits(hidden), oracle.logits(expected)
    assert usual_worst(name, distances(logits, expected_logits)) < 0.1
    np.testing.assert_allclose(logits, oracle.logits(hidden), atol=1e-4)


def _random_config(source: random.Random) -> ModelConfig:
    """A dense network of odd sizes; up to 14 queries share a key."""
    groups, share = source.choice((1, 2, 3)), source.choice((1, 2, 5, 7, 14))
    return replace(
        tiny_llama(tied=source.random() < 0.5),
        vocab_size=97,
        hidden_size=2 * source.randint(1, 60),
        num_attention_heads=groups * share,
        num_key_value_heads=groups,
        head_dim=2 * source.randint(1, 40),
        intermediate_size=source.randint(1, 130),
        layers=(LayerSpec(),) * source.randint(1, 3),
    )


@each_set
@pytest.mark.parametrize("seed", range(12))
def test_networks_of_any_size_are_the_twins_and_cut_up_the_same(
    seed: int, instructions: str, tmp_path: Path
) -> None:
    source = random.Random(seed)
    checkpoint = saved(_random_config(source), tmp_path / "model")
    native = native_model(
        checkpoint, block_tokens=source.randint(1, 20), tokens=900, instructions=instructions
    )
    oracle = TorchModel.of(checkpoint)
    prompts = [some_tokens(source.choice((1, 9, 50, 140)), i) for i in range(3)]
    expected = [native.whole(tokens) for tokens in prompts]
    for tokens, found in zip(prompts, expected, strict=True):
        rounded = distances(found, oracle.whole(tokens, native.block_tokens))
        assert np.median(rounded) < 0.01 and rounded.max() < 0.05
        np.testing.assert_allclose(native.logits(found), oracle.logits(found), atol=1e-4)
    for found, alone in zip(_in_random_pieces(native, prompts, source), expected, strict=True):
        np.testing.assert_array_equal(found, alone)


@each_set
@pytest.mark.parametrize("block_tokens", [5, 16, 32])
@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16", "int8"])
def test_many_chunks_of_keys_are_one_softmax(
    checkpoints: dict[str, Checkpoint], block_tokens: int, int8: bool, instructions: str
) -> None:
    """Keys are taken 16 tiles at a time: a token sees several such parts, whose sums are merged."""
    tokens = some_tokens(300)
    checkpoint = checkpoints["llama, heads of 20"]
    native = native_model(checkpoint, block_tokens=block_tokens, int8=int8, instructions=instructions)
    oracle = TorchModel.of(checkpoint)
    hidden = native.whole(tokens)
    if int8:
        assert distances(hidden, oracle.whole(tokens)).max() < 0.1
    else:
        rounded = distances(hidden, oracle.whole(tokens, block_tokens))
        assert rounded.max() < 0.03 and np.median(rounded) < 0.003
    sequence = native.sequence(tokens)
    step(native, [(sequence, 290)])
    while sequence.left:
        step(native, [(sequence, 1)])
    np.testing.assert_array_equal(sequence.hidden, hidden)


def _in_random_pieces(native: NativeModel, prompts: list[list[int]], source: random.Random) -> list[Floats]:
    """Hidden states of all prompts, computed together in pieces of random lengths."""
    native.shuffle(source)
    sequences = [native.sequence(tokens) for tokens in prompts]
    while open_ones := [sequence for sequence in sequences if sequence.left]:
        chosen = source.sample(open_ones, source.randint(1, len(open_ones)))
        step(native, [(s, source.choice((1, 1, 2, 8, 9, 33, source.randint(1, 80)))) for s in chosen])
    return [sequence.hidden for sequence in sequences]


@each_set
@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_and_neighbours_change_no_bit(
    checkpoints: dict[str, Checkpoint], name: str, int8: bool, seed: int, instructions: str
) -> None:
    source = random.Random(f"{seed} {name}")
    block_tokens = source.randint(1, 32)
    prompts = [some_tokens(source.choice((1, 2, 17, 40, 140)), seed + i) for i in range(5)]
    native = native_model(
        checkpoints[name], block_tokens=block_tokens, tokens=600, instructions=instructions, int8=int8
    )
    expected = [native.whole(tokens) for tokens in prompts]
    for found, alone in zip(_in_random_pieces(native, prompts, source), expected, strict=True):
        np.testing.assert_array_equal(found, alone)
    rows = [(hidden, row) for hidden in expected for row in range(len(hidden))][:30]
    together = native.runner.logits(rows)
    for row, logits in zip(rows, together, strict=True):
        np.testing.assert_array_equal(native.runner.logits([row])[0], logits)


@pytest.mark.parametrize("block_tokens", range(1, 33))
def test_every_block_size_gives_the_whole_sequences_bits(
    checkpoints: dict[str, Checkpoint], block_tokens: int
) -> None:
    source = random.Random(block_tokens)
    native = native_model(checkpoints["llama"], block_tokens=block_tokens, tokens=600)
    prompts = [some_tokens(length, block_tokens + length) for length in (150, 33, 9)]
    expected = [native.whole(tokens) for tokens in prompts]
    for found, alone in zip(_in_random_pieces(native, prompts, source), expected, strict=True):
        np.testing.assert_array_equal(found, alone)


@each_set
@pytest.mark.parametrize("name", ALIKE)
def test_threads_change_no_bit(checkpoints: dict[str, Checkpoint], name: str, instructions: str) -> None:
    prompts = [some_tokens(length, length) for length in (60, 20, 5, 1)]
    found = []
    for threads in (1, 2, 3):
        native = native_model(checkpoints[name], threads=threads, instructions=instructions)
        hidden = _in_random_pieces(native, prompts, random.Random(7))
        found.append([*hidden, native.logits(hidden[0])])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", ALIKE)
def test_an_int8_cache_costs_little(checkpoints: dict[str, Checkpoint], name: str) -> None:
    """A key or value is off by at most 1/254 of its head's largest number."""
    tokens = some_tokens(120)
    oracle = TorchModel.of(checkpoints[name])
    expected = oracle.logits(oracle.whole(tokens))
    errors = {}
    for int8 in (False, True):
        native = native_model(checkpoints[name], int8=int8)
        errors[int8] = distances(native.logits(native.whole(tokens)), expected)
    assert usual_worst(name, errors[True]) < 0.15
    assert np.median(errors[True]) < 4 * np.median(errors[False])


def test_an_int8_cache_takes_about_half_the_memory(checkpoints: dict[str, Checkpoint]) -> None:
    sizes = [
        native_model(checkpoints["llama, heads of 80"], int8=int8).runner.decoder.cache_bytes
        for int8 in (False, True)
    ]
    assert 0.5 <= sizes[1] / sizes[0] < 0.6


def _poisoned(native: NativeModel, config: ModelConfig, tokens: int, blocks: list[list[int]]) -> NativePiece:
    """A piece whose every key and value is NaN."""
    row = np.full(config.hidden_size, np.nan, np.float32)
    return NativePiece(
        np.zeros(tokens, np.int32),
        0,
        [np.array(table, np.int32) for table in blocks],
        given=dict.fromkeys(range(tokens), row),
    )


@each_set
@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("config", [tiny_llama(), tiny_llama4(layers=4, chunk=32)], ids=["llama", "llama4"])
def test_what_another_sequence_left_behind_harms_nobody(
    config: ModelConfig, int8: bool, instructions: str, tmp_path: Path
) -> None:
    """Every block holds NaN from before; whoever gets it sees only what it wrote itself."""
    for block_tokens in (1, 2, 8, 16, 32):
        native = native_model(
            saved(config, tmp_path / f"{block_tokens}.gguf"), block_tokens=block_tokens, tokens=64,
            instructions=instructions, int8=int8,
        )  # fmt: skip
        prompts = [some_tokens(length, length) for length in (1, 3, 16, 21)]
        clean = [native.whole(tokens) for tokens in prompts]
        for first in range(0, 64, 32):
            blocks = list(range(first // native.block_tokens, (first + 32) // native.block_tokens))
            piece = _poisoned(native, config, 32, [blocks] * len(native.groups))
            assert np.isnan(native.runner.decoder.forward([piece])).all()
        source = random.Random(block_tokens)
        for tokens, expected in zip(prompts, clean, strict=True):
            (found,) = _in_random_pieces(native, [tokens], source)
            np.testing.assert_array_equal(found, expected)


@each_set
@pytest.mark.parametrize("name", ["llama", "llama4, step 1"])
def test_a_sequence_that_is_nan_harms_none_beside_it(
    checkpoints: dict[str, Checkpoint], name: str, instructions: str
) -> None:
    native = native_model(checkpoints[name], threads=2, instructions=instructions)
    tokens = some_tokens(8)
    expected = native.whole(tokens)
    sequence = native.sequence(tokens)
    piece = sequence.piece(8)
    clean = NativePiece(np.array(tokens, np.int32), 0, [np.array(table, np.int32) for table in piece.tables])
    blocks = [[free.pop() for _ in range(8 // native.block_tokens)] for free in native.free]
    poison = _poisoned(native, native.config, 8, blocks)
    for pieces, place in (([poison, clean], 8), ([clean, poison], 0)):
        found = native.runner.decoder.forward(pieces)
        np.testing.assert_array_equal(found[place : place + 8], expected)
        assert np.isnan(found[8 - place : 16 - place]).all()
        assert np.isnan(native.logits(found)[8 - place : 16 - place]).all()


@pytest.mark.parametrize("name", ["llama", "llama, untied", "llama4, step 1"])
def test_given_rows_take_the_place_of_embeddings(checkpoints: dict[str, Checkpoint], name: str) -> None:
    native = native_model(checkpoints[name])
    tokens = some_tokens(8)
    table = checkpoints[name].tensors["embed_tokens.weight"].decode()
    expected = native.whole(tokens)
    piece = native.sequence(tokens).piece(8)
    tables = [np.array(one, np.int32) for one in piece.tables]
    given = {place: table[tokens[place]] for place in (0, 3, 7)}
    other = [0 if place in given else token for place, token in enumerate(tokens)]
    found = native.runner.decoder.forward([NativePiece(np.array(other, np.int32), 0, tables, given=given)])
    np.testing.assert_array_equal(found, expected)


@each_set
@pytest.mark.parametrize("encoding", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_smaller_weights_are_the_oracles_within_their_rounding(
    encoding: str, instructions: str, tmp_path: Path
) -> None:
    """The oracle has the same weights. Inputs of a matrix are rounded besides, to int8 or bfloat16: the twin
    rounds them too, and is met as closely as with float32 weights."""
    checkpoint = saved(tiny_llama(tied=False), tmp_path / "model.gguf", encoding=encoding)
    tokens = some_tokens(60)
    oracle = TorchModel.of(checkpoint)
    native = native_model(checkpoint, instructions=instructions)
    hidden = native.whole(tokens)
    error = distances(hidden, oracle.whole(tokens))
    assert np.median(error) < (0.03 if encoding == "F16" else 0.12)
    assert np.quantile(error, 0.9) < 0.3
    with rounding_inputs(oracle.decoder, encoding):
        rounded = distances(hidden, oracle.whole(tokens, native.block_tokens))
        assert np.median(rounded) < 0.02
        assert rounded.max() < 0.1
        assert np.median(distances(native.logits(hidden), oracle.logits(hidden))) < 1e-4


def test_a_step_without_tokens_and_logits_of_nothing_are_empty(checkpoints: dict[str, Checkpoint]) -> None:
    native = native_model(checkpoints["llama"])
    assert native.runner.logits([]).shape == (0, 97)


def test_only_chosen_experts_are_read(checkpoints: dict[str, Checkpoint]) -> None:
    native = native_model(checkpoints["llama4, step 1"])
    decoder = native.runner.decoder
    before = decoder.experts_read
    native.whole([1])
    assert decoder.experts_read - before == 4  # one expert in each of four layers
