"""The vocabulary inside a GGUF file: metadata to tokenizer parts, for kinds `gpt2` and `llama`.

Only ordinary tokens reach the encoder. Control (type 3), user-defined (4), unknown (2) and unused (5) tokens
are kept out of it, so no text can merge into one. Keys: the GGUF specification, section "Tokenizer".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ayllu.chat import pretokenizers
from ayllu.chat.bpe_vocabulary import (
    SPACE_MARK,
    ByteLevelVocabulary,
    SentencePieceVocabulary,
    byte_level_bytes,
    byte_of_token,
)
from ayllu.chat.vocabulary import (
    END_OF_TURN_NAMES,
    DeferredVocabulary,
    SpacePrefix,
    SpecialToken,
    TokenizerParts,
    Vocabulary,
    end_of_turn_ids,
    library_errors,
)
from ayllu.errors import ModelFileError, UnsupportedError
from ayllu.text_array import TextArray

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# A SentencePiece token is a few dozen bytes; finding its merges costs the square of its length.
MAX_PIECE_LENGTH = 512

# Tokens such as a..ab..b have as many merges as letters: a few megabytes of them would ask for gigabytes.
# Real vocabularies, of 32,000 (Llama 2) as of 256,000 (Gemma), have about 2 merges and 6 letters per token.
LETTERS_PER_TOKEN, LETTERS_BESIDES = 16, 65_536
MERGES_PER_TOKEN, MERGES_BESIDES = 6, 16_384

_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def parts_from_gguf(metadata: Mapping[str, object], file: Path, *, deferred: bool = False) -> TokenizerParts:
    """Tokenizer parts out of GGUF `metadata` (scalars, strings, lists, `TextArray`s, numpy arrays).

    deferred: where the kind allows it, what only encoding needs is built, and checked, by the first text.
    Raises `ModelFileError` naming the key for missing, damaged or contradictory values, `UnsupportedError`
    for an unknown `tokenizer.ggml.model` or `tokenizer.ggml.pre`.
    """
    reader = _Metadata(metadata, file)
    kind = reader.text("model")
    tokens = reader.tokens()
    types = reader.types(tokens)
    specials = _specials(tokens, types, reader)
    if kind == "gpt2":
        pre = reader.text("pre", "default")
        pretokenizers.require_known(pre, file)
        whole = partial(_byte_level, tokens, types, pre, reader)
        vocabulary: Vocabulary = _deferred(tokens, types, whole) if deferred else whole()
        add_bos = reader.flag("add_bos_token", pre in pretokenizers.ADDS_BOS)
    elif kind == "llama":
        vocabulary = _sentencepiece(tokens, types, reader)
        add_bos = reader.flag("add_bos_token", True)
    else:
        raise UnsupportedError(
            f"{file}: unknown vocabulary kind '{kind}' (tokenizer.ggml.model).", "Known: gpt2, llama."
        )
    by_name = {special.name: special.id for special in specials}
    stated = [reader.token_id(key, len(tokens)) for key in _STOP_KEYS]
    bos_id = reader.token_id("bos_token_id", len(tokens))
    return TokenizerParts(
        vocabulary=vocabulary,
        specials=specials,
        bos_id=bos_id,
        eos_id=stated[0],
        stop_ids=end_of_turn_ids(by_name) | {token for token in stated if token is not None},
        add_bos=add_bos and bos_id is not None,
        source=str(file),
    )


class _Metadata:
    """Typed access to the `tokenizer.ggml.*` keys, each failure naming its key."""

    def __init__(self, metadata: Mapping[str, object], file: Path) -> None:
        self._metadata = metadata
        self.file = file

    def get(self, key: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}")

    def bad(self, key: str, reason: str, **facts: object) -> ModelFileError:
        expected, got = facts.get("expected"), facts.get("got")
        return ModelFileError(self.file, reason, field=f"tokenizer.ggml.{key}", expected=expected, got=got)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key)
        if value is None:
            value = default
        if not isinstance(value, str):
            raise self.bad(key, "missing or no string", got=type(value).__name__)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool | np.bool_):
            raise self.bad(key, "no boolean", got=value)
        return bool(value)

    def token_id(self, key: str, size: int) -> int | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise self.bad(key, "no integer", got=value)
        if not 0 <= int(value) < size:
            raise self.bad(key, "token id out of range", expected=f"below {size}", got=value)
        return int(value)

    def strings(self, key: str) -> Sequence[str]:
        value = self.get(key)
        if isinstance(value, TextArray):
            return value
        if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
            raise self.bad(key, "missing or no array", got=type(value).__name__)
        items = value if isinstance(value, list) else list(value)
        if not set(map(type, items)) <= {str}:
            raise self.bad(key, "an entry is no string")
        return items

    def numbers(self, key: str, length: int, kinds: str) -> np.ndarray[Any, Any] | None:
        """The numeric array of exactly `length` entries, its dtype of one of numpy's `kinds`."""
        value = self.get(key)
        if value is None:
            return None
        try:
            array = np.array(value)
        except (ValueError, OverflowError):
            raise self.bad(key, "no array of numbers") from None
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise self.bad(key, "no array of numbers", got=f"{array.dtype}, {array.ndim} dimensions")
        if len(array) != length:
            raise self.bad(key, "wrong length", expected=length, got=len(array))
        return array

    def tokens(self) -> Sequence[str]:
        tokens = self.strings("tokens")
        if not tokens:
            raise self.bad("tokens", "no tokens")
        return tokens

    def types(self, tokens: Sequence[str]) -> np.ndarray[Any, Any]:
        types = self.numbers("token_type", len(tokens), "iu")
        if types is None:
            return np.full(len(tokens), NORMAL)
        wrong = np.flatnonzero((types < NORMAL) | (types > BYTE))
        if len(wrong):
            place = int(wrong[0])
            raise self.bad(
                "token_type", f"unknown type of token {place}", expected="1 to 6", got=types[place]
            )
        return types


