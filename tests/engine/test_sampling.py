"""Sampling rules, each against its definition, and the fast selection against the full sort."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ayllu.engine.parameters import Sampling
from ayllu.engine.sampling import (
    FLOORS,
    Sampler,
    inverse_cdf,
    kept_probabilities,
    kept_tokens,
    logprobs_of,
    relative_weights,
    uniform,
)
from ayllu.errors import RequestFailedError, UsageError

Logits = NDArray[np.float32]

logit_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)
HOSTILE = [
    0.0,
    -0.0,
    1.0,
    1.0,
    -math.inf,
    -math.inf,
    3e38,
    -3e38,
    1e-40,
    20.0,
    19.999998,
    -88.0,
    -104.0,
    1e-20,
    19.999999,
    1.0000001,
]


NEAR_FLOORS = [math.log(floor) + step for floor in FLOORS[:-1] for step in (-0.01, 0.01)] + [-1.0, -30.0]


def _array(values: object) -> Logits:
    return np.array(values, dtype=np.float32)


@st.composite
def any_logits(draw: st.DrawFn) -> Logits:
    """Few or thousands of logits: smooth, tied, one-hot, flat, huge, mostly forbidden."""
    if draw(st.booleans()):
        values = draw(st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=60))
        return _array(values) if max(values) > -math.inf else _array([*values, 0.0])
    size = draw(st.integers(1, 3000))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        # Weights on both sides of every floor, as many of each as it takes for any rule to end there.
        levels = draw(st.lists(st.sampled_from(NEAR_FLOORS), min_size=1, max_size=3))
        return np.append(random.choice(_array(levels), size), np.float32(0))
    logits = random.standard_normal(size).astype(np.float32) * draw(st.sampled_from([0, 0.01, 1, 4, 30]))
    if draw(st.booleans()):
        logits = np.round(logits * 2) / 2  # many ties
    if draw(st.booleans()):
        logits[random.integers(size, size=1 + size // 100)] += np.float32(draw(st.sampled_from([3, 12, 200])))
    if draw(st.booleans()):
        keep = random.integers(size)
        logits[random.random(size) < 0.7] = -np.inf
        logits[keep] = 1.0
    return logits


any_sampling = st.builds(
    Sampling,
    temperature=st.sampled_from([5e-324, 1e-30, 0.01, 0.6, 1.0, 1.0, 1.0, 1.7, 100.0]),
    top_k=st.one_of(st.sampled_from([0, 0, 0, 1, 2, 7, 64, 1000, 1 << 20]), st.integers(0, 40)),
    top_p=st.one_of(st.sampled_from([0.0, 1e-9, 0.5, 0.9, 0.999, 1 - 1e-13, 1.0, 1.0]), st.floats(0, 1)),
    min_p=st.one_of(st.sampled_from([0.0, 0.0, 1e-60, 0.05, 0.5, 1.0]), st.floats(0, 1)),
)


@settings(max_examples=600)
@given(logits=any_logits(), sampling=any_sampling)
def test_the_fast_selection_keeps_exactly_what_the_full_sort_keeps(logits, sampling) -> None:
    weights = relative_weights(logits, logits.max(), sampling.temperature)
    kept = kept_tokens(logits, weights, sampling)
    expected = kept_probabilities(logits, sampling)
    chances = np.zeros(logits.size)
    kept = np.arange(logits.size) if kept is None else kept
    chances[kept] = weights[kept]
    assert (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(chances / chances.sum(), expected)


@settings(max_examples=300)
@given(logits=any_logits(), sampling=any_sampling, draw=st.floats(0, 1, exclude_max=True))
def test_a_draw_is_the_inverse_of_the_distribution(logits, sampling, draw) -> None:
    weights = relative_weights(logits, logits.max(), sampling.temperature)
    token = inverse_cdf(weights, kept_tokens(logits, weights, sampling), draw)
    probabilities = kept_probabilities(logits, sampling)
    assert probabilities[token] > 0
    below = math.fsum(probabilities[:token])
    assert below - 1e-12 <= draw <= below + probabilities[token] + 1e-12


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
    kept = kept_probabilities(_array(logits), sampling)
    assert kept.sum() == pytest.approx(1, abs=1e-5)
    assert kept[int(np.argmax(logits))] > 0
    if top_k:
        assert (kept > 0).sum() <= top_k


@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=20, unique=True),
    top_p=st.floats(0.01, 0.99),
)
def test_top_p_drops_what_the_more_likely_ones_already_exceed(logits, top_p) -> None:
    probabilities = np.exp(_array(logits))
    probabilities /= probabilities.sum()
    assume(len(np.unique(probabilities)) == len(logits))
    kept = kept_probabilities(_array(logits), Sampling(temperature=1.0, top_p=top_p)) > 0
    for i, probability in enumerate(probabilities):
        before = math.fsum(p for p in probabilities.tolist() if p > probability)
        if abs(before - top_p) > 1e-5:
            assert bool(kept[i]) == (before <= top_p)


def test_top_p_counts_within_what_top_k_left() -> None:
    logits = np.log(_array([0.4, 0.3, 0.2, 0.1]))
    kept = kept_probabilities(logits, Sampling(temperature=1, top_k=2, top_p=0.5))
    assert kept.tolist() == pytest.approx([1, 0, 0, 0])
    kept = kept_probabilities(logits, Sampling(temperature=1, top_p=0.5))
    assert kept.tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])


def test_min_p_is_a_share_of_the_best() -> None:
    logits = np.log(_array([0.5, 0.3, 0.15, 0.05]))
    kept = kept_probabilities(logits, Sampling(temperature=1, top_p=1, min_p=0.4))
    assert kept.tolist() == pytest.approx([0.625, 0.375, 0, 0])


def test_of_equals_the_lower_id_is_kept() -> None:
    logits = _array([1, 5, 5, 5])
    kept = kept_tokens(logits, relative_weights(logits, np.float32(5), 1.0), Sampling(top_k=2))
    assert kept is not None
    assert kept.tolist() == [1, 2]
    assert Sampler(Sampling(temperature=0)).next_token(_array([1, 5, 5])) == 1


@given(logits=any_logits(), temperature=st.sampled_from([1e-30, 0.6, 1.0, 100.0]))
@example(logits=_array([0, 1e-20]), temperature=1.0)
@example(logits=_array([20, 20.000002]), temperature=100.0)
def test_one_kept_token_is_the_greedy_one_even_where_the_weights_are_equal(logits, temperature) -> None:
    # Weights are float32: e^(-1e-20) is 1, and the lower id would have won.
    best = Sampler(Sampling(temperature=0)).next_token(logits)
    assert Sampler(Sampling(temperature=temperature, top_k=1)).next_token(logits) == best
    assert Sampler(Sampling(temperature=temperature, top_p=0)).next_token(logits) == best


def test_greedy_takes_the_likeliest() -> None:
    assert Sampler(Sampling(temperature=0)).next_token(_array([0.0, 3.0, 1.0])) == 1


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(Sampling(temperature=1, top_p=1, seed=0))
    logits = np.log(_array([0.7, 0.2, 0.1]))
    draws = [sampler.next_token(logits, (), [0] * place) for place in range(4000)]
    assert (np.bincount(draws) / 4000).tolist() == pytest.approx([0.7, 0.2, 0.1], abs=0.03)


def test_uniform_numbers_are_uniform_and_differ_by_each_of_their_three_origins() -> None:
    numbers = np.array([uniform(s, a, k) for s in range(20) for a in range(20) for k in range(50)])
    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    counts, _ = np.histogram(numbers, 20, (0, 1))
    # Chi-squared with 19 degrees of freedom exceeds 43.8 once in a thousand; these numbers are fixed.
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
    assert len(np.unique(numbers)) == 20_000
    assert uniform((1 << 63) - 1, 63, 1 << 30) == uniform((1 << 63) - 1, 63, 1 << 30)


def test_the_stream_of_a_seed_never_changes() -> None:
    # Recorded answers are reproduced from their seed: another version may not draw other numbers.
    assert [uniform(7, 0, 0), uniform(7, 0, 1), uniform(7, 1, 0)] == RECORDED_DRAWS


RECORDED_DRAWS = [0.7584968808564502, 0.7140870772985042, 0.27002658130225055]


@given(order=st.permutations(range(12)), seed=st.integers(0, 2**63 - 1))
def test_draws_depend_on_their_place_alone_not_on_what_was_drawn_before(order, seed) -> None:
    logits = np.zeros(1000, np.float32)
    rules = Sampling(temperature=1, top_p=1, seed=seed)
    straight = [Sampler(rules, 3).next_token(logits, (), [0] * place) for place in range(12)]
    one = Sampler(rules, 3)
    assert {place: one.next_token(logits, (), [0] * place) for place in order} == dict(enumerate(straight))
    assert straight != [Sampler(rules, 4).next_token(logits, (), [0] * place) for place in range(12)]


def test_without_a_seed_two_samplers_differ_and_each_tells_its_seed() -> None:
    first, second = Sampler(Sampling(temperature=1)), Sampler(Sampling(temperature=1))
    assert first.seed != second.seed
    logits = np.zeros(5000, np.float32)
    again = Sampler(Sampling(temperature=1, seed=first.seed))
    assert again.next_token(logits) == first.next_token(logits)


def _edited_by_definition(
    logits: Logits, rules: Sampling, prompt: list[int], answer: list[int]
) -> list[float]:
    counts, edited = Counter(answer), [float(value) for value in logits]
    for token in range(len(edited)):
        edited[token] += rules.logit_bias.get(token, 0.0)
        edited[token] = float(np.float32(edited[token]))
        if token in counts or token in prompt:
            penalty = rules.repetition_penalty
            edited[token] = edited[token] / penalty if edited[token] > 0 else edited[token] * penalty
        if counts[token]:
            edited[token] -= rules.presence_penalty + rules.frequency_penalty * counts[token]
    return edited


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6),
    prompt=st.lists(st.integers(0, 5), max_size=5),
    answers=st.lists(st.lists(st.integers(0, 5), max_size=8), min_size=1, max_size=4),
    repetition=st.sampled_from([0.5, 1.0, 1.3]),
    presence=st.sampled_from([-2.0, 0.0, 0.7]),
    frequency=st.sampled_from([-1.0, 0.0, 0.4]),
    bias=st.dictionaries(st.integers(0, 5), st.floats(-100, 100), max_size=3),
)
def test_bias_and_penalties_are_those_of_the_definition_however_the_answer_grows_or_shrinks(
    logits, prompt, answers, repetition, presence, frequency, bias
) -> None:
    rules = Sampling(
        temperature=0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
    )
    sampler, given_logits = Sampler(rules), _array(logits)
    seen: list[Logits] = []
    for answer in answers:
        # An answer that goes back and on again is seen at its shortest, as after a rejected draft.
        for history in (answer[:0], answer[: len(answer) // 2], answer):
            sampler.next_token(given_logits, prompt, history, lambda edited: seen.append(edited.copy()))
            expected = _edited_by_definition(given_logits, rules, prompt, history)
            assert seen.pop().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert given_logits.tolist() == logits


def test_more_distinct_tokens_than_the_first_table_holds_are_all_penalised() -> None:
    logits = np.ones(1000, np.float32)
    sampler = Sampler(Sampling(temperature=0, frequency_penalty=1, repetition_penalty=2))
    answer: list[int] = []
    for _ in range(999):
        answer.append(sampler.next_token(logits, [0], answer))
    assert answer == [*range(1, 1000)]


def test_a_banned_token_is_not_drawn_and_a_favoured_one_is() -> None:
    logits = _array([5, 4, 3])
    assert Sampler(Sampling(temperature=0, logit_bias={0: -100})).next_token(logits) == 1
    assert Sampler(Sampling(temperature=1, seed=1, logit_bias={2: 100})).next_token(logits) == 2


def test_the_mask_comes_after_the_penalties_and_before_the_choice() -> None:
    def forbid_first(logits: Logits) -> None:
        logits[0] = -np.inf

    logits = _array([9, 1, 2])
    logits.flags.writeable = False
    assert Sampler(Sampling(temperature=0)).next_token(logits, (), (), forbid_first) == 2
    assert (
        Sampler(Sampling(temperature=0, frequency_penalty=2)).next_token(logits, (), [2], forbid_first) == 1
    )
    assert Sampler(Sampling(temperature=9, top_p=1)).next_token(logits, (), (), forbid_first) in (1, 2)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("values", [[0, math.nan, 1], [math.inf, 0, 1], [-math.inf] * 3, [math.nan] * 3])
def test_logits_that_are_not_finite_end_the_request(values, temperature) -> None:
    for rules in (Sampling(temperature=temperature), Sampling(temperature=temperature, logit_bias={1: -1})):
        with pytest.raises(RequestFailedError, match="no finite numbers"):
            Sampler(rules).next_token(_array(values))
    with pytest.raises(RequestFailedError, match="no finite numbers"):
        logprobs_of(_array(values), 0, 1)


def test_a_mask_that_forbids_everything_ends_the_request() -> None:
    with pytest.raises(RequestFailedError, match="No token is allowed"):
        Sampler(Sampling()).next_token(_array([1, 2]), (), (), lambda logits: logits.fill(-np.inf))


def test_penalties_of_the_largest_logits_stay_finite() -> None:
    logits = _array([3e38, -3e38])
    rules = Sampling(temperature=0, repetition_penalty=0.01)
    assert Sampler(rules).next_token(logits, [0, 1]) == 0
    rules = Sampling(temperature=1, repetition_penalty=100)
    assert Sampler(rules).next_token(logits, [0, 1]) == 0


def test_a_bias_of_a_token_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="logit_bias names token 9, the vocabulary has 3"):
        Sampler(Sampling(logit_bias={9: 1.0})).next_token(_array([1, 2, 3]))


@settings(max_examples=200)
@given(logits=any_logits(), count=st.integers(0, 25), data=st.data())
def test_logprobs_are_the_log_softmax_and_alternatives_its_full_sort(logits, count, data) -> None:
    token = data.draw(st.integers(0, logits.size - 1))
    wide = logits.astype(np.float64) - float(logits.max())
    expected = wide - math.log(math.fsum(np.exp(wide)))
    logprob, alternatives = logprobs_of(logits, token, count)
    assert logprob == pytest.approx(expected[token], rel=1e-12, abs=1e-12)
    order = np.argsort(-logits, kind="stable")[:count].tolist()
    assert [other for other, _ in alternatives] == order
    assert [value for _, value in alternatives] == pytest.approx(expected[order], rel=1e-12, abs=1e-12)


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
