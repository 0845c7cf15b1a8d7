"""Bytes from a pipe to text. Files from Japanese systems are often not UTF-8 and must not become garbage."""

from __future__ import annotations

import codecs

from ayllu.errors import UsageError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_text(data: bytes) -> tuple[str, str]:
    """The text and the name of its encoding: byte-order mark, ISO-2022-JP, UTF-8, then Shift_JIS or EUC-JP.

    Raises UsageError when the bytes are no text in any of them.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _strictly(data, encoding), encoding.removesuffix("-sig")
    if b"\x1b$" in data or b"\x1b(J" in data:
        try:
            return data.decode("iso2022_jp"), "iso-2022-jp"
        except UnicodeDecodeError:
            pass
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        pass
    readings = []
    for encoding in ("cp932", "euc_jp"):
        try:
            readings.append((data.decode(encoding), encoding))
        except UnicodeDecodeError:
            continue
    if not readings or b"\x00" in data:
        raise UsageError(
            "The input is not text in UTF-8, UTF-16, Shift_JIS, EUC-JP or ISO-2022-JP.",
            "Give a text file, or convert it with iconv.",
        )
    return min(readings, key=lambda reading: _implausible(reading[0]))


def _strictly(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"The input begins like {encoding} but is not: byte {error.start} fits no character.",
            "Convert it to UTF-8.",
        ) from error


def _implausible(text: str) -> int:
    """Characters that rarely stand in real text: EUC-JP read as Shift_JIS gives half-width katakana."""
    return sum("\uff61" <= char <= "\uff9f" or "\ue000" <= char <= "\uf8ff" for char in text)
