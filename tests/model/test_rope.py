"""Rotary embedding: the spec's vectors (T2), and the two layouts held together by one permutation (T7)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ayllu.model.config import RopeConfig, RopeScaling
from ayllu.model.presets import maverick, scout
from ayllu.model.rope import rope_angles, rotate
from ayllu.model.rope_frequencies import rope_frequencies
from ayllu.weights.rope_layout import permute_rope_rows


def test_t2_scout_scales_29_of_64_frequencies_by_16() -> None:
    plain = rope_frequencies(maverick().rope, 128)
    scaled = rope_frequencies(scout().rope, 128)
    assert [j for j in range(64) if scaled[j] == plain[j]] == list(range(35))
    assert all(math.isclose(scaled[j], plain[j] / 16) for j in range(35, 64))


def test_t2_scout_frequency_values_of_the_spec() -> None:
    plain, scaled = rope_frequencies(maverick().rope, 128), rope_frequencies(scout().rope, 128)
    assert scaled[34] == pytest.approx(9.384738703573802e-4, rel=1e-9)
    assert plain[35] == pytest.approx(7.644969883e-4, rel=1e-9)
    assert scaled[35] == pytest.approx(4.778106177e-5, rel=1e-9)
    assert plain[63] == pytest.approx(2.455140791e-6, rel=1e-9)
    assert scaled[63] == pytest.approx(1.534462994e-7, rel=1e-9)
    assert 2 * math.pi / scaled[34] == pytest.approx(6695.1, abs=0.05)


def test_t2_the_old_8_4_scaling_differs_from_frequency_29_upward() -> None:
    # Early launch configs carried Llama 3.1's 8/4; a reader that used them would be wrong from here on.
    old = RopeConfig(
        theta=500_000.0,
        scaling=RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
        ),
    )
    correct, wrong = rope_frequencies(scout().rope, 128), rope_frequencies(old, 128)
    assert next(j for j in range(64) if not math.isclose(correct[j], wrong[j])) == 29


@pytest.mark.parametrize(("low", "high", "factor"), [(1.0, 4.0, 8.0), (1.0, 4.0, 32.0), (1.0, 1.0, 16.0)])
def test_scaling_equals_the_independent_implementation(low: float, high: float, factor: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters=parameters)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    ours = rope_frequencies(
        RopeConfig(
            theta=500_000.0,
            scaling=RopeScaling(
                factor=factor,
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_position_embeddings=8192,
            ),
        ),
        128,
    )
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float32), theirs, rtol=1e-6, atol=0)


def test_divisors_stand_for_a_scaling_rule() -> None:
    plain, scaled = rope_frequencies(maverick().rope, 128), rope_frequencies(scout().rope, 128)
    divisors = tuple(a / b for a, b in zip(plain, scaled, strict=True))
    stored = dataclasses.replace(maverick().rope, divisors=divisors)
    assert rope_frequencies(stored, 128) == pytest.approx(scaled, rel=1e-12)


@given(heads=st.integers(1, 4), pairs=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_t7_layouts_agree_once_the_projection_rows_are_permuted(heads: int, pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width, positions = 6, torch.tensor([0, 1, 5, 8191, 8192])
    frequencies = torch.tensor(rope_frequencies(RopeConfig(), 2 * pairs))
    cos, sin = rope_angles(positions, frequencies)
    x = torch.randn(5, width, generator=generator)
    wq, wk = (torch.randn(heads * 2 * pairs, width, generator=generator) for _ in range(2))

    def scores(layout: str, wq: torch.Tensor, wk: torch.Tensor) -> torch.Tensor:
        q, k = ((x @ w.T).unflatten(-1, (heads, -1)) for w in (wq, wk))
        return torch.einsum("shd,thd->hst", rotate(q, cos, sin, layout), rotate(k, cos, sin, layout))

    moved = [
        torch.from_numpy(permute_rope_rows(w.numpy(), heads, source="interleaved", target="half").copy())
        for w in (wq, wk)
    ]
    torch.testing.assert_close(scores("interleaved", wq, wk), scores("half", *moved), atol=1e-5, rtol=1e-5)
    back = permute_rope_rows(moved[0].numpy(), heads, source="half", target="interleaved")
    assert torch.equal(torch.from_numpy(back.copy()), wq)


def test_angles_need_no_table_at_ten_million_positions() -> None:
    frequencies = torch.tensor(rope_frequencies(scout().rope, 128))
    cos, sin = rope_angles(torch.tensor([10_485_759]), frequencies)
    assert cos.shape == sin.shape == (1, 1, 64)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(1, 1, 64))
