"""The mixture: the grouped path equals the obvious loop, and the score scales the input (T5)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.model.config import ExpertsConfig
from ayllu.model.feed_forward import Experts, MixtureFeedForward


def _experts(count: int, top_k: int, seed: int) -> tuple[Experts, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    experts = Experts(
        ExpertsConfig(num_experts=count, top_k=top_k, intermediate_size=24, shared_intermediate_size=24), 16
    )
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return experts, generator


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 33), count=st.integers(1, 9), top_k=st.integers(1, 3), seed=st.integers(0, 2**31)
)
def test_t5_grouped_path_equals_the_loop(tokens: int, count: int, top_k: int, seed: int) -> None:
    top_k = min(top_k, count)
    experts, generator = _experts(count, top_k, seed)
    x = torch.randn(tokens, 16, generator=generator)
    chosen = torch.stack([torch.randperm(count, generator=generator)[:top_k] for _ in range(tokens)])
    scores = torch.rand(tokens, top_k, generator=generator)
    with torch.no_grad():
        looped, grouped = experts.looped(x, scores, chosen), experts.grouped(x, scores, chosen)
    torch.testing.assert_close(grouped, looped, atol=1e-5, rtol=1e-4)


def test_t5_grouped_path_has_the_gradients_of_the_loop() -> None:
    experts, generator = _experts(5, 2, 0)
    x = torch.randn(12, 16, generator=generator)
    chosen = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(12)])
    gradients = []
    for path in (experts.looped, experts.grouped):
        scores = torch.full((12, 2), 0.7, requires_grad=True)
        inputs = x.clone().requires_grad_()
        path(inputs, scores, chosen).square().sum().backward()
        gradients.append([inputs.grad, scores.grad, *(p.grad.clone() for p in experts.parameters())])
        experts.zero_grad()
    for looped, grouped in zip(*gradients, strict=True):
        torch.testing.assert_close(grouped, looped, atol=1e-4, rtol=1e-4)


def _mixture(top_k: int = 1) -> MixtureFeedForward:
    torch.manual_seed(1)
    config = ExpertsConfig(num_experts=4, top_k=top_k, intermediate_size=24, shared_intermediate_size=24)
    mixture = MixtureFeedForward(config, 16)
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return mixture


@torch.no_grad()
def test_t5_scaling_the_input_is_not_scaling_the_output() -> None:
    mixture = _mixture()
    x = torch.randn(2, 7, 16)
    flat = x.flatten(0, 1)
    scores, chosen = mixture.route(flat)
    on_input = mixture.experts.looped(flat, scores, chosen)
    on_output = mixture.experts.looped(flat, torch.ones_like(scores), chosen) * scores
    assert (on_input - on_output).abs().max() > 1e-2
    torch.testing.assert_close(mixture(x), mixture.shared_expert(x) + on_input.view_as(x))


@torch.no_grad()
def test_scores_are_independent_sigmoids_of_the_largest_logits() -> None:
    mixture = _mixture(top_k=2)
    x = torch.randn(9, 16)
    logits = mixture.router(x)
    scores, chosen = mixture.route(x)
    best = logits.argsort(-1, descending=True)[:, :2]
    assert torch.equal(chosen, best)
    torch.testing.assert_close(scores, torch.sigmoid(logits.gather(1, best)))


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_do_not_influence_each_other(batch: int) -> None:
    # A released port paired token-major scores with expert-major inputs: right for one token, wrong for more.
    mixture = _mixture()
    x = torch.randn(batch, 6, 16)
    alone = torch.stack([torch.stack([mixture(token[None])[0] for token in row]) for row in x])
    torch.testing.assert_close(mixture(x), alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_no_tokens_give_no_rows() -> None:
    assert _mixture()(torch.empty(0, 16)).shape == (0, 16)
