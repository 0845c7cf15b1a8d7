"""Byte-pair vocabularies over the `tokenizers` library: byte-level (GPT-2 line) and SentencePiece style.

Both take a ready encoder that holds no special token, and the text of every id for the way back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ayllu.chat.vocabulary import SpacePrefix, library_errors, pieces_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Encoder

SPACE_MARK = "▁"


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table).

    Bytes that are printable in Latin-1 stand for themselves; the other 68 follow from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return alphabet


BYTE_OF_CHARACTER = _byte_alphabet()
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}


def byte_level_bytes(text: str | None) -> bytes:
    """The bytes that a token of such a vocabulary stands for; none for None, an id without a token."""
    if text is None:
        return b""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in text])
    except KeyError:
        return text.encode("utf-8", "replace")


def encode_in_pieces(encoder: Encoder, text: str, source: str) -> list[int]:
    """Ids of `text` from the library, a bounded piece at a time."""
    ids: list[int] = []
    with library_errors(source, "pre-tokenizer"):
        for piece in pieces_of(text):
            ids += encoder.encode(piece, add_special_tokens=False).ids
    return ids


class ByteLevelVocabulary:
    """BPE over the 256 bytes written as printable characters.

    A character that needs a byte the vocabulary lacks (SmolLM2 has no token for 21 bytes that valid text
    hardly uses) is encoded as U+FFFD, so that what remains of it cannot break its neighbours.
    """

    space_prefix: SpacePrefix = "none"

    def __init__(
        self, encoder: Encoder, texts: Sequence[str | None], known: Iterable[str], source: str
    ) -> None:
        """`texts[id]`: the token's text, None where there is none; `known`: the texts text can become."""
        self._encoder = encoder
        self._texts = texts
        self._source = source
        self.size = len(texts)
        known = frozenset(CHARACTER_OF_BYTE.values()).intersection(known)
        self._present = bytes(BYTE_OF_CHARACTER[character] for character in known)

    def encode(self, text: str, *, prefix_space: bool = False) -> list[int]:
        del prefix_space
        if len(self._present) < 256 and text.encode("utf-8").translate(None, self._present):
            text = self._without_missing_bytes(text)
        return encode_in_pieces(self._encoder, text, self._source)

    def document(self) -> dict[str, Any]:
        """This vocabulary as a tokenizer.json describes it, without special tokens."""
        document: dict[str, Any] = json.loads(self._encoder.to_str())
        document["decoder"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        }
        return document

    def bytes_of(self, token: int) -> bytes:
        return byte_level_bytes(self._texts[token])

    def _without_missing_bytes(self, text: str) -> str:
        present = self._present
        lost = {c for c in set(text) if c.encode("utf-8").translate(None, present)}
        return text.translate(dict.fromkeys(map(ord, lost), "\ufffd"))


class SentencePieceVocabulary:
    """BPE over characters with the space written as U+2581, and `<0xNN>` tokens for bytes outside it.

    `always_prefix` adds the leading space even where the text already starts with one.
    """

    def __init__(
        self,
        encoder: Encoder,
        texts: Sequence[str | None],
        byte_ids: dict[int, int],
        space_prefix: SpacePrefix,
        source: str,
        *,
        always_prefix: bool = True,
    ) -> None:
        """`texts[id]` as above; `byte_ids` maps the id of a byte token to its byte."""
        self._encoder = encoder
        self._texts = texts
        self._byte_ids = byte_ids
        self._source = source
        self._always_prefix = always_prefix
        self.space_prefix: SpacePrefix = space_prefix
        self.size = len(texts)

    def encode(self, text: str, *, prefix_space: bool = False) -> list[int]:
        if prefix_space and text and (self._always_prefix or text[0] not in (" ", SPACE_MARK)):
            text = f" {text}"
        return encode_in_pieces(self._encoder, text, self._source)

    def bytes_of(self, token: int) -> bytes:
        if token in self._byte_ids:
            return bytes((self._byte_ids[token],))
        text = self._texts[token]
        return b"" if text is None else text.replace(SPACE_MARK, " ").encode("utf-8", "replace")


def byte_of_token(text: str) -> int | None:
    """The byte that a `<0xNN>` token stands for, or None for any other text."""
    if len(text) != 6 or not text.startswith("<0x") or text[5] != ">":
        return None
    try:
        return int(text[3:5], 16)
    except ValueError:
        return None
