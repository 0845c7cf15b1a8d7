"""Streaming equals decoding at once for any ids, and no character is ever shown in halves."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.chat.detokenizer import StreamDecoder
from ayllu.chat.tokenizer import Tokenizer, tokenizer_from_gguf
from ayllu.errors import UsageError
from tests.chat import small_vocabularies as small

BYTE_LEVEL = tokenizer_from_gguf(small.gguf_metadata(), Path("b.gguf")).with_embedding_rows(760)
SENTENCEPIECE = tokenizer_from_gguf(small.sentencepiece_metadata(), Path("s.gguf")).with_embedding_rows(400)

TEXTS = st.lists(
    st.sampled_from(
        ["日本語", "😀", "👩‍👩‍👧‍👦", "🇯🇵", "e\u0301", " ", "the cat", "\n", "が", "\ufffd", "\x00"]
    ),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
@settings(max_examples=200)
@given(data=st.data())
def test_streamed_text_equals_the_whole_for_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    limit = tokenizer.embedding_rows - 1
    ids = data.draw(st.lists(st.integers(0, limit) | st.integers(0, 300), max_size=40))
    skip, continuation = data.draw(st.booleans()), data.draw(st.booleans())
    stream = StreamDecoder(tokenizer, skip_specials=skip, continuation=continuation)
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_specials=skip, continuation=continuation)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
@given(text=TEXTS)
def test_no_broken_character_appears_in_valid_text(tokenizer: Tokenizer, text: str) -> None:
    text = tokenizer.decode(tokenizer.encode(text))
    stream = StreamDecoder(tokenizer)
    so_far = ""
    for token in tokenizer.encode(text):
        so_far += stream.push(token)
        assert text.startswith(so_far)
    assert so_far == text
    assert stream.finish() == ""


def test_a_character_appears_with_the_token_that_completes_it() -> None:
    ids = [3 + byte for byte in "語".encode()]
    stream = StreamDecoder(SENTENCEPIECE)
    assert [stream.push(token) for token in ids] == ["", "", "語"]


def test_broken_bytes_are_shown_as_soon_as_they_are_certain() -> None:
    stream = StreamDecoder(SENTENCEPIECE)
    assert stream.push(3 + 0xFF) == "\ufffd"
    assert stream.push(3 + 0xE3) == ""
    assert stream.push(3 + ord("a")) == "\ufffda"
    assert stream.push(3 + 0xE3) == ""
    assert stream.finish() == "\ufffd"


def test_leading_space_goes_once_at_the_start_and_stays_in_a_continuation() -> None:
    ids = SENTENCEPIECE.encode("the cat")
    assert SENTENCEPIECE.decode(ids) == "the cat"
    assert SENTENCEPIECE.decode(ids, continuation=True) == " the cat"
    after_turn = [*ids, SENTENCEPIECE.special_id("</s>"), *ids]
    assert SENTENCEPIECE.decode(after_turn) == "the cat</s>the cat"
    stream = StreamDecoder(SENTENCEPIECE)
    assert "".join(stream.push(token) for token in after_turn) == "the cat</s>the cat"


def test_without_space_prefix_a_leading_space_is_text() -> None:
    tokenizer = tokenizer_from_gguf(small.sentencepiece_metadata(add_space_prefix=False), Path("s.gguf"))
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"
    assert tokenizer.encode("the") != tokenizer.encode(" the")


def test_an_id_outside_the_model_is_refused() -> None:
    with pytest.raises(UsageError):
        StreamDecoder(BYTE_LEVEL).push(BYTE_LEVEL.embedding_rows)
