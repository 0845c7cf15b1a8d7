"""RMS normalisation in one launch gives the network's. Tolerance: one unit in the last place, as the sum of
squares is added in another order before it is rounded."""

from __future__ import annotations

import pytest
import torch

from ayllu.kernels.reference.rms_norm import rms_norm as reference
from ayllu.kernels.triton.rms_norm import rms_norm
from ayllu.model.attention import RMSNorm
from tests.kernels import DEVICE


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("shape", [(1, 16), (3, 70), (2, 3, 129), (0, 64)])
def test_one_launch_gives_the_norm_of_the_network(shape, dtype, tolerance) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    norm = RMSNorm(shape[-1], 1e-5)
    norm.weight = torch.nn.Parameter(
        torch.rand(shape[-1], generator=generator).to(dtype), requires_grad=False
    )
    found = rms_norm(x.to(DEVICE), norm.weight.to(DEVICE), 1e-5).cpu()
    torch.testing.assert_close(found, norm(x), atol=tolerance, rtol=tolerance)
    assert torch.equal(reference(x, norm.weight, 1e-5), norm(x))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_bad_number_stays_in_its_row() -> None:
    x = torch.ones(3, 40)
    x[1, 7], x[2, 3] = torch.nan, torch.inf
    found = rms_norm(x.to(DEVICE), torch.ones(40, device=DEVICE), 1e-5).cpu()
    assert found[0].isfinite().all()
    torch.testing.assert_close(found, reference(x, torch.ones(40), 1e-5), equal_nan=True)
