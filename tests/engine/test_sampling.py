"""Sampling rules, each against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ayllu.engine.parameters import Sampling
from ayllu.engine.sampling import Sampler, kept_probabilities, penalise_repetition
from ayllu.errors import UsageError

logit_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)


@given(
    logits=logit_lists,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 45),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
)
def test_the_kept_distribution_sums_to_one_and_keeps_the_best(
    logits, temperature, top_k, top_p, min_p
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = kept_probabilities(torch.tensor(logits), sampling)
    assert kept.sum().item() == pytest.approx(1, abs=1e-5)
    best = max(logits)
    assert any(kept[i] > 0 for i, value in enumerate(logits) if value == best)
    if top_k:
        assert (kept > 0).sum() <= top_k


@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=20, unique=True),
    top_p=st.floats(0.01, 0.99),
)
def test_top_p_drops_what_the_more_likely_ones_already_exceed(logits, top_p) -> None:
    probabilities = torch.tensor(logits, dtype=torch.float32).softmax(-1)
    assume(len(probabilities.unique()) == len(logits))
    kept = kept_probabilities(torch.tensor(logits), Sampling(temperature=1.0, top_p=top_p)) > 0
    for i, probability in enumerate(probabilities):
        before = math.fsum(p for p in probabilities.tolist() if p > probability)
        if abs(before - top_p) > 1e-5:
            assert bool(kept[i]) == (before <= top_p)


def test_min_p_is_a_share_of_the_best() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = kept_probabilities(logits, Sampling(temperature=1, top_p=1, min_p=0.4))
    assert kept.tolist() == pytest.approx([0.625, 0.375, 0, 0])


def test_repetition_penalty_lowers_seen_tokens_whatever_their_sign() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0])
    assert penalise_repetition(logits, [0, 1, 1], 2.0).tolist() == [1.0, -4.0, 1.0]
    assert penalise_repetition(logits, [], 2.0).tolist() == logits.tolist()


def test_greedy_takes_the_likeliest() -> None:
    assert Sampler(Sampling(temperature=0)).next_token(torch.tensor([0.0, 3.0, 1.0])) == 1


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(Sampling(temperature=1, top_p=1, seed=0))
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    draws = torch.tensor([sampler.next_token(logits) for _ in range(4000)])
    assert (draws.bincount() / 4000).tolist() == pytest.approx([0.7, 0.2, 0.1], abs=0.03)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", math.nan),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2),
        ("seed", -1),
    ],
)
def test_impossible_values_are_refused_by_name(name, value) -> None:
    with pytest.raises(UsageError, match=name):
        Sampling(**{name: value})
