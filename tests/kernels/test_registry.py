"""Which kernels are taken where: Triton's on CUDA, the plain ones elsewhere, a named set on request."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ayllu.errors import MissingExtraError, UsageError
from ayllu.kernels import registry
from ayllu.kernels.registry import forced, kernels_for, kernels_named


def test_the_device_decides() -> None:
    assert kernels_for(torch.device("cpu")).name == "reference"
    assert kernels_for(torch.device("mps")).name == "reference"
    assert kernels_for(torch.device("cuda", 1)).name == "triton"
    assert kernels_for(torch.device("cuda")).capturable


def test_without_triton_a_gpu_gets_the_plain_ones(monkeypatch) -> None:
    monkeypatch.setattr(registry, "has_triton", lambda: False)
    assert kernels_for(torch.device("cuda")).name == "reference"
    kernels_named.cache_clear()
    with pytest.raises(MissingExtraError, match=r"ayllu\[gpu\]"):
        kernels_named("triton")


def test_a_forced_set_is_in_force_inside_only() -> None:
    with forced("triton"):
        assert kernels_for(torch.device("cpu")).name == "triton"
        with forced("reference"):
            assert kernels_for(torch.device("cuda")).name == "reference"
        assert kernels_for(torch.device("cpu")).name == "triton"
    assert kernels_for(torch.device("cpu")).name == "reference"


def test_an_unknown_set_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean triton"):
        kernels_named("tritn")
    with pytest.raises(UsageError), forced("cuda"):
        pass


def test_both_sets_have_every_kernel() -> None:
    for name in registry.NAMES:
        kernels = kernels_named(name)
        assert all(callable(getattr(kernels, field)) for field in ("paged_attention", "grouped_swiglu"))
        assert all(callable(getattr(kernels, field)) for field in ("packed_linear", "rms_norm"))
        assert all(callable(getattr(kernels, field)) for field in ("rotate_heads", "silu_product"))
        assert kernels.capturable == (name == "triton")


def test_asking_needs_neither_torch_nor_triton() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import ayllu.kernels.registry as registry\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_on_the_cpu_loads_no_triton() -> None:
    code = "import sys, ayllu.engine.runner, ayllu.engine.gpu_weights; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
