"""The plain generator: reused prefixes, limits and wrong usage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.engine.oracle import Oracle
from ayllu.engine.parameters import Sampling
from ayllu.errors import ContextOverflowError, UsageError
from ayllu.model.decoder import random_decoder
from tests.model.tiny import tiny_llama, tiny_llama4

GREEDY = Sampling(temperature=0)
DECODER = random_decoder(tiny_llama4(vision=True), 11, std=0.15)
PATCH = 90
PATCHES_PER_TILE = DECODER.config.vision.tokens_per_tile


def _fresh(tokens: list[int], pixels: torch.Tensor | None = None) -> torch.Tensor:
    return Oracle(DECODER).prefill(tokens, pixels)


@settings(deadline=None, max_examples=30)
@given(
    conversations=st.lists(
        st.tuples(st.integers(0, 40), st.lists(st.integers(0, 89), min_size=1, max_size=25)),
        min_size=2,
        max_size=5,
    )
)
def test_a_reused_prefix_gives_the_logits_of_a_fresh_start(conversations) -> None:
    oracle, tokens = Oracle(DECODER), [1]
    for keep, new in conversations:
        tokens = tokens[:keep] + new
        torch.testing.assert_close(oracle.prefill(tokens), _fresh(tokens), atol=3e-5, rtol=1e-4)
        oracle.step(5)


def test_another_image_behind_the_same_tokens_is_not_taken_from_the_cache() -> None:
    # Patch tokens look alike for every image: a cache keyed by tokens alone would show the old picture.
    tokens = [3, 4, *[PATCH] * PATCHES_PER_TILE, 5]
    first, second = torch.rand(2, 1, 3, 56, 56)
    oracle = Oracle(DECODER)
    a, b = oracle.prefill(tokens, first), oracle.prefill(tokens, second)
    assert (a - b).abs().max() > 1e-3
    torch.testing.assert_close(b, _fresh(tokens, second), atol=3e-5, rtol=1e-4)
    longer = [*tokens, *[PATCH] * PATCHES_PER_TILE, 6]
    both = torch.cat((second, first))
    torch.testing.assert_close(oracle.prefill(longer, both), _fresh(longer, both), atol=3e-5, rtol=1e-4)


def test_the_same_seed_gives_the_same_text_and_another_does_not() -> None:
    def text(seed: int) -> list[int]:
        return list(
            Oracle(DECODER).generate([1, 2], Sampling(temperature=1.5, top_p=1, seed=seed), max_new_tokens=20)
        )

    assert text(4) == text(4)
    assert text(4) != text(5)


def test_generation_ends_at_a_stop_token_and_does_not_yield_it() -> None:
    whole = list(Oracle(DECODER).generate([1, 2], GREEDY, max_new_tokens=20))
    stop = whole[6]
    cut = list(Oracle(DECODER).generate([1, 2], GREEDY, max_new_tokens=20, stop_ids={stop}))
    assert cut == whole[: whole.index(stop)]


def test_generation_ends_where_the_context_does() -> None:
    assert len(list(Oracle(DECODER, context=10).generate([1] * 4, GREEDY))) == 6


def test_an_interrupted_answer_leaves_a_usable_cache() -> None:
    oracle = Oracle(DECODER)
    answer = oracle.generate([1, 2, 3], GREEDY, max_new_tokens=30)
    next(answer), next(answer)
    answer.close()
    torch.testing.assert_close(oracle.prefill([1, 2, 9]), _fresh([1, 2, 9]), atol=3e-5, rtol=1e-4)


def test_a_failure_in_the_middle_of_a_layer_stack_leaves_a_usable_cache(monkeypatch) -> None:
    oracle = Oracle(DECODER)
    oracle.prefill([1, 2, 3])
    layer = DECODER.layers[5]
    with monkeypatch.context() as broken:
        broken.setattr(layer, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            oracle.prefill([1, 2, 3, 4, 5])
    torch.testing.assert_close(oracle.prefill([1, 2, 3, 7]), _fresh([1, 2, 3, 7]), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "error", "says"),
    [
        ([], UsageError, "empty"),
        ([97], UsageError, "not in the vocabulary"),
        ([-1], UsageError, "not in the vocabulary"),
        ([1] * 300, ContextOverflowError, "300 tokens; the context holds 256"),
    ],
)
def test_impossible_prompts_are_refused(tokens, error, says) -> None:
    with pytest.raises(error, match=says):
        Oracle(DECODER).prefill(tokens)


def test_image_rows_must_match_the_patch_tokens() -> None:
    with pytest.raises(UsageError, match="patch tokens"):
        Oracle(DECODER).prefill([1, PATCH, 2], torch.rand(1, 3, 56, 56))
    with pytest.raises(UsageError, match="reads no images"):
        Oracle(random_decoder(tiny_llama(), 0)).prefill([1, 2], torch.rand(1, 3, 56, 56))


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(UsageError, match="1 to 256"):
        Oracle(DECODER, context=257)
