"""A model's vocabulary as the grammar library wants it, and the limits under which it may work.

The same few facts make the library's tokenizer here and, sent through a pipe, in the process that tries
grammars out; so what compiles there compiles here.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import llguidance

from ayllu.chat.tokenizer import Tokenizer
from ayllu.errors import AylluError

_CONTROL_MARK = b"\xff"
"""How the library marks control tokens. No text has this byte: ordinary tokens with it are left out."""

LIMITS = llguidance.LLParserLimits(
    max_items_in_row=500,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=25_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
"""The library's own defaults, with two exceptions. 25,000 states of the lexer take some 20 MB, not 200. And
500 rules that may go on at one place keep a mask below 50 ms: with 2,000, `a: a a a | a a | /[a-z]/` took
1.5 s for one. Errors come without dumps of the parser, which would carry what users wrote into logs."""

COMPILING_STACK_BYTES = 16 << 20
TRYING_STACK_BYTES = 4 << 20
"""The library recurses along rules, and a stack that is too small ends the process. So grammars are tried out
on a stack a quarter of the one they are compiled on."""


@dataclass(frozen=True)
class GrammarVocabulary:
    """Bytes of every token, ids of control tokens, and the ids that end an answer."""

    tokens: tuple[bytes, ...]
    control_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, stop_ids: Iterable[int]) -> GrammarVocabulary:
        """The vocabulary of a tokenizer whose answers end with one of `stop_ids`."""
        size = tokenizer.vocab_size
        stops = tuple(sorted(token for token in stop_ids if token < size))
        control = tuple(token for token in range(size) if tokenizer.is_control(token) or token in stops)
        hidden = set(control)
        tokens = tuple(
            data if token in hidden or not data.startswith(_CONTROL_MARK) else b""
            for token, data in enumerate(map(tokenizer.token_bytes, range(size)))
        )
        return cls(tokens, control, stops)

    def to_json(self) -> dict[str, Any]:
        """As plain data, for a pipe."""
        joined = base64.b64encode(b"".join(self.tokens)).decode("ascii")
        lengths = [len(token) for token in self.tokens]
        return {"bytes": joined, "lengths": lengths, "control": self.control_ids, "stops": self.stop_ids}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GrammarVocabulary:
        """What `to_json` gave."""
        joined = base64.b64decode(data["bytes"])
        tokens, start = [], 0
        for length in data["lengths"]:
            tokens.append(joined[start : start + length])
            start += length
        return cls(tuple(tokens), tuple(data["control"]), tuple(data["stops"]))

    def library_tokenizer(self, encode: Callable[[str], list[int]] | None = None) -> llguidance.LLTokenizer:
        """The library's tokenizer. `encode` is the model's own, which text that a grammar forces is best cut
        by; without one it is cut greedily, which means the same text."""
        encoder = _ForcedText(self, encode)
        library = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(encoder), eos_token=list(self.stop_ids) or None
        )
        encoder.library = library
        return library


class _ForcedText:
    """What the library asks for the tokens of a text, which must give the text back: it does not check."""

    def __init__(self, vocabulary: GrammarVocabulary, encode: Callable[[str], list[int]] | None) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.control_ids
        self.eos_token_id = vocabulary.stop_ids[0] if vocabulary.stop_ids else None
        self.bos_token_id = None
        self.library: llguidance.LLTokenizer | None = None
        self._encode = encode

    def __call__(self, text: bytes) -> list[int]:
        if self.library is None:
            return []
        try:
            ids = self._encode(text.decode()) if self._encode is not None else []
            if b"".join([self.tokens[token] for token in ids]) == text:
                return ids
        except (AylluError, UnicodeDecodeError, IndexError):
            pass
        # Vocabularies that add a space, or normalise, do not give every text back.
        return self.library.greedy_tokenize(text.decode("utf-8", "replace"))
