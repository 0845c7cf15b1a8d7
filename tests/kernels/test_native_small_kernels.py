"""Native norm, rotation, activation and softmax parts against numpy in float64, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from ayllu.kernels.native.library import SoftmaxPart, merged, rms_norm, rotated, silu_multiply
from tests.kernels.native_blocks import SETS

each_set = pytest.mark.parametrize("instructions", SETS)


@each_set
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 64, 100, 2048])
def test_rms_norm_is_the_float64_one(instructions: str, columns: int) -> None:
    rng = np.random.default_rng(columns)
    x = (rng.normal(size=(5, columns)) * np.array([[1e-12], [1e-3], [1], [30], [1e6]])).astype(np.float32)
    weight = rng.normal(size=columns).astype(np.float32)
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(rms_norm(x, None, 1e-5, instructions), exact, rtol=1e-6)
    np.testing.assert_allclose(rms_norm(x, weight, 1e-5, instructions), exact * weight, rtol=1e-6)


@each_set
def test_the_norm_of_a_row_that_is_not_finite_is_not_finite(instructions: str) -> None:
    for poison in (np.nan, np.inf):
        x = np.ones((3, 20), np.float32)
        x[1, 18] = poison
        found = rms_norm(x, None, 1e-5, instructions)
        assert np.isnan(found[1]).any()
        np.testing.assert_allclose(found[[0, 2]], 1, rtol=1e-5)


@each_set
@pytest.mark.parametrize("head_dim", [2, 6, 16, 18, 64, 80, 128])
@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_turn_by_their_angle(instructions: str, head_dim: int, interleaved: bool) -> None:
    rng = np.random.default_rng(head_dim)
    heads = rng.normal(size=(7, head_dim)).astype(np.float32)
    angles = rng.uniform(-7, 7, (7, head_dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    found = rotated(heads, cos, sin, interleaved=interleaved, instruction_set=instructions)
    pick = (
        (slice(0, None, 2), slice(1, None, 2))
        if interleaved
        else (slice(0, head_dim // 2), slice(head_dim // 2, None))
    )
    first, second = heads[:, pick[0]].astype(np.float64), heads[:, pick[1]].astype(np.float64)
    np.testing.assert_allclose(found[:, pick[0]], first * cos - second * sin, atol=1e-6)
    np.testing.assert_allclose(found[:, pick[1]], first * sin + second * cos, atol=1e-6)


@each_set
def test_silu_is_within_four_units_in_the_last_place(instructions: str) -> None:
    gate = np.linspace(-87, 87, 100_003, dtype=np.float32)
    up = np.ones_like(gate)
    exact = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64)))
    error = np.abs(silu_multiply(gate, up, instructions) - exact)
    assert (error <= 4 * np.spacing(np.abs(exact).astype(np.float32))).all()


@each_set
def test_silu_of_what_is_no_number_is_no_number(instructions: str) -> None:
    gate = np.array([np.nan, np.inf, -np.inf, -1e30, 1e30, -100, 0.0] * 5, np.float32)
    found = silu_multiply(gate, np.ones_like(gate), instructions)[-7:]
    assert np.isnan(found[0])
    assert found[1] == np.inf
    assert found[4] == np.float32(1e30)
    # e^x ends at e^89: far below zero silu is -|x| e^-89, not quite its limit, 0.
    assert found[3] <= 0 and np.abs(found[[5, 6]]).max() < 1e-36


def _part(rng: np.random.Generator, best: float, dim: int = 48) -> SoftmaxPart:
    return SoftmaxPart(rng.normal(size=dim).astype(np.float32), best, float(rng.uniform(1, 30)))


@each_set
def test_a_power_of_two_is_right_to_a_hundredth_of_bfloat16s_last_place(instructions: str) -> None:
    """Read off a merge: a part that is `distance` below the best counts 2^-distance times."""
    worst = 0.0
    for distance in np.linspace(0, 125, 4001, dtype=np.float32):
        nothing = SoftmaxPart(np.zeros(16, np.float32), 0.0, 0.0)
        found = merged(nothing, SoftmaxPart(np.ones(16, np.float32), float(-distance), 1.0), instructions)
        exact = 2.0 ** -distance.astype(np.float64)
        worst = max(worst, abs(found.sums[3] / exact - 1))
    assert worst < 6e-6


@each_set
def test_parts_merge_into_the_whole_softmax_in_any_order(instructions: str) -> None:
    rng = np.random.default_rng(0)
    parts = [_part(rng, best) for best in (-3.0, 50.0, 49.5, -200.0, 12.0)]
    exact_best = max(part.best for part in parts)
    shares = [2.0 ** (np.float64(part.best) - exact_best) for part in parts]
    sums = sum(share * part.sums.astype(np.float64) for share, part in zip(shares, parts, strict=True))
    total = sum(share * part.total for share, part in zip(shares, parts, strict=True))
    for order in (parts, parts[::-1], [parts[i] for i in (2, 0, 4, 1, 3)]):
        found = order[0]
        for part in order[1:]:
            found = merged(found, part, instructions)
        assert found.best == exact_best
        np.testing.assert_allclose(found.total, total, rtol=2e-5)
        np.testing.assert_allclose(found.sums, sums, rtol=2e-5, atol=1e-5)


@each_set
def test_a_part_without_keys_changes_nothing(instructions: str) -> None:
    rng = np.random.default_rng(1)
    part = _part(rng, 2.0)
    empty = SoftmaxPart(np.full(48, np.nan, np.float32), float("-inf"), 0.0)
    for found in (merged(part, empty, instructions), merged(empty, part, instructions)):
        np.testing.assert_array_equal(found.sums, part.sums)
        assert (found.best, np.float32(found.total)) == (part.best, np.float32(part.total))
