"""WordPiece vocabularies (BERT's) over the `tokenizers` library: words, and `##` pieces that continue one.

The way back is not exact: case, accents, control characters and kinds of white space are lost on the way in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ayllu.chat.bpe_vocabulary import encode_in_pieces
from ayllu.chat.vocabulary import SpacePrefix, library_errors
from ayllu.errors import ModelFileError, UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Encoder

NORMALIZERS = frozenset({"Sequence", "BertNormalizer"})
PRE_TOKENIZERS = frozenset({"Sequence", "BertPreTokenizer"})

# The search for pieces takes the square of a word's length; BERT gives up on words of more than 100.
MAX_WORD_CHARACTERS = 1000


class WordPieceVocabulary:
    """Words split into the longest known pieces; a word that cannot be split so is the unknown token."""

    space_prefix: SpacePrefix = "each"

    def __init__(
        self, encoder: Encoder, texts: Sequence[str | None], continuing_prefix: str, source: str
    ) -> None:
        """`texts[id]`: the token's text, None where there is none; `continuing_prefix` marks inner pieces."""
        self._encoder = encoder
        self._texts = texts
        self._prefix = continuing_prefix
        self._source = source
        self.size = len(texts)

    def encode(self, text: str, *, prefix_space: bool = False) -> list[int]:
        del prefix_space  # white space only separates words here
        return encode_in_pieces(self._encoder, text, self._source)

    def bytes_of(self, token: int) -> bytes:
        text = self._texts[token]
        if text is None:
            return b""
        if self._prefix and text.startswith(self._prefix):
            return text.removeprefix(self._prefix).encode("utf-8", "replace")
        return f" {text}".encode("utf-8", "replace")


def wordpiece_model(model: Mapping[str, Any], specials: Mapping[str, int], file: Path) -> Any:
    """The library's model for the `model` part of a tokenizer.json.

    Special tokens are gone from its vocabulary by now, so no text can spell one. Only the unknown token comes
    back: words become it because they are unknown, whatever they spell.
    """
    from tokenizers import models

    unknown = model.get("unk_token")
    if not isinstance(unknown, str):
        raise ModelFileError(file, "missing or no text", field="model.unk_token")
    vocab: dict[str, int] = dict(model["vocab"])
    if unknown in specials:
        vocab[unknown] = specials[unknown]
    if unknown not in vocab:
        raise ModelFileError(file, "is not in the vocabulary", field="model.unk_token", got=unknown)
    longest = model.get("max_input_chars_per_word", 100)
    if not isinstance(longest, int) or isinstance(longest, bool) or not 0 < longest <= MAX_WORD_CHARACTERS:
        raise UnsupportedError(
            f"{file}: model.max_input_chars_per_word = {str(longest)[:40]}.",
            f"Only 1 to {MAX_WORD_CHARACTERS} is supported.",
        )
    with library_errors(file, "model"):
        return models.WordPiece(
            vocab=vocab,
            unk_token=unknown,
            max_input_chars_per_word=longest,
            continuing_subword_prefix=continuing_prefix(model, file),
        )


def continuing_prefix(model: Mapping[str, Any], file: Path) -> str:
    """What marks a piece that continues a word, `##` in every BERT."""
    prefix = model.get("continuing_subword_prefix", "##")
    if not isinstance(prefix, str):
        raise ModelFileError(file, "no text", field="model.continuing_subword_prefix")
    return prefix


def enclosing_ids(post_processor: object, specials: Mapping[str, int]) -> tuple[int | None, int | None]:
    """The special tokens that the file's post-processor puts before and after a single text, [CLS] and [SEP]
    in BERT; None for each where it does no such thing."""
    rule = post_processor if isinstance(post_processor, dict) else {}
    names: list[object] = [None, None]
    single = rule.get("single")
    if rule.get("type") == "BertProcessing":
        # Each is a pair of name and id.
        names = [
            pair[0] if isinstance(pair, list) and pair else None
            for pair in (rule.get("cls"), rule.get("sep"))
        ]
    elif rule.get("type") == "TemplateProcessing" and isinstance(single, list) and len(single) == 3:
        before, text, after = single
        if _name_in(text, "Sequence") is not None:
            names = [_name_in(before, "SpecialToken"), _name_in(after, "SpecialToken")]
    first, last = (specials.get(name) if isinstance(name, str) else None for name in names)
    return first, last


def _name_in(step: object, kind: str) -> object:
    """The name that a step of a template holds, None where it is of another kind."""
    inner = step.get(kind) if isinstance(step, dict) else None
    return inner.get("id") if isinstance(inner, dict) else None
