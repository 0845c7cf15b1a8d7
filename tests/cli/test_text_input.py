"""Piped text in the encodings of Japanese systems arrives as the same text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.cli.text_input import decode_text
from ayllu.errors import UsageError

JAPANESE = "四半期の売上は前年比で12%増加しました。カタカナ、ひらがな、漢字。\n"


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        ("utf-8", "utf-8"),
        ("utf-8-sig", "utf-8"),
        ("utf-16", "utf-16"),
        ("utf-32", "utf-32"),
        ("cp932", "cp932"),
        ("euc_jp", "euc_jp"),
        ("iso2022_jp", "iso-2022-jp"),
    ],
)
def test_japanese_text_is_read_in_its_own_encoding(codec: str, name: str) -> None:
    assert decode_text(JAPANESE.encode(codec)) == (JAPANESE, name)


@given(st.text())
def test_utf8_is_always_taken_as_it_is(text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    if not data.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")) and b"\x1b" not in data:
        assert decode_text(data)[0] == data.decode("utf-8")


@pytest.mark.parametrize(
    "data", [b"\xff\x00\xfe\x80", bytes(range(128, 256)), b"\x89PNG\r\n\x1a\n\x00\x00\x80"]
)
def test_binary_data_is_refused(data: bytes) -> None:
    with pytest.raises(UsageError, match="not text"):
        decode_text(data)


def test_a_broken_file_behind_a_mark_is_refused_with_the_place() -> None:
    with pytest.raises(UsageError, match="byte"):
        decode_text(b"\xef\xbb\xbfabc\xff")
