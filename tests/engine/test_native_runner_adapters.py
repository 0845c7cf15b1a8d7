"""Adapters on the native runner: equal to merged weights, and without a trace in rows that have none."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ayllu.model.config import ModelConfig
from ayllu.weights.adapter import Adapter, read_adapter
from ayllu.weights.checkpoint import Checkpoint, open_checkpoint
from ayllu.weights.gguf_export import save_gguf
from tests.engine.native_models import TorchModel, native_model, saved, step
from tests.engine.small_adapters import merged_decoder, write_adapter
from tests.engine.test_native_runner import distances, some_tokens
from tests.kernels.native_blocks import SETS
from tests.model.tiny import tiny_llama, tiny_llama4, tiny_qwen2

each_set = pytest.mark.parametrize("instructions", SETS)
# Every expert is chosen: an adapter's rounding could otherwise send a token to another one.
CONFIGS = {
    "llama": tiny_llama(),
    "llama, widths of 20 and 90": replace(tiny_llama(), hidden_size=20, head_dim=10, intermediate_size=90),
    "qwen2": tiny_qwen2(),
    "llama4": tiny_llama4(layers=4, expert_step=2, top_k=4),
}


def _with_adapter(
    config: ModelConfig, tmp_path: Path, rank: int, **options: object
) -> tuple[Checkpoint, Adapter]:
    checkpoint = saved(config, tmp_path / "model")
    # Small enough that activations stay near one: what is compared is rounding, relative to them.
    written = write_adapter(
        tmp_path / "adapter",
        config,
        rank,
        rank=rank,
        std=0.4 / (rank * 64) ** 0.25,
        **options,  # type: ignore[arg-type]
    )
    return checkpoint, read_adapter(written, checkpoint.config)


@each_set
@pytest.mark.parametrize("rank", [1, 4, 16, 35])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_an_adapter_is_the_merged_weights(name: str, rank: int, instructions: str, tmp_path: Path) -> None:
    checkpoint, adapter = _with_adapter(CONFIGS[name], tmp_path, rank)
    oracle = TorchModel.of(checkpoint)
    merged = TorchModel(merged_decoder(oracle.decoder, adapter))
    native = native_model(checkpoint, threads=1 + rank % 2, instructions=instructions)
    identity = native.runner.adapters.load("tuned", adapter)
    tokens = some_tokens(60)
    found = native.whole(tokens, identity)
    expected = merged.whole(tokens, native.block_tokens)
    rounded = distances(found, expected)
    assert np.median(rounded) < 0.004
    assert rounded.max() < 0.03
    assert np.median(distances(found, oracle.whole(tokens, native.block_tokens))) > 0.1


@each_set
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_several_adapters_and_of_none_are_each_their_own(
    threads: int, instructions: str, tmp_path: Path
) -> None:
    config = CONFIGS["llama4"]
    checkpoint = saved(config, tmp_path / "model")
    native = native_model(checkpoint, threads=threads, tokens=2000, instructions=instructions)
    base = native_model(checkpoint, threads=1, instructions=instructions)
    identities: list[str | None] = [None]
    for seed, rank in enumerate((3, 20)):
        written = write_adapter(
            tmp_path / str(seed), config, seed, rank=rank, targets=["v_proj", "down_proj", "up_proj"]
        )
        identities.append(native.runner.adapters.load(str(seed), read_adapter(written, checkpoint.config)))
    source = random.Random(threads)
    prompts = [(some_tokens(source.choice((1, 5, 30, 61)), i), identities[i % 3]) for i in range(9)]
    alone = [native.whole(tokens, identity) for tokens, identity in prompts]
    for (tokens, identity), found in zip(prompts, alone, strict=True):
        if identity is None:
            np.testing.assert_array_equal(found, base.whole(tokens))
    sequences = [native.sequence(tokens, identity) for tokens, identity in prompts]
    while open_ones := [sequence for sequence in sequences if sequence.left]:
        chosen = source.sample(open_ones, source.randint(1, len(open_ones)))
        step(native, [(sequence, source.choice((1, 3, 12, 61))) for sequence in chosen])
    for sequence, expected in zip(sequences, alone, strict=True):
        np.testing.assert_array_equal(sequence.hidden, expected)


@pytest.mark.parametrize(
    "targets", [["q_proj"], ["k_proj", "gate_proj"], ["o_proj", "down_proj"], ["up_proj"]]
)
def test_an_adapter_of_some_projections_changes_only_those(targets: list[str], tmp_path: Path) -> None:
    checkpoint, adapter = _with_adapter(tiny_llama(), tmp_path, 4, targets=targets, layers=[0, 2])
    native = native_model(checkpoint)
    identity = native.runner.adapters.load("tuned", adapter)
    tokens = some_tokens(40)
    merged = TorchModel(merged_decoder(TorchModel.of(checkpoint).decoder, adapter))
    rounded = distances(native.whole(tokens, identity), merged.whole(tokens, native.block_tokens))
    assert np.median(rounded) < 0.004 and rounded.max() < 0.03


def test_an_adapter_gives_the_same_beside_a_gguf_as_beside_its_folder(tmp_path: Path) -> None:
    """A GGUF has its rotary rows in another order, and so has what an adapter adds to them."""
    folder = saved(tiny_llama(), tmp_path / "model")
    gguf = open_checkpoint(save_gguf(folder, tmp_path / "model.gguf").path)
    assert folder.config.rope.layout != gguf.config.rope.layout
    written = write_adapter(tmp_path / "adapter", folder.config, 8)
    found = []
    for checkpoint in (folder, gguf):
        native = native_model(checkpoint)
        identity = native.runner.adapters.load("tuned", read_adapter(written, checkpoint.config))
        found.append(native.whole(some_tokens(30), identity))
    rounded = distances(found[1], found[0])
    assert np.median(rounded) < 0.004 and rounded.max() < 0.05


def test_a_place_is_taken_again_after_its_adapter_has_gone(tmp_path: Path) -> None:
    config = tiny_llama()
    checkpoint = saved(config, tmp_path / "model")
    native = native_model(checkpoint)
    versions = [read_adapter(write_adapter(tmp_path / f"{i}", config, i), config) for i in range(3)]
    adapters = native.runner.adapters
    tokens = some_tokens(12)
    first = [native.whole(tokens, adapters.load(str(i), version)) for i, version in enumerate(versions)]
    adapters.unload("1")
    again = adapters.load("3", versions[1])
    assert adapters.number(again) == 1
    np.testing.assert_array_equal(native.whole(tokens, again), first[1])
    np.testing.assert_array_equal(native.whole(tokens, adapters.identity("2")), first[2])
    assert adapters.number(None) is None


def test_numbers_that_are_none_stay_in_their_adapters_rows(tmp_path: Path) -> None:
    checkpoint, adapter = _with_adapter(tiny_llama(), tmp_path, 4)
    native = native_model(checkpoint)
    for change in adapter.modules.values():
        change.a[...] = np.nan
    identity = native.runner.adapters.load("broken", adapter)
    tokens = some_tokens(10)
    clean = native.whole(tokens)
    one, two = native.sequence(tokens, identity), native.sequence(tokens)
    step(native, [(one, 10), (two, 10)])
    assert np.isnan(one.hidden).any()
    np.testing.assert_array_equal(two.hidden, clean)
