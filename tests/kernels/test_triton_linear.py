"""Packed weights: what rounding costs, and that Triton's product is the reference's.

Tolerance in float32: 1e-5 relative to sums of order one (only the order of addition differs). In half
precision the kernel leaves the scale of an 8-bit row to the end where the reference rounds each weight:
three units in the last place.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.errors import UnsupportedError
from ayllu.kernels.reference.packed import PackedMatrix, pack, unpack
from ayllu.kernels.reference.packed import packed_linear as reference
from ayllu.kernels.triton.linear import packed_linear
from tests.kernels import DEVICE

LAYOUTS = [
    ("int4", 32, False), ("int4", 32, True), ("int4", 64, False), ("int4", 128, True),
    ("int8", None, False), ("int8", 32, False), ("fp8", None, False),
]  # fmt: skip
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2.4e-2}


def random_matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * columns**-0.5


def both(x: torch.Tensor, packed: PackedMatrix, bias=None) -> tuple[torch.Tensor, torch.Tensor]:
    device = torch.device(DEVICE)
    found = packed_linear(x.to(device), packed.to(device), None if bias is None else bias.to(device))
    return found.cpu(), reference(x, packed, bias)


@settings(max_examples=30)
@given(
    layout=st.sampled_from(LAYOUTS), rows=st.integers(1, 70), outputs=st.integers(1, 90),
    groups=st.integers(1, 3),
    seed=st.integers(0, 1 << 30), biased=st.booleans(),
)  # fmt: skip
def test_the_product_is_that_of_the_unpacked_matrix(layout, rows, outputs, groups, seed, biased) -> None:
    kind, group, minimum = layout
    columns = groups * (group or 32)
    packed = pack(random_matrix(outputs, columns, seed), kind, group=group, with_minimum=minimum)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    found, expected = both(x, packed, torch.randn(outputs, generator=generator) if biased else None)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_half_precision_products(layout, dtype) -> None:
    kind, group, minimum = layout
    packed = pack(random_matrix(37, 384), kind, group=group, with_minimum=minimum)
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.testing.assert_close(*both(x, packed), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_leading_axes_and_no_rows(layout) -> None:
    kind, group, minimum = layout
    packed = pack(random_matrix(7, 128), kind, group=group, with_minimum=minimum)
    assert both(torch.empty(0, 128), packed)[0].shape == (0, 7)
    found, expected = both(torch.ones(2, 1, 3, 128), packed)
    assert found.shape == (2, 1, 3, 7)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_bad_activation_reaches_its_own_row_only(layout, bad) -> None:
    kind, group, minimum = layout
    packed = pack(random_matrix(9, 128), kind, group=group, with_minimum=minimum)
    x = torch.ones(3, 128)
    clean, _ = both(x, packed)
    x[1, 77] = bad
    found, expected = both(x, packed)
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    assert not found[1].isfinite().any()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("layout", "error"),
    list(zip(LAYOUTS, [0.089, 0.080, 0.098, 0.105, 0.0085, 0.0057, 0.027], strict=True)),
    ids=str,
)
def test_rounding_costs_what_is_stated(layout, error) -> None:
    """Root mean square error of normally distributed weights, relative to the weights (docs/gpu.md)."""
    kind, group, minimum = layout
    matrix = random_matrix(256, 1024)
    found = unpack(pack(matrix, kind, group=group, with_minimum=minimum))
    relative = ((found - matrix).norm() / matrix.norm()).item()
    assert 0.85 * error < relative < error


@settings(max_examples=60)
@given(
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 1 << 30),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e10]),
)
def test_no_number_moves_further_than_its_format_allows(layout, seed, scale) -> None:
    kind, group, minimum = layout
    matrix = random_matrix(3, 256, seed) * scale
    packed = pack(matrix, kind, group=group, with_minimum=minimum)
    moved = (unpack(packed) - matrix).abs().unflatten(-1, (-1, packed.group)).amax(-1)
    span = matrix.abs().unflatten(-1, (-1, packed.group)).amax(-1)
    # int4 without minimum: the side opposite the largest number ends at 7 of 8 steps. A bfloat16 scale is off
    # by 2^-9, of 8 or 15 steps at most. e4m3 keeps three bits behind the point.
    most = {"int4": 2.1 / 15 if minimum else 1.05 / 8, "int8": 0.51 / 127, "fp8": 2**-4}[kind]
    assert (moved <= span * most).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_zeros_stay_zeros(layout) -> None:
    kind, group, minimum = layout
    matrix = random_matrix(4, 256)
    matrix[1] = 0
    packed = pack(matrix, kind, group=group, with_minimum=minimum)
    assert not unpack(packed)[1].any()
    assert not both(torch.ones(2, 256), packed)[0][:, 1].any()


def test_every_e4m3_number_is_read_as_torch_reads_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = PackedMatrix("fp8", codes.view(256, 1).repeat(1, 32), torch.ones(256, 1), None, 32)
    x = torch.zeros(1, 32)
    x[0, 0] = 1
    found, _ = both(x, numbers)
    expected = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(found[0].isnan(), expected.isnan())
    assert torch.equal(found[0].nan_to_num(), expected.nan_to_num())


def test_a_stack_is_packed_as_its_matrices_are() -> None:
    stack = torch.stack([random_matrix(5, 64, seed) for seed in range(3)])
    packed = pack(stack, "int4")
    assert packed.shape == (3, 5, 64)
    for expert in range(3):
        assert torch.equal(unpack(packed)[expert], unpack(pack(stack[expert], "int4")))
    assert packed.nbytes == 3 * 5 * (32 + 2 * 2)


@pytest.mark.parametrize(
    ("matrix", "kind", "options"),
    [
        (torch.ones(2, 48), "int4", {}), (torch.ones(2, 64), "int4", {"group": 16}),
        (torch.ones(2, 64), "int8", {"group": 48}), (torch.ones(2, 64), "fp8", {"group": 32}),
        (torch.ones(2, 64), "int8", {"with_minimum": True}), (torch.full((2, 64), torch.nan), "int8", {}),
        (torch.full((2, 64), torch.inf), "fp8", {}),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_is_refused_with_a_way_out(matrix, kind, options) -> None:
    with pytest.raises(UnsupportedError) as refused:
        pack(matrix, kind, **options)
    assert refused.value.fix
