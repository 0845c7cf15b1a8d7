"""Experts in two launches: what the loop over experts gives, whatever experts the tokens chose.

Tolerance in float32: 1e-5, as only the order of addition differs. In bfloat16 the kernel keeps gate and up
in float32 until their product, where the reference rounds each: three units in the last place of results
near one.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.kernels.reference.grouped_experts import grouped_swiglu as reference
from ayllu.kernels.reference.packed import PackedMatrix, pack
from ayllu.kernels.triton.grouped_experts import grouped_swiglu
from ayllu.model.config import ExpertsConfig
from ayllu.model.feed_forward import Experts
from tests.kernels import DEVICE

LAYOUTS = [("int4", {}), ("int4", {"with_minimum": True}), ("int8", {}), ("int8", {"group": 32}), ("fp8", {})]


class Case:
    def __init__(
        self, tokens, *, experts=5, top_k=1, width=32, inner=32, seed=0, dtype=torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

        self.x = (normal(tokens, width) * width**0.5).to(dtype)
        self.scores = torch.rand(tokens, top_k, generator=generator).to(dtype)
        self.chosen = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k]
        self.stacks = [
            normal(experts, inner, width),
            normal(experts, inner, width),
            normal(experts, width, inner),
        ]

    def packed(self, kind: str, **options) -> Case:
        self.stacks = [pack(stack, kind, **options) for stack in self.stacks]
        return self

    def computed(self, kernel, device: str = "cpu") -> torch.Tensor:
        place = torch.device(device)
        return kernel(
            self.x.to(place),
            self.scores.to(place),
            self.chosen.to(place),
            *(s.to(place) for s in self.stacks),
        ).cpu()


def assert_equal(case: Case) -> None:
    tolerance = 1e-5 if case.x.dtype == torch.float32 else 2.4e-2
    found, expected = case.computed(grouped_swiglu, DEVICE), case.computed(reference)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


@settings(max_examples=12)
@given(
    tokens=st.integers(1, 40), experts=st.integers(1, 7), top_k=st.integers(1, 3),
    width=st.sampled_from([16, 33, 70]),
    inner=st.sampled_from([20, 48]),
    seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_plain_experts_give_the_sum_of_the_loop(tokens, experts, top_k, width, inner, seed) -> None:
    assert_equal(
        Case(tokens, experts=experts, top_k=min(top_k, experts), width=width, inner=inner, seed=seed)
    )


@settings(max_examples=6)
@given(
    layout=st.sampled_from(LAYOUTS),
    tokens=st.integers(1, 20), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_packed_experts_give_what_their_unpacked_ones_give(layout, tokens, seed) -> None:
    kind, options = layout
    assert_equal(Case(tokens, top_k=2, width=64, inner=96, seed=seed).packed(kind, **options))


@pytest.mark.parametrize("kind", [None, "int4", "int8", "fp8"])
def test_bfloat16_experts(kind) -> None:
    case = Case(9, width=64, inner=64, dtype=torch.bfloat16, top_k=2)
    assert_equal(case if kind is None else case.packed(kind))


@pytest.mark.parametrize("tokens", [1, 17, 80])
def test_all_tokens_may_choose_the_same_expert(tokens) -> None:
    case = Case(tokens, experts=6)
    case.chosen.fill_(4)
    assert_equal(case)


def test_no_tokens_give_no_rows() -> None:
    case = Case(3)
    case.x, case.scores, case.chosen = case.x[:0], case.scores[:0], case.chosen[:0]
    assert case.computed(grouped_swiglu, DEVICE).shape == (0, 32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_token_spoils_no_other(bad) -> None:
    case = Case(12, top_k=2)
    clean = case.computed(grouped_swiglu, DEVICE)
    case.x[5, 3] = bad
    found = case.computed(grouped_swiglu, DEVICE)
    assert not found[5].isfinite().all()
    others = torch.arange(12) != 5
    assert torch.equal(found[others], clean[others])


def test_the_score_scales_the_input_as_in_the_model() -> None:
    """Held to the network's own token-by-token loop, not only to the twin."""
    case = Case(11, top_k=2, width=32, inner=48)
    experts = Experts(
        ExpertsConfig(num_experts=5, top_k=2, intermediate_size=48, shared_intermediate_size=48), 32
    ).requires_grad_(False)
    for name, stack in zip(("gate_proj", "up_proj", "down_proj"), case.stacks, strict=True):
        setattr(experts, name, torch.nn.Parameter(stack, requires_grad=False))
    expected = experts.looped(case.x, case.scores, case.chosen)
    torch.testing.assert_close(case.computed(grouped_swiglu, DEVICE), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(case.computed(reference), expected, atol=1e-5, rtol=1e-5)


def test_gate_and_up_must_be_packed_alike() -> None:
    case = Case(3, width=64, inner=64).packed("int8")
    assert isinstance(case.stacks[1], PackedMatrix)
    case.stacks[1] = pack(torch.ones(5, 64, 64), "fp8")
    with pytest.raises(AssertionError, match="packed differently"):
        case.computed(grouped_swiglu, DEVICE)
