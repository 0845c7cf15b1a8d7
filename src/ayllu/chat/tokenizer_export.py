"""A tokenizer written as the files of a Hugging Face folder, so that a converted model can still talk."""

from __future__ import annotations

import json
from typing import Any

from ayllu.chat.bpe_vocabulary import ByteLevelVocabulary
from ayllu.chat.pretokenizers import PATTERNS
from ayllu.chat.tokenizer import Tokenizer
from ayllu.errors import UnsupportedError


def tokenizer_files(tokenizer: Tokenizer, template: str | None = None) -> dict[str, str]:
    """File name -> text: tokenizer.json, its configs, and the chat template.

    Raises UnsupportedError for vocabularies that are not byte-level BPE.
    """
    parts = tokenizer.parts
    if not isinstance(parts.vocabulary, ByteLevelVocabulary):
        raise UnsupportedError(
            "Only byte-level vocabularies are written as tokenizer.json.",
            "Take the original tokenizer files.",
        )
    document = parts.vocabulary.document()
    _name_known_splits(document)
    flags = {"single_word": False, "normalized": False}
    for special in parts.specials:
        document["model"]["vocab"][special.name] = special.id
        document["added_tokens"].append(
            {
                "id": special.id,
                "content": special.name,
                "special": special.control,
                "lstrip": special.strip_left,
                "rstrip": special.strip_right,
                **flags,
            }
        )
    document["added_tokens"].sort(key=lambda token: token["id"])
    names = {special.id: special.name for special in parts.specials}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": parts.add_bos,
        "bos_token": names.get(parts.bos_id) if parts.bos_id is not None else None,
        "eos_token": names.get(parts.eos_id) if parts.eos_id is not None else None,
        "clean_up_tokenization_spaces": False,
    }
    generation = {"bos_token_id": parts.bos_id, "eos_token_id": sorted(parts.stop_ids)}
    files = {
        "tokenizer.json": json.dumps(document, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }
    return files | ({"chat_template.jinja": template} if template else {})


def _name_known_splits(document: dict[str, Any]) -> None:
    """Write GPT-2's split behind single digits as the steps that have names, as published files do."""
    steps = document["pre_tokenizer"]["pretokenizers"]
    expressions = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
    if expressions == list(PATTERNS["smollm"]):
        document["pre_tokenizer"]["pretokenizers"] = [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ]
