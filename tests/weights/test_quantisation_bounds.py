"""T14: what 4-bit, 8-bit and fp8 storage may cost, and which tensors are never quantised."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.weights.checkpoint import open_checkpoint
from ayllu.weights.gguf_blocks import BLOCK_TYPE_NAMED, decode_blocks, encode_blocks
from ayllu.weights.gguf_export import save_gguf
from tests.model.tiny import tiny_llama4
from tests.weights.small_checkpoints import random_checkpoint

BITS = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4}


@settings(max_examples=400)
@given(
    seed=st.integers(0, 2**31),
    scale=st.floats(1e-3, 1e3),
    encoding=st.sampled_from(list(BITS)),
)
def test_t14_round_trip_error_is_bounded_by_the_step(seed: int, scale: float, encoding: str) -> None:
    rows = (np.random.default_rng(seed).normal(size=(4, 64)) * scale).astype(np.float32)
    kind = BLOCK_TYPE_NAMED[encoding]
    back = np.empty((rows.size // kind.elements, kind.elements), np.float32)
    decode_blocks(kind, encode_blocks(kind, rows).reshape(-1, kind.nbytes), back)
    blocks = rows.reshape(back.shape)
    if encoding == "Q4_1":
        step = np.ptp(blocks, axis=1, keepdims=True) / 15
        allowed = step / 2
    elif encoding == "Q4_0":
        step = np.abs(blocks).max(axis=1, keepdims=True) / 8
        # The codes reach from -8 to 7: the far end of the other sign is cut by up to one step.
        allowed = step
    else:
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127
        allowed = step / 2
    # Scales and minimums are float16: half a unit in their last place (2^-25 below its normal range), times
    # the largest code.
    rounding = 2**-10 * np.abs(blocks).max(axis=1, keepdims=True) + 2**-25 * 128
    assert (np.abs(back - blocks) <= allowed + rounding).all()


@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=64))
def test_t14_fp8_e4m3_keeps_three_bits_of_the_fraction(values: list[float]) -> None:
    exact = np.array(values, np.float32)
    back = exact.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert (np.abs(back - exact) <= np.maximum(np.abs(exact) * 2**-4, 2**-10)).all()


@pytest.mark.parametrize("encoding", ["Q8_0", "Q4_0", "Q4_1"])
def test_t14_norms_and_routers_stay_exact_and_every_expert_is_quantised(
    encoding: str, tmp_path: Path
) -> None:
    # Several quantisers left fused experts in bf16, because they are plain parameters and no linear layers.
    config = tiny_llama4(expert_step=2)
    config = dataclasses.replace(
        config, experts=dataclasses.replace(config.experts, intermediate_size=64, shared_intermediate_size=64)
    )
    source = random_checkpoint(config, seed=6)
    save_gguf(source, tmp_path / "m.gguf", encoding)
    stored = open_checkpoint(tmp_path / "m.gguf").tensors
    for name, tensor in stored.items():
        if name.endswith("norm.weight") or ".router." in name:
            assert tensor.encoding == "F32", name
            np.testing.assert_array_equal(tensor.decode(), source.tensors[name].decode())
        elif ".experts." in name:
            assert tensor.encoding == encoding, name
