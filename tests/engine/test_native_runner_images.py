"""Images on the native runner: the tower's rows, in torch, stand where the oracle puts them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ayllu.engine import open_native, runner_choice
from ayllu.engine.native_runner import NativeRunner
from ayllu.engine.open_core import open_runner
from ayllu.engine.options import EngineOptions
from ayllu.engine.prepared import PreparedImage
from ayllu.progress import SILENT
from ayllu.weights.checkpoint import Checkpoint
from tests.engine.native_models import TorchModel, native_model, saved, step
from tests.engine.test_native_runner import distances
from tests.model.tiny import tiny_llama4

PATCH = 90


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    # Every expert is chosen: rounding could otherwise send a token to another one.
    return saved(tiny_llama4(layers=4, vision=True, top_k=4), tmp_path_factory.mktemp("model") / "it")


def prompt(seed: int, config_rows: int) -> tuple[list[int], tuple[PreparedImage, ...]]:
    """Text with pictures of one or two tiles in it, two of which touch."""
    numbers, source = np.random.default_rng(seed), random.Random(seed)
    images = tuple(
        PreparedImage.of(numbers.random((tiles, 3, 56, 56), np.float32) * 2 - 1) for tiles in (1, 2, 1)
    )
    text = [[source.randrange(PATCH) for _ in range(source.randint(1, 9))] for _ in range(3)]
    return [
        *text[0], *[PATCH] * config_rows, *text[1], *[PATCH] * (3 * config_rows), *text[2],
    ], images  # fmt: skip


def test_images_are_seen_as_the_oracle_sees_them(checkpoint: Checkpoint) -> None:
    assert checkpoint.config.vision is not None
    native, oracle = native_model(checkpoint), TorchModel.of(checkpoint)
    for seed in range(3):
        tokens, images = prompt(seed, checkpoint.config.vision.tokens_per_tile)
        found = native.whole(tokens, images=images)
        rounded = distances(found, oracle.whole(tokens, native.block_tokens, images))
        assert np.median(rounded) < 0.004 and rounded.max() < 0.03
        other = native.whole(tokens, images=images[::-1])
        assert np.abs(other - found).max() > 0.1


def test_pieces_of_prompts_with_images_change_no_bit(checkpoint: Checkpoint) -> None:
    assert checkpoint.config.vision is not None
    torch.set_num_threads(1)
    native = native_model(checkpoint)
    source = random.Random(0)
    prompts = [prompt(seed, checkpoint.config.vision.tokens_per_tile) for seed in range(4)]
    expected = [native.whole(tokens, images=images) for tokens, images in prompts]
    sequences = [native.sequence(tokens, images=images) for tokens, images in prompts]
    while open_ones := [sequence for sequence in sequences if sequence.left]:
        chosen = source.sample(open_ones, source.randint(1, len(open_ones)))
        step(native, [(sequence, source.randint(1, 9)) for sequence in chosen])
    for sequence, alone in zip(sequences, expected, strict=True):
        np.testing.assert_array_equal(sequence.hidden, alone)


def test_a_model_with_a_tower_runs_natively_and_reads_images(checkpoint: Checkpoint) -> None:
    options = EngineOptions(device="cpu", context=64, slots=2)
    opened = open_runner(checkpoint, options, SILENT, "it")
    assert isinstance(opened.runner, NativeRunner)
    assert opened.reads_images and "torch" not in opened.device


def test_without_torch_it_reads_text_and_says_what_is_missing(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (open_native, runner_choice):
        monkeypatch.setattr(module, "torch_is_installed", lambda: False)
    opened = open_runner(checkpoint, EngineOptions(context=64, slots=2), SILENT, "it")
    assert isinstance(opened.runner, NativeRunner)
    assert not opened.reads_images
    assert "images need ayllu[torch]" in opened.device
