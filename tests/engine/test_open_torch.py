"""What torch is asked to open: which options it refuses, and what a GPU is told to hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ayllu.engine import open_torch
from ayllu.engine.gpu_weights import PLANS, packed_bytes
from ayllu.engine.open_core import open_runner
from ayllu.engine.open_torch import TorchOpening
from ayllu.engine.opened import planned
from ayllu.engine.options import EngineOptions
from ayllu.engine.runner_needs import TorchNeeds
from ayllu.errors import UnsupportedError, UsageError
from ayllu.kernels.registry import forced, has_triton
from ayllu.model.decoder import random_decoder
from ayllu.progress import SILENT
from ayllu.weights.adapter import Adapter
from ayllu.weights.checkpoint import Checkpoint, open_checkpoint
from ayllu.weights.hf_save import save_folder
from tests.model.tiny import tiny_llama
from tests.weights.small_checkpoints import random_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_folder(random_checkpoint(tiny_llama()), tmp_path / "model")
    return open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": "int4", "device": "cpu"}, "need an NVIDIA GPU, and this would run on cpu"),
        ({"weights": "int8", "runner": "native"}, "weights in int8 are for a GPU"),
        ({"cache_type": "int8", "runner": "torch"}, "A cache in int8 needs the native runner"),
        ({"weights": "int3"}, "weights = .*int3.* is unknown"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], says: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError, match=says):
        open_runner(checkpoint, EngineOptions(**options), SILENT, "it")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of which nothing is there but its name."""
    monkeypatch.setattr(open_torch, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 36, 1 << 36))


@pytest.mark.parametrize("weights", [None, *PLANS])
def test_a_gpu_is_planned_with_the_bytes_of_packed_weights(
    weights: Any, checkpoint: Checkpoint, gpu: None
) -> None:
    config = checkpoint.config
    opening = TorchOpening(checkpoint, EngineOptions(weights=weights))
    plan = planned(opening, EngineOptions(slots=2), "it")
    expected = 2 * config.parameters if weights is None else packed_bytes(config, PLANS[weights], 2)
    assert plan.weight_bytes == expected
    assert plan.available_bytes == 1 << 36


def test_only_tritons_attention_needs_no_copies_of_shared_heads(checkpoint: Checkpoint, gpu: None) -> None:
    for kernels in ("reference", *(["triton"] if has_triton() else [])):
        with forced(kernels):
            (needs,) = TorchOpening(checkpoint, EngineOptions()).needs
        assert needs.runner == TorchNeeds(checkpoint.config, 2, expands_heads=kernels == "reference")


def test_a_gpus_weights_are_loaded_as_asked(
    checkpoint: Checkpoint, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loading(Exception):
        pass

    def load(checkpoint: Checkpoint, **asked: Any) -> None:
        raise Loading(asked["device"].type, asked["dtype"], asked["weights"])

    monkeypatch.setattr(open_torch, "load_for_gpu", load)
    options = EngineOptions(weights="fp8", slots=1)
    with pytest.raises(Loading) as caught:
        open_runner(checkpoint, options, SILENT, "it")
    assert caught.value.args == ("cuda", torch.bfloat16, "fp8")


def test_adapters_are_refused_beside_packed_weights() -> None:
    adapters = open_torch._NoAdapters(random_decoder(tiny_llama(), 0))
    with pytest.raises(UnsupportedError, match="Open the model without --weights"):
        adapters.load("mine", Adapter.__new__(Adapter))
    assert adapters.names == ()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_computes_packed_weights(checkpoint: Checkpoint) -> None:
    opened = open_runner(checkpoint, EngineOptions(weights="int8", slots=1, context=64), SILENT, "it")
    assert opened.dtype == "bfloat16, weights in int8"
    assert opened.device == "cuda"
