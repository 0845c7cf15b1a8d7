"""Vocabularies from `tokenizer.json` into GGUF and back: the same ids as the `tokenizers` library gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from ayllu.chat.tokenizer import tokenizer_from_gguf
from ayllu.errors import UnsupportedError
from ayllu.weights.gguf import read_gguf
from ayllu.weights.gguf_vocabulary import SPLIT_NAMES, gguf_vocabulary_metadata, pre_tokenizer_name
from ayllu.weights.gguf_writer import write_gguf
from tests.chat.small_vocabularies import CORPUS, SAMPLES

EXPRESSIONS = {name: expression for expression, name in SPLIT_NAMES.items()}
PRE_TOKENIZERS: dict[str, Any] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
} | {
    name: lambda expression=expression: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for name, expression in EXPRESSIONS.items()
}


def trained(pre: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "gpt-4o")))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>", "<|pad|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return tokenizer


CONFIG = {
    "bos_token": "<|bos|>",
    "eos_token": {"content": "<|eos|>"},
    "pad_token": "<|pad|>",
    "unk_token": None,
}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_vocabulary_written_to_gguf_encodes_as_the_tokenizers_library(pre: str, tmp_path: Path) -> None:
    theirs = trained(pre)
    size = theirs.get_vocab_size()
    metadata = gguf_vocabulary_metadata(json.loads(theirs.to_str()), CONFIG, vocab_size=size + 3)
    assert metadata["tokenizer.ggml.pre"] == pre
    write_gguf(tmp_path / "v.gguf", metadata, [])
    read = read_gguf(tmp_path / "v.gguf").metadata
    ours = tokenizer_from_gguf(read, tmp_path / "v.gguf")
    for sample in SAMPLES:
        assert ours.encode(sample) == theirs.encode(sample, add_special_tokens=False).ids, sample
    assert len(read["tokenizer.ggml.tokens"]) == size + 3
    assert (ours.bos_id, ours.eos_id) == (theirs.token_to_id("<|bos|>"), theirs.token_to_id("<|eos|>"))
    assert read["tokenizer.ggml.padding_token_id"] == theirs.token_to_id("<|pad|>")
    assert ours.special_id("<|pad|>") == theirs.token_to_id("<|pad|>")


def test_token_types_tell_control_from_text_and_unused() -> None:
    theirs = trained("gpt-2")
    size = theirs.get_vocab_size()
    metadata = gguf_vocabulary_metadata(json.loads(theirs.to_str()), vocab_size=size + 2)
    types = metadata["tokenizer.ggml.token_type"].tolist()
    assert types[-6:] == [3, 3, 3, 4, 5, 5]
    assert set(types[:-6]) == {1}
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{size + 1}]"


def test_llama4_shares_the_expression_of_gpt_4o_under_its_own_name() -> None:
    tokenizer = json.loads(trained("gpt-4o").to_str())
    assert pre_tokenizer_name(tokenizer, "llama") == "gpt-4o"
    assert pre_tokenizer_name(tokenizer, "llama4") == "llama4"


def test_merges_as_pairs_and_as_texts_are_the_same() -> None:
    tokenizer = json.loads(trained("gpt-2").to_str())
    pairs = tokenizer["model"]["merges"]
    texts = {**tokenizer, "model": {**tokenizer["model"], "merges": [" ".join(pair) for pair in pairs]}}
    written = [gguf_vocabulary_metadata(form)["tokenizer.ggml.merges"] for form in (tokenizer, texts)]
    assert written[0] == written[1] and len(written[0]) == len(pairs)


@pytest.mark.parametrize(
    ("said", "first", "expected"),
    [
        ({"add_bos_token": True}, None, True),
        ({"add_bos_token": False}, "<|bos|>", False),
        ({}, "<|bos|>", True),
        ({}, "<|other|>", False),
        ({}, None, False),
    ],
)
def test_whether_texts_start_with_bos(said: dict[str, Any], first: str | None, expected: bool) -> None:
    tokenizer = json.loads(trained("gpt-2").to_str())
    single = [{"SpecialToken": {"id": first}}] if first else []
    tokenizer["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel"},
            {"type": "TemplateProcessing", "single": [*single, {"Sequence": {}}]},
        ],
    }
    metadata = gguf_vocabulary_metadata(tokenizer, CONFIG | said)
    assert metadata["tokenizer.ggml.add_bos_token"] is expected


def test_chat_template_is_taken_from_where_it_is_given() -> None:
    tokenizer = json.loads(trained("gpt-2").to_str())
    from_config = gguf_vocabulary_metadata(tokenizer, {"chat_template": "{{ a }}"})
    assert from_config["tokenizer.chat_template"] == "{{ a }}"
    given = gguf_vocabulary_metadata(tokenizer, {"chat_template": "{{ a }}"}, chat_template="{{ b }}")
    assert given["tokenizer.chat_template"] == "{{ b }}"
    assert "tokenizer.chat_template" not in gguf_vocabulary_metadata(tokenizer)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "Only byte-level BPE"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "Only byte-level BPE"),
        ({"pre_tokenizer": None}, "Only byte-level BPE"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": "x"}},
                        {"type": "ByteLevel", "use_regex": False},
                    ],
                }
            },
            "no name for this tokenizer's way",
        ),
        ({"added_tokens": [{"id": 2**31, "content": "far", "special": True}]}, "do not fit a vocabulary"),
        ({"added_tokens": [{"id": -1, "content": "x"}]}, "id -1"),
        ({"added_tokens": [{"id": True, "content": "x"}]}, "id True"),
        ({"added_tokens": [{"id": 3}]}, "has no text"),
        ({"added_tokens": ["x"]}, "has no text"),
        ({"model": {"type": "BPE", "vocab": {"a": "1"}}}, "id 1"),
        ({"model": {"type": "BPE", "vocab": {}}, "added_tokens": []}, "do not fit"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["abc"]}}, "not a pair"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [7]}}, "not a pair"),
    ],
)
def test_vocabularies_gguf_cannot_hold_are_refused(change: dict[str, Any], complaint: str) -> None:
    tokenizer = json.loads(trained("gpt-2").to_str())
    with pytest.raises(UnsupportedError, match=complaint):
        gguf_vocabulary_metadata(tokenizer | change)


def test_more_tokens_than_embeddings_is_refused() -> None:
    tokenizer = trained("gpt-2")
    rows = tokenizer.get_vocab_size() - 1
    with pytest.raises(UnsupportedError, match=f"do not fit {rows} embeddings"):
        gguf_vocabulary_metadata(json.loads(tokenizer.to_str()), vocab_size=rows)
