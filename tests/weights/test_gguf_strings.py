"""Strings of a GGUF array, found all at once: never other ones than a walk from length to length finds."""

from __future__ import annotations

import struct

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ayllu.text_array import TextArray
from ayllu.weights.gguf_strings import short_string_lengths, string_lengths

TEXTS = st.lists(
    st.one_of(
        st.text("ab\0é終", max_size=12),
        st.sampled_from(["", "\0" * 9, "a" + "\0" * 7 + "b", "\x01" + "\0" * 7 + "x", "y" * 300]),
    ),
    max_size=30,
)


@given(texts=TEXTS, behind=st.binary(max_size=20), count=st.integers(0, 40))
def test_what_is_found_at_once_is_the_beginning_of_the_walk(
    texts: list[str], behind: bytes, count: int
) -> None:
    stored = b"".join(struct.pack("<Q", len(text.encode())) + text.encode() for text in texts)
    window = np.frombuffer(stored + behind, np.uint8)
    walked = string_lengths(window, count).tolist()
    found = short_string_lengths(window, count).tolist()
    assert found == walked[: len(found)]
    assert walked[: len(texts)] == [len(text.encode()) for text in texts][:count]


@given(st.lists(st.text("abcdé終 ", min_size=1, max_size=10), min_size=1, max_size=30))
def test_ordinary_strings_are_all_found_at_once(texts: list[str]) -> None:
    stored = b"".join(struct.pack("<Q", len(text.encode())) + text.encode() for text in texts)
    lengths = short_string_lengths(np.frombuffer(stored, np.uint8), len(texts))
    assert lengths.tolist() == [len(text.encode()) for text in texts]


@given(texts=st.lists(st.text(max_size=5), max_size=20), wanted=st.text(max_size=5))
def test_a_text_array_is_the_list_of_its_texts(texts: list[str], wanted: str) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    wanted = wanted.encode("utf-8", "replace").decode()
    lengths = np.array([len(text.encode()) for text in texts], np.int32)
    data = np.frombuffer("".join(texts).encode(), np.uint8)
    array = TextArray(data, np.cumsum(lengths) - lengths, lengths)
    assert list(array) == texts and array == texts and len(array) == len(texts)
    assert [array[place] for place in range(len(texts))] == texts
    assert list(array[1:3]) == texts[1:3]
    assert array.places(wanted) == [place for place, text in enumerate(texts) if text == wanted]