def _specials(
    tokens: Sequence[str], types: np.ndarray[Any, Any], reader: _Metadata
) -> tuple[SpecialToken, ...]:
    """The special tokens; `types` is corrected in place where a file types a well-known end name as text.

    Only names of the form <|...|> are: `</s>` is also HTML, and an ordinary token in Qwen's vocabulary.
    """
    for name in END_OF_TURN_NAMES:
        for place in _places(tokens, name) if name.startswith("<|") else ():
            if types[place] != UNUSED:
                types[place] = CONTROL
    found: dict[str, SpecialToken] = {}
    for place in np.flatnonzero(np.isin(types, (UNKNOWN, CONTROL, USER_DEFINED))).tolist():
        name = tokens[place]
        if name in found:
            raise reader.bad("tokens", f"special token {place} repeats token {found[name].id}", got=name)
        if name:
            found[name] = SpecialToken(name, place, control=int(types[place]) != USER_DEFINED)
    return tuple(found.values())


def _places(tokens: Sequence[str], name: str) -> list[int]:
    if isinstance(tokens, TextArray):
        return tokens.places(name)
    return [place for place, token in enumerate(tokens) if token == name] if name in tokens else []


def _ordinary(
    tokens: Sequence[str], types: np.ndarray[Any, Any], kept: Iterable[int], reader: _Metadata
) -> dict[str, int]:
    """Token text to id for the tokens of the `kept` types; these must not repeat."""
    places = np.flatnonzero(np.isin(types, list(kept))).tolist()
    vocabulary = {tokens[place]: place for place in places}
    if len(vocabulary) != len(places):
        repeated = next(tokens[place] for place in places if vocabulary[tokens[place]] != place)
        raise reader.bad("tokens", "a token appears twice", got=repeated)
    vocabulary.pop("", None)
    return vocabulary


def _byte_level(
    tokens: Sequence[str], types: np.ndarray[Any, Any], pre: str, reader: _Metadata
) -> ByteLevelVocabulary:
    from tokenizers import Tokenizer as Encoder
    from tokenizers import normalizers

    texts, tokens = _texts(tokens, types), list(tokens)
    vocabulary = _ordinary(tokens, types, (NORMAL, BYTE), reader)
    merges = [tuple(merge.split(" ", 1)) for merge in reader.strings("merges")]
    encoder = Encoder(
        _model(vocabulary, merges, tokens, reader, ignore_merges=pre in pretokenizers.WHOLE_WORD_FIRST)
    )
    encoder.pre_tokenizer = pretokenizers.build(pre)
    if pre in pretokenizers.NFC_NORMALIZED:
        encoder.normalizer = normalizers.NFC()
    return ByteLevelVocabulary(encoder, texts, vocabulary, str(reader.file))


