r"""How each family cuts text into words before byte-pair merging: one regular expression per family.

The names are those of `tokenizer.ggml.pre` in GGUF files. Patterns are in the Oniguruma dialect of the
`tokenizers` library; Llama 4's also runs in tiktoken (it is the split of OpenAI's o200k family).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ayllu.errors import UnsupportedError, did_you_mean

# Spelled as published files spell it, so that a written tokenizer.json is recognised by other programs.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

# One word of the o200k split: capitals then small letters, either part optional but not both; marks and
# letters without case (Lm, Lo: kana, hanzi) count as both.
_ANY_OR_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_ANY_OR_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"

O200K_PATTERN = (
    rf"{_LEAD}{_ANY_OR_UPPER}*{_ANY_OR_LOWER}+{_CONTRACTION}?"
    rf"|{_LEAD}{_ANY_OR_UPPER}+{_ANY_OR_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
LLAMA3_PATTERN = rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
QWEN2_PATTERN = rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Each name's patterns are applied in turn: what one isolates, the next cuts further.
PATTERNS: dict[str, tuple[str, ...]] = {
    # Files from before the key existed: llama.cpp's fallback splits off punctuation and digit triples too.
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (GPT2_PATTERN,),
    "smollm": (r"\p{N}", GPT2_PATTERN),
    "starcoder": (r"\p{N}", GPT2_PATTERN),
    "qwen2": (QWEN2_PATTERN,),
    "deepseek-r1-qwen": (QWEN2_PATTERN,),
    "llama-bpe": (LLAMA3_PATTERN,),
    "llama3": (LLAMA3_PATTERN,),
    "llama-v3": (LLAMA3_PATTERN,),
    "llama4": (O200K_PATTERN,),
    "gpt-4o": (O200K_PATTERN,),
    "o200k": (O200K_PATTERN,),
}

# tiktoken looks a whole word up before merging; vocabularies converted from it keep that rule.
WHOLE_WORD_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3", "llama4", "gpt-4o", "o200k"})
ADDS_BOS = frozenset({"llama-bpe", "llama3", "llama-v3", "llama4"})
NFC_NORMALIZED = frozenset({"qwen2", "deepseek-r1-qwen"})


def require_known(name: str, file: Path | str) -> None:
    """Raise `UnsupportedError` unless `name` is a split this module knows."""
    if name not in PATTERNS:
        raise UnsupportedError(
            f"{file}: unknown pre-tokenizer '{name}' (tokenizer.ggml.pre).{did_you_mean(name, PATTERNS)}",
            f"Known: {', '.join(PATTERNS)}.",
        )


def build(name: str) -> Any:
    """The `tokenizers` pre-tokenizer of the known split `name`, ending in the byte alphabet."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in PATTERNS[name]]
    return pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
