r"""The vocabulary of a Hugging Face `tokenizer.json` as GGUF metadata, for models whose merges work on bytes.

GGUF names the rule that cuts text into words instead of storing it, so only rules with a name can be
written; they are recognised by their exact expression. Keys: the GGUF specification, section "Tokenizer".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ayllu.errors import UnsupportedError, clip

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDING = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"

SPLIT_NAMES = {
    rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_ENDING}": "qwen2",
    rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_ENDING}": "llama-bpe",
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_ENDING}": "gpt-4o",
}
"""Expression in `tokenizer.json` -> `tokenizer.ggml.pre`. Llama 4 shares GPT-4o's expression."""

_FIX = "Write the tokenizer as tokenizer.json beside safetensors instead."


def gguf_vocabulary_metadata(
    tokenizer: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any] | None = None,
    *,
    vocab_size: int | None = None,
    architecture: str = "llama",
    chat_template: str | None = None,
) -> dict[str, Any]:
    """`tokenizer.ggml.*` and the chat template, from the parsed `tokenizer.json` and `tokenizer_config.json`.

    `vocab_size` pads the tokens up to the embedding's rows. Raises UnsupportedError for vocabularies other
    than byte-level BPE, for unknown word rules and for contradictory ids.
    """
    config = tokenizer_config or {}
    model = _mapping(tokenizer, "model")
    if model.get("type") != "BPE" or not _ends_in_bytes(tokenizer):
        raise UnsupportedError("Only byte-level BPE vocabularies can be written to GGUF.", _FIX)
    texts, types = _tokens(model, tokenizer.get("added_tokens"), vocab_size)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer_name(tokenizer, architecture),
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": _merges(model),
    }
    numbers = {text: number for number, text in enumerate(texts)}
    for key in ("bos", "eos", "padding", "unknown"):
        text = _named_token(config, {"padding": "pad", "unknown": "unk"}.get(key, key))
        if text is not None and text in numbers:
            metadata[f"tokenizer.ggml.{key}_token_id"] = numbers[text]
    metadata["tokenizer.ggml.add_bos_token"] = _adds_bos(tokenizer, config)
    template = chat_template or config.get("chat_template")
    if isinstance(template, str):
        metadata["tokenizer.chat_template"] = template
    return metadata


def pre_tokenizer_name(tokenizer: Mapping[str, Any], architecture: str = "llama") -> str:
    """The GGUF name of the rule that cuts text into words. Raises UnsupportedError if it has none."""
    steps = _pre_tokenizer_steps(tokenizer)
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        pattern = steps[0].get("pattern")
        expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
        name = SPLIT_NAMES.get(expression) if isinstance(expression, str) else None
        if name is not None:
            return "llama4" if name == "gpt-4o" and architecture == "llama4" else name
    raise UnsupportedError(
        f"GGUF has no name for this tokenizer's way of cutting words ({clip(kinds)}).", _FIX
    )


def _mapping(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    inner = value.get(key)
    return inner if isinstance(inner, Mapping) else {}


def _pre_tokenizer_steps(tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    outer = _mapping(tokenizer, "pre_tokenizer")
    steps = outer.get("pretokenizers") if outer.get("type") == "Sequence" else [outer]
    return [step for step in steps if isinstance(step, Mapping)] if isinstance(steps, list) else []


def _ends_in_bytes(tokenizer: Mapping[str, Any]) -> bool:
    steps = _pre_tokenizer_steps(tokenizer)
    return bool(steps) and steps[-1].get("type") == "ByteLevel"


def _tokens(model: Mapping[str, Any], added: Any, vocab_size: int | None) -> tuple[list[str], list[int]]:
    """Texts and types by id. Ids without a token get a placeholder name and the type unused."""
    kinds: dict[int, tuple[str, int]] = {}
    for text, number in _mapping(model, "vocab").items():
        kinds[_id(number)] = (str(text), NORMAL)
    for token in added if isinstance(added, list) else []:
        if not isinstance(token, Mapping) or not isinstance(token.get("content"), str):
            raise UnsupportedError("An added token has no text.", "Check tokenizer.json.")
        kinds[_id(token.get("id"))] = (token["content"], CONTROL if token.get("special") else USER_DEFINED)
    size = max(max(kinds, default=-1) + 1, vocab_size or 0)
    if not kinds or size > 2 * len(kinds) + (1 << 16) or (vocab_size is not None and size > vocab_size):
        room = "a vocabulary" if vocab_size is None else f"{vocab_size} embeddings"
        raise UnsupportedError(
            f"{len(kinds)} tokens with ids up to {size - 1} do not fit {room}.",
            "Check that tokenizer.json belongs to this model.",
        )
    filled = [kinds.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    return [text for text, _ in filled], [kind for _, kind in filled]


def _id(number: object) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise UnsupportedError(f"A token has the id {clip(number)}.", "Check tokenizer.json.")
    return number


def _merges(model: Mapping[str, Any]) -> list[str]:
    """Merges as "left right"; `tokenizer.json` has them so, or as pairs."""
    merges = model.get("merges")
    texts = [
        merge if isinstance(merge, str) else " ".join(map(str, merge)) if isinstance(merge, list) else ""
        for merge in (merges if isinstance(merges, list) else [])
    ]
    if not all(text.count(" ") == 1 for text in texts):
        raise UnsupportedError("A merge of the vocabulary is not a pair.", "Check tokenizer.json.")
    return texts


def _named_token(config: Mapping[str, Any], name: str) -> str | None:
    token = config.get(f"{name}_token")
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _adds_bos(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether every text starts with the bos token: said outright, or by the post-processor's template."""
    said = config.get("add_bos_token")
    if isinstance(said, bool):
        return said
    outer = _mapping(tokenizer, "post_processor")
    steps = outer.get("processors") if outer.get("type") == "Sequence" else [outer]
    bos = _named_token(config, "bos")
    for step in steps if isinstance(steps, list) else []:
        single = step.get("single") if isinstance(step, Mapping) else None
        if isinstance(single, list) and single and isinstance(single[0], Mapping):
            first = _mapping(single[0], "SpecialToken").get("id")
            return first is not None and (bos is None or first == bos)
    return False