def _sentencepiece(
    tokens: Sequence[str], types: np.ndarray[Any, Any], reader: _Metadata
) -> SentencePieceVocabulary:
    from tokenizers import Tokenizer as Encoder
    from tokenizers import normalizers

    texts, tokens = _texts(tokens, types), list(tokens)
    normal = _ordinary(tokens, types, (NORMAL,), reader)
    scores = reader.numbers("scores", len(tokens), "fiu")
    if scores is None:
        raise reader.bad("scores", "missing")
    merges = merges_from_scores(normal, scores, reader)
    bytes_by_id: dict[int, int] = {}
    for place in np.flatnonzero(types == BYTE).tolist():
        byte = byte_of_token(tokens[place])
        if byte is None:
            raise reader.bad("tokens", f"byte token {place} is not of the form <0xNN>", got=tokens[place])
        bytes_by_id[place] = byte
    vocabulary = {**normal, **{f"<0x{byte:02X}>": place for place, byte in bytes_by_id.items()}}
    encoder = Encoder(_model(vocabulary, merges, tokens, reader, byte_fallback=True))
    encoder.normalizer = normalizers.Replace(" ", SPACE_MARK)
    prefix: SpacePrefix = "each" if reader.flag("add_space_prefix", True) else "none"
    return SentencePieceVocabulary(encoder, texts, bytes_by_id, prefix, str(reader.file))


def merges_from_scores(
    vocabulary: Mapping[str, int], scores: np.ndarray[Any, Any], reader: _Metadata
) -> list[tuple[str, str]]:
    """The merge list that a SentencePiece BPE vocabulary implies: best score first.

    A token can arise from every pair of tokens that spell it; SentencePiece ranks such a merge by the
    token's own score alone, so the order among its pairs (by their ids) is free. Raises ModelFileError for
    a vocabulary with more text or merges than any real one of its size.
    """
    most_letters = LETTERS_PER_TOKEN * len(vocabulary) + LETTERS_BESIDES
    letters = sum(map(len, vocabulary))
    if letters > most_letters:
        raise reader.bad("tokens", "too much text", expected=f"at most {most_letters} letters", got=letters)
    most_merges = MERGES_PER_TOKEN * len(vocabulary) + MERGES_BESIDES
    texts = {place: token for token, place in vocabulary.items()}
    found: list[tuple[float, int, int]] = []
    for token, place in vocabulary.items():
        if len(token) > MAX_PIECE_LENGTH:
            raise reader.bad("tokens", f"token {place} is too long", expected=f"at most {MAX_PIECE_LENGTH}")
        rank = -float(scores[place])
        for cut in range(1, len(token)):
            left = vocabulary.get(token[:cut])
            if left is not None and (right := vocabulary.get(token[cut:])) is not None:
                found.append((rank, left, right))
        if len(found) > most_merges:
            raise reader.bad("tokens", "too many merges", expected=f"at most {most_merges}")
    found.sort()
    return [(texts[left], texts[right]) for _, left, right in found]


def _model(
    vocabulary: dict[str, int],
    merges: list[Any],
    tokens: Sequence[str],
    reader: _Metadata,
    **options: bool,
) -> Any:
    """The BPE model. Merges that touch a token kept out of `vocabulary` are left out; others must fit."""
    from tokenizers import models

    try:
        return models.BPE(vocab=vocabulary, merges=merges, **options)
    except Exception:  # the library names no class of its own; what is really wrong comes out below
        outside = set(tokens).difference(vocabulary)
        kept = [m for m in merges if outside.isdisjoint((*m, "".join(m)))]
    with library_errors(reader.file, "tokenizer.ggml.merges"):
        return models.BPE(vocab=vocabulary, merges=kept, **options)


def _deferred(
    tokens: Sequence[str], types: np.ndarray[Any, Any], whole: Callable[[], ByteLevelVocabulary]
) -> DeferredVocabulary:
    texts = _texts(tokens, types)
    return DeferredVocabulary(len(tokens), "none", lambda token: byte_level_bytes(texts[token]), whole)


def _texts(tokens: Sequence[str], types: np.ndarray[Any, Any]) -> Sequence[str | None]:
    """The text of every id, None where there is none."""
    unused = np.flatnonzero(types == UNUSED).tolist()
    return _WithGaps(tokens, frozenset(unused)) if unused else tokens


class _WithGaps(Sequence[str | None]):
    """Texts, with None in some places."""

    def __init__(self, texts: Sequence[str], gaps: frozenset[int]) -> None:
        self._texts = texts
        self._gaps = gaps

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, place: Any) -> Any:
        return None if place in self._gaps else self._texts[place]
