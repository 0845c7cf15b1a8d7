"""Keys of cache blocks: equal exactly when everything that keys and values depend on is equal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as AbstractSequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.engine.sequence import BlockKeys, Sequence
from tests.engine.fake_runner import FakeRequest

PATCH = 9
ROWS = {"a" * 64: 1, "b" * 64: 2, "c" * 64: 3, "d" * 64: 5}
"""Digests of images and the rows they have; a digest covers the image's shape."""


def _keys(
    root: bytes, tokens: AbstractSequence[int], images: AbstractSequence[str], size: int
) -> list[bytes]:
    keys = BlockKeys(root, size, [(digest, ROWS[digest]) for digest in images], PATCH)
    return keys.up_to(tokens, len(tokens) // size)


def _meanings(
    root: bytes, tokens: AbstractSequence[int], images: AbstractSequence[str], size: int
) -> list[tuple[object, ...]]:
    """What each full block's key stands for, written out: every patch with its image and its row there."""
    rows = iter([(digest, row) for digest in images for row in range(ROWS[digest])])
    content = [(token, next(rows) if token == PATCH and images else None) for token in tokens]
    return [(root, *content[:stop]) for stop in range(size, len(tokens) + 1, size)]


@st.composite
def _prompts(draw: st.DrawFn) -> tuple[bytes, list[int], list[str]]:
    """Runs of text and images in any order, an image's patches in one run or torn apart by text."""
    tokens: list[int] = []
    images: list[str] = []
    for _ in range(draw(st.integers(1, 4))):
        tokens += draw(st.lists(st.integers(0, 1), max_size=4))
        if draw(st.booleans()):
            digest = draw(st.sampled_from(sorted(ROWS)))
            torn = draw(st.integers(0, ROWS[digest]))
            tokens += [PATCH] * torn + draw(st.sampled_from([[], [0]])) + [PATCH] * (ROWS[digest] - torn)
            images.append(digest)
    return draw(st.sampled_from([b"r" * 32, b"s" * 32])), tokens, images


@given(prompts=st.lists(_prompts(), min_size=2, max_size=12), size=st.integers(1, 5))
def test_keys_are_equal_exactly_when_root_tokens_and_images_are(prompts, size) -> None:
    key_of: dict[tuple[object, ...], bytes] = {}
    meaning_of: dict[bytes, tuple[object, ...]] = {}
    for prompt in prompts:
        for key, meaning in zip(_keys(*prompt, size), _meanings(*prompt, size), strict=True):
            assert key_of.setdefault(meaning, key) == key
            assert meaning_of.setdefault(key, meaning) == meaning


@given(prompt=_prompts(), size=st.integers(1, 5), data=st.data())
def test_keys_asked_for_piece_by_piece_are_those_from_scratch(prompt, size, data) -> None:
    root, tokens, images = prompt
    whole = _keys(root, tokens, images, size)
    keys = BlockKeys(root, size, [(digest, ROWS[digest]) for digest in images], PATCH)
    seen: list[int] = []
    for token in tokens:
        seen.append(token)
        count = data.draw(st.integers(0, len(seen) // size))
        assert keys.up_to(seen, count) == whole[:count]
    assert keys.up_to(seen, len(whole)) == whole


def test_ten_thousand_prompts_that_differ_in_one_place_have_ten_thousand_keys() -> None:
    base = [7] * 64
    base[20:25] = [PATCH] * 5
    seen = set()
    count = 0
    for place, token in itertools.product(range(64), range(160)):
        if not 20 <= place < 25 and token != 7:
            tokens = list(base)
            tokens[place] = 200_000 + token
            seen.add(_keys(b"r" * 32, tokens, ["d" * 64], 64)[0])
            count += 1
    assert count > 9000
    for start in range(60):
        moved = [7] * 64
        moved[start : start + 5] = [PATCH] * 5
        for images in (["d" * 64], ["b" * 64, "c" * 64], ["c" * 64, "b" * 64], ["a" * 64] * 5):
            seen.add(_keys(b"r" * 32, moved, images, 64)[0])
            count += 1
    for number in range(1000):
        seen.add(_keys(number.to_bytes(32, "big"), base, ["d" * 64], 64)[0])
        count += 1
    assert count > 10_000
    assert len(seen) == count


def test_an_images_place_in_the_prompt_is_that_of_its_patches() -> None:
    # Two pictures of two rows each, in blocks of two: the second block tells which picture is where.
    tokens = [PATCH] * 4
    first, second = "b" * 64, "a" * 64
    assert _keys(b"", tokens, [first, first], 2) != _keys(b"", tokens, [first, second, second], 2)
    assert _keys(b"", tokens, [first, first], 2)[0] == _keys(b"", tokens, [first, second, second], 2)[0]


def test_text_before_an_image_has_the_key_of_text() -> None:
    assert _keys(b"", [1, 2, PATCH], ["a" * 64], 2) == _keys(b"", [1, 2, 3], [], 2)


def test_remaining_counts_what_is_to_be_computed_before_the_next_token() -> None:
    sequence = Sequence([1, 2, 3], 3, 5, BlockKeys(b"", 2), FakeRequest("r", "", 0, "", ()))
    assert sequence.remaining == 3
    sequence.computed = 2
    assert sequence.remaining == 1


def test_a_sequence_without_a_turn_has_no_place_in_an_order() -> None:
    sequence = Sequence([1], 1, 1, BlockKeys(b"", 2), FakeRequest("r", "", 0, "", ()), number=3)
    with pytest.raises(AssertionError, match="sequence 3 has not had its turn"):
        _ = sequence.order
    sequence.rank = 1.5
    assert sequence.order == (1.5, 3)


def test_an_images_rows_are_told_apart_even_if_its_digest_did_not() -> None:
    def keys(*rows: int) -> list[bytes]:
        return BlockKeys(b"", 4, [("d", count) for count in rows], PATCH).up_to([PATCH] * 8, 2)

    assert keys(8)[0] == keys(4, 4)[0]
    assert keys(8)[1] != keys(4, 4)[1]
