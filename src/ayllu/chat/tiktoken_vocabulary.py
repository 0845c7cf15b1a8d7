"""Llama 4's own vocabulary file (`tokenizer.model`): one base64 token and its rank per line.

Merging is done by the tiktoken library on our ranks; the split, the special ids and the cutting of very long
runs follow the reference. Nothing is fetched: tiktoken's own loaders, which use the network, are not called.
"""

from __future__ import annotations

import binascii
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ayllu.chat.llama4_tokens import BEGIN_OF_TEXT, END_OF_TEXT, SPECIAL_COUNT, SPECIAL_NAMES, STOP_NAMES
from ayllu.chat.pretokenizers import O200K_PATTERN
from ayllu.chat.vocabulary import SpacePrefix, SpecialToken, TokenizerParts, library_errors
from ayllu.errors import ModelFileError, UnsupportedError

if TYPE_CHECKING:
    import tiktoken

# Meta's file is 3.6 MB with 200,000 lines of at most a few hundred bytes.
MAX_FILE_BYTES = 64 << 20
MAX_LINE_BYTES = 4096
MAX_TOKENS = 1 << 20

# tiktoken fails on longer input and is quadratic over unbroken runs; both figures are the reference's.
MAX_ENCODE_CHARACTERS = 400_000
MAX_RUN_CHARACTERS = 25_000
_RUN = re.compile(r"\s+|\S+")


class TiktokenVocabulary:
    """Byte-pair merges by rank over raw bytes."""

    space_prefix: SpacePrefix = "none"

    def __init__(self, encoding: tiktoken.Encoding, tokens: list[bytes], source: str) -> None:
        self._encoding = encoding
        self._tokens = tokens
        self._source = source
        self.size = len(tokens)

    def encode(self, text: str, *, prefix_space: bool = False) -> list[int]:
        del prefix_space
        ids: list[int] = []
        with library_errors(self._source, "merges"):
            for piece in bounded_pieces(text):
                ids += self._encoding.encode_ordinary(piece)
        return ids

    def bytes_of(self, token: int) -> bytes:
        return self._tokens[token]


def bounded_pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most 400,000 characters with no run of (non-)white space over 25,000.

    A run is counted from the start of its 400,000-character chunk, as the reference does.
    """
    for start in range(0, len(text), MAX_ENCODE_CHARACTERS):
        chunk = text[start : start + MAX_ENCODE_CHARACTERS]
        begin = 0
        if len(chunk) > MAX_RUN_CHARACTERS:
            for run in _RUN.finditer(chunk):
                for cut in range(run.start() + MAX_RUN_CHARACTERS, run.end(), MAX_RUN_CHARACTERS):
                    yield chunk[begin:cut]
                    begin = cut
        yield chunk[begin:]


def parts_from_tiktoken(file: Path) -> TokenizerParts:
    """Tokenizer parts of a tiktoken vocabulary with Llama 4's specials behind its ranks.

    Any number of ranks is accepted. Raises `ModelFileError` for a damaged file, `UnsupportedError` for a
    SentencePiece model under the same name.
    """
    tokens = read_ranks(file)
    import tiktoken

    with library_errors(file, "merges"):
        encoding = tiktoken.Encoding(
            name=file.name,
            pat_str=O200K_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={},
        )
    first = len(tokens)
    ids = {name: first + place for place, name in enumerate(SPECIAL_NAMES)}
    return TokenizerParts(
        vocabulary=TiktokenVocabulary(encoding, tokens, str(file)),
        specials=tuple(SpecialToken(name, place) for name, place in ids.items()),
        bos_id=ids[BEGIN_OF_TEXT],
        eos_id=ids[END_OF_TEXT],
        stop_ids=frozenset(ids[name] for name in STOP_NAMES),
        add_bos=True,
        source=str(file),
        embedding_rows=first + SPECIAL_COUNT,
    )


def read_ranks(file: Path) -> list[bytes]:
    """The tokens of a tiktoken file in rank order.

    Raises `ModelFileError` for a file over 64 MiB, more than 2**20 lines, a line that is over 4 KiB,
    empty or not `base64 rank`, a repeated token, ranks that are not 0, 1, 2, ..., or one of the 256 single
    bytes missing.
    """
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ModelFileError(
            file, "vocabulary file too large", expected=f"at most {MAX_FILE_BYTES}", got=size
        )
    data = file.read_bytes()
    if data[:1] == b"\n" and b"\x00" in data[:4096]:
        raise _sentencepiece_error(file)
    by_rank: dict[int, bytes] = {}
    for number, line in enumerate(io.BytesIO(data), start=1):
        token, rank = _parse_line(line, file, number)
        if number > MAX_TOKENS:
            raise ModelFileError(file, "too many tokens", expected=f"at most {MAX_TOKENS}")
        if rank in by_rank:
            raise ModelFileError(file, f"rank {rank} appears twice", field=f"line {number}")
        by_rank[rank] = token
    tokens = [by_rank[rank] for rank in range(len(by_rank)) if rank in by_rank]
    if len(tokens) != len(by_rank):
        hole = next(rank for rank in range(len(by_rank)) if rank not in by_rank)
        raise ModelFileError(file, f"no token has rank {hole}, though higher ranks exist")
    distinct = set(tokens)
    if len(distinct) != len(tokens):
        raise ModelFileError(file, "a token appears twice", got=len(tokens) - len(distinct))
    missing = [byte for byte in range(256) if bytes((byte,)) not in distinct]
    if missing:
        raise ModelFileError(file, f"no token for the single byte 0x{missing[0]:02x}")
    return tokens


def _parse_line(line: bytes, file: Path, number: int) -> tuple[bytes, int]:
    fields = line.split() if len(line) <= MAX_LINE_BYTES else []
    if len(fields) == 2 and fields[1].isdigit() and len(fields[1]) <= 9:
        try:
            token = binascii.a2b_base64(fields[0], strict_mode=True)
        except binascii.Error:
            token = b""
        if token:
            return token, int(fields[1])
    got = line[:60].decode("utf-8", "replace")
    raise ModelFileError(file, "not a tiktoken line", field=f"line {number}", expected="base64 rank", got=got)


def _sentencepiece_error(file: Path) -> UnsupportedError:
    return UnsupportedError(
        f"{file}: this is a SentencePiece model, not a tiktoken vocabulary.",
        "Add the model's tokenizer.json to the folder, or use its GGUF file.",
    )
