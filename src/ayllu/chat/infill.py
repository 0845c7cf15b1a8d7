"""Text with a gap to tokens: what a model trained for it writes into the gap is the answer.

Each family has three control tokens for it, laid out prefix, suffix, middle (PSM), the one order that all of
them were trained on. Both texts come from outside, so whatever they spell, they stay text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ayllu.chat.tokenizer import Tokenizer
from ayllu.chat.vocabulary import valid_unicode
from ayllu.errors import UsageError

_NAMES = (
    # Qwen 2.5 Coder, CodeGemma, Llama 4
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    # StarCoder and Granite; SantaCoder
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    # Code Llama
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    # DeepSeek Coder, whose "hole" stands where the suffix begins
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
# The first of each pair is llama.cpp's key today, the second the one it wrote before.
_GGUF_KEYS = (
    ("fim_pre_token_id", "prefix_token_id"),
    ("fim_suf_token_id", "suffix_token_id"),
    ("fim_mid_token_id", "middle_token_id"),
)
# What ends a filling beside the document's end: the next file or repository, padding, Code Llama's own end.
_ENDS = ("<|fim_pad|>", "<|file_sep|>", "<|repo_name|>", "<fim_pad>", "<file_sep>", "▁<EOT>")
_GGUF_ENDS = ("fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id", "eot_token_id")


@dataclass(frozen=True)
class InfillFormat:
    """The three control tokens of a model that fills gaps. stop_ids: what ends a filling, beside the model's
    own stop ids."""

    tokenizer: Tokenizer
    prefix_id: int
    suffix_id: int
    middle_id: int
    stop_ids: frozenset[int]

    def render(self, prefix: str, suffix: str) -> list[int]:
        """BOS where the model wants it, then prefix, suffix and the opening of the middle.

        The suffix gets no leading space from the vocabulary: it goes on from what is missing. Raises
        UsageError where a vocabulary spells one of the three as plain text.
        """
        tokenizer = self.tokenizer
        before = tokenizer.encode(prefix)
        after = tokenizer.parts.vocabulary.encode(valid_unicode(suffix), prefix_space=False) if suffix else []
        controls = {self.prefix_id, self.suffix_id, self.middle_id}
        if not controls.isdisjoint(before) or not controls.isdisjoint(after):
            raise UsageError("A text spells a fill-in-the-middle token.", "Leave the token out of the text.")
        bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        return [*bos, self.prefix_id, *before, self.suffix_id, *after, self.middle_id]


def infill_format_for(tokenizer: Tokenizer, metadata: Mapping[str, object]) -> InfillFormat | None:
    """How the model fills gaps; None where it has no tokens for it.

    metadata: of its GGUF file, whose word on the ids goes before well-known names; empty for other files.
    """
    ids = _stated(tokenizer, metadata) or _named(tokenizer)
    if ids is None:
        return None
    ends = {tokenizer.specials[name] for name in _ENDS if name in tokenizer.specials}
    stated = [_token_id(tokenizer, metadata, key) for key in _GGUF_ENDS]
    ends |= {token for token in stated if token is not None}
    return InfillFormat(tokenizer, *ids, frozenset(ends))


def _stated(tokenizer: Tokenizer, metadata: Mapping[str, object]) -> tuple[int, int, int] | None:
    found = []
    for keys in _GGUF_KEYS:
        ids = [_token_id(tokenizer, metadata, key) for key in keys]
        found.append(next((token for token in ids if token is not None), None))
    prefix, suffix, middle = found
    if prefix is None or suffix is None or middle is None or len({prefix, suffix, middle}) < 3:
        return None
    return prefix, suffix, middle


def _token_id(tokenizer: Tokenizer, metadata: Mapping[str, object], key: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        return None
    return int(value) if 0 <= int(value) < tokenizer.vocab_size else None


def _named(tokenizer: Tokenizer) -> tuple[int, int, int] | None:
    for names in _NAMES:
        if all(name in tokenizer.specials for name in names):
            prefix, suffix, middle = (tokenizer.specials[name] for name in names)
            return prefix, suffix, middle
    return None
