"""Rotation, head normalisation and SwiGLU's product in one launch give the network's.

Tolerance: 1e-6 of numbers of order one in float32; one unit in the last place in bfloat16, where a sum in
another order may round to the neighbour.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ayllu.kernels.reference import heads as reference
from ayllu.kernels.triton import heads
from ayllu.model.attention import rms_normalise
from ayllu.model.rope import rope_angles, rotate
from tests.kernels import DEVICE

PRECISIONS = [(torch.float32, 2e-6), (torch.bfloat16, 1.6e-2)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 5, 16), (2, 2, 3, 20), (0, 4, 16)])
def test_heads_are_turned_and_normalised_as_in_the_network(shape, layout, norm_eps, dtype, tolerance) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    positions = torch.randint(0, 5000, shape[:-2], generator=generator)
    angles = rope_angles(positions, torch.rand(shape[-1] // 2, generator=generator))
    expected = rotate(x, *angles, layout)
    if norm_eps is not None:
        expected = rms_normalise(expected, norm_eps)
    cos, sin = (part.squeeze(-2) for part in angles)
    plain = reference.rotate_heads(x, cos, sin, layout == "interleaved", norm_eps)
    assert torch.equal(plain, expected)
    found = heads.rotate_heads(
        x.to(DEVICE), cos.to(DEVICE), sin.to(DEVICE), layout == "interleaved", norm_eps
    ).cpu()
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (2, 3, 700), (0, 8)])
def test_the_product_of_swiglu(shape, dtype, tolerance) -> None:
    generator = torch.Generator().manual_seed(1)
    gate, up = torch.randn(2, *shape, generator=generator).to(dtype)
    found = heads.silu_product(gate.to(DEVICE), up.to(DEVICE)).cpu()
    torch.testing.assert_close(found, F.silu(gate) * up, atol=tolerance, rtol=tolerance)
    assert torch.equal(reference.silu_product(gate, up), F.silu(gate) * up)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_stays_in_its_head(bad) -> None:
    x = torch.ones(2, 3, 8)
    x[1, 1, 2] = bad
    angles = torch.full((2, 4), 0.6), torch.full((2, 4), 0.8)
    found = heads.rotate_heads(x.to(DEVICE), *(part.to(DEVICE) for part in angles), False, 1e-5).cpu()
    spoiled = ~found.isfinite().all(-1)
    assert spoiled.nonzero().tolist() == [[1, 1]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_bad_gate_or_up_spoils_its_place_only() -> None:
    gate, up = torch.ones(2, 5), torch.ones(2, 5)
    gate[0, 1], up[1, 4], gate[1, 0] = torch.nan, torch.inf, -200.0
    found = heads.silu_product(gate.to(DEVICE), up.to(DEVICE)).cpu()
    torch.testing.assert_close(found, F.silu(gate) * up, equal_nan=True)
