"""What every vocabulary must offer, and the text repairs all of them share.

A vocabulary turns plain text into ids and one id into its bytes. It knows no special tokens at all: they
live one level up, in `tokenizer.Tokenizer`, so that no text can reach one through a vocabulary.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ayllu.errors import ModelFileError

SpacePrefix = Literal["none", "first", "each"]

# Longest text given to the BPE library at once. Its alignment tables cost some 100 bytes per byte of
# text, and its regex engine gives up after 10 million steps in one match; this stays far from both.
MAX_PIECE_CHARACTERS = 250_000
_CUT_WINDOW = 50_000
_SAFE_CUT = re.compile(r"(?<=[^\W_])(?= )|(?<=\S\n)(?=[^\W_])")


class Vocabulary(Protocol):
    """Plain text to ids and back to bytes; specials are not its business.

    `size` is one more than the highest id it can return. `space_prefix` says where a leading space is added
    when encoding and taken away when decoding: never, before the first run of text, or before each run of
    text that starts the sequence or follows a special token.
    """

    @property
    def size(self) -> int: ...

    @property
    def space_prefix(self) -> SpacePrefix: ...

    def encode(self, text: str, *, prefix_space: bool) -> list[int]:
        """Ids of `text` (valid Unicode), with the vocabulary's leading space if `prefix_space`."""
        ...

    def bytes_of(self, token: int) -> bytes:
        """The bytes of one id in [0, size); empty for ids that stand for nothing."""
        ...


class DeferredVocabulary:
    """A vocabulary that is built by the first text to encode, for a process that mostly only decodes: the
    libraries behind and their tables take some 0.1 s and 30 MB. Until then `bytes_of` serves alone."""

    def __init__(
        self,
        size: int,
        space_prefix: SpacePrefix,
        bytes_of: Callable[[int], bytes],
        build: Callable[[], Vocabulary],
    ) -> None:
        self.size = size
        self.space_prefix: SpacePrefix = space_prefix
        self.bytes_of = bytes_of
        self._build = build
        self._building = threading.Lock()
        self._whole: Vocabulary | None = None

    def encode(self, text: str, *, prefix_space: bool = False) -> list[int]:
        """See `Vocabulary.encode`. Raises what building the vocabulary raises, ModelFileError above all."""
        with self._building:
            if self._whole is None:
                self._whole = self._build()
        return self._whole.encode(text, prefix_space=prefix_space)


@dataclass(frozen=True)
class SpecialToken:
    """A token outside the text vocabulary.

    `control` tokens steer the model (turn ends, headers) and may be hidden when decoding; the others are
    text that was given its own id after training. `strip_left` and `strip_right` make it swallow the white
    space beside it when it stands in trusted text.
    """

    name: str
    id: int
    control: bool = True
    strip_left: bool = False
    strip_right: bool = False


@dataclass(frozen=True)
class TokenizerParts:
    """All a loader learned from its source; `Tokenizer` is made from it.

    `embedding_rows` is the row count of the embedding table where the source states one, else None.
    """

    vocabulary: Vocabulary
    specials: tuple[SpecialToken, ...]
    bos_id: int | None
    eos_id: int | None
    stop_ids: frozenset[int]
    add_bos: bool
    source: str
    embedding_rows: int | None = None


# Names that end a turn or a document in the families ayllu runs, whatever the file says about their type.
END_OF_TURN_NAMES = (
    "<|eot|>",
    "<|eom|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "</s>",
)


def end_of_turn_ids(specials: Mapping[str, int]) -> frozenset[int]:
    """Ids of the well-known end names that are special tokens here."""
    return frozenset(specials[name] for name in END_OF_TURN_NAMES if name in specials)


def valid_unicode(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD; other text unchanged.

    JSON can carry lone surrogates into a Python string; they have no UTF-8 form and so no tokens.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def pieces_of(text: str, limit: int = MAX_PIECE_CHARACTERS) -> Iterator[str]:
    """`text` in pieces of at most `limit` characters; text within the limit comes back whole.

    Cuts fall between a letter or digit and a space, or after a single line end before a letter or digit:
    no known split joins those, so no token changes. A run without such a place is cut hard.
    """
    start = 0
    while len(text) - start > limit:
        end = start + limit
        cut = end
        for found in _SAFE_CUT.finditer(text, max(start + 1, end - _CUT_WINDOW), end):
            cut = found.start()
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


@contextmanager
def library_errors(file: Path | str, field: str) -> Iterator[None]:
    """Turn whatever the Rust tokenizer libraries raise, panics included, into a `ModelFileError`.

    They raise plain Exception for bad input and a PanicException, which is no Exception, for worse.
    """
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = f"the tokenizer library refuses it ({str(error)[:200]})"
        raise ModelFileError(file, reason, field=field) from None
