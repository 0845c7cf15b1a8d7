"""The same ids as independent implementations: transformers, the full `tokenizers` pipeline, tiktoken, and
SentencePiece's algorithm written out plainly."""

from __future__ import annotations

import json
import os
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import tiktoken
import tiktoken_ext.openai_public as openai_public
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from ayllu.chat.pretokenizers import O200K_PATTERN, PATTERNS
from ayllu.chat.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf
from ayllu.chat.vocabulary import valid_unicode
from tests.chat import small_vocabularies as small

GGUF = Path("model.gguf")

# Text that leans on what the splits look at: case, marks, contractions, digits, line ends, spaces, scripts.
TRICKY = st.lists(
    st.one_of(
        st.sampled_from(
            ["'s", "'LL", "'ſ", "’", "  ", "\r\n", "\n\n", "\t", " ", "/", "//", "ǅ", "ʰ", "\u0301",
             "が", "²", "Ⅷ", "١", "é", "É", "ß", "日本", "ー", "カ", "한", "\u200d", "😀", "\u00a0",
             "\u3000", "\u0085", "\u2028", "\u180e", "\x1c", "\x00", "_", "The", "iOS", "A", "b", "12"]
        ),
        st.characters(blacklist_categories=["Cs"]),
    ),
    max_size=30,
).map("".join)  # fmt: skip


def theirs(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """tiktoken's own pattern of an encoding, without fetching its ranks."""
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    return str(getattr(openai_public, name)()["pat_str"])


@pytest.fixture(scope="module")
def o200k_pattern() -> str:
    with pytest.MonkeyPatch.context() as patch:
        return theirs("o200k_base", patch)


@pytest.fixture(scope="module")
def byte_ranks() -> dict[bytes, int]:
    return {small.token_bytes(token): rank for rank, token in enumerate(small.trained("llama4")[0])}


@settings(max_examples=300)
@given(TRICKY)
def test_o200k_split_equals_tiktokens(o200k_pattern: str, text: str) -> None:
    assert regex.findall(O200K_PATTERN, text) == regex.findall(o200k_pattern, text)


@pytest.fixture(scope="module")
def encodings(o200k_pattern: str, byte_ranks: dict[bytes, int]) -> list[tiktoken.Encoding]:
    """tiktoken on the trained ranks: with our pattern, then with theirs."""
    return [
        tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=byte_ranks, special_tokens={})
        for pattern in (O200K_PATTERN, o200k_pattern)
    ]


@settings(max_examples=300)
@given(TRICKY)
def test_tiktoken_ids_equal_an_encoding_with_their_pattern(
    encodings: list[tiktoken.Encoding], text: str
) -> None:
    ours, published = (encoding.encode_ordinary(text) for encoding in encodings)
    assert ours == published


@pytest.fixture(scope="module")
def llama4_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    folder = small.write_tiktoken(tmp_path_factory.mktemp("tiktoken"))
    return load_tokenizer(folder), tokenizer_from_gguf(small.gguf_metadata("llama4"), GGUF)


@settings(max_examples=300)
@given(TRICKY)
def test_gguf_and_tiktoken_forms_of_one_vocabulary_agree(
    llama4_pair: tuple[Tokenizer, Tokenizer], text: str
) -> None:
    assert llama4_pair[0].encode(text) == llama4_pair[1].encode(text)


@pytest.mark.parametrize("text", small.SAMPLES)
def test_llama4_forms_agree_on_samples(llama4_pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    assert llama4_pair[0].encode(text) == llama4_pair[1].encode(text)


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "smollm", "llama4", "default"])
def test_json_and_gguf_equal_the_librarys_whole_pipeline(tmp_path: Path, pre: str) -> None:
    folder = small.write_model_folder(tmp_path, pre)
    whole = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
    from_json, from_gguf = load_tokenizer(folder), tokenizer_from_gguf(small.gguf_metadata(pre), GGUF)
    for text in small.SAMPLES:
        expected = whole.encode(text, add_special_tokens=False).ids
        assert from_json.encode(text) == expected
        assert from_gguf.encode(text) == expected
        assert from_json.decode(expected) == whole.decode(expected, skip_special_tokens=False)
    trusted = "<|im_start|>user\n日本語<tool_call>\n{}\n</tool_call><|im_end|>\n"
    assert from_json.encode_trusted(trusted) == whole.encode(trusted, add_special_tokens=False).ids


THEIR_SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


@settings(max_examples=200)
@given(TRICKY)
def test_our_splits_equal_the_published_ones(text: str) -> None:
    for name, published in THEIR_SPLITS.items():
        ours, published_split = (
            pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)
            for pattern in (PATTERNS[name][0], published)
        )
        assert ours == published_split


def sentencepiece_merge(symbols: list[str], scores: dict[str, float]) -> list[str]:
    """SentencePiece BPE as published: join the neighbours whose union scores best, leftmost first."""
    while True:
        pairs = [(scores.get(a + b), -i) for i, (a, b) in enumerate(pairwise(symbols))]
        best = max(((score, place) for score, place in pairs if score is not None), default=None)
        if best is None:
            return symbols
        place = -best[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


@settings(max_examples=200)
@given(st.text(alphabet="abtheinrc ▁日本語<s>/.é\n", max_size=40))
def test_sentencepiece_ids_equal_the_published_algorithm(text: str) -> None:
    metadata: dict[str, Any] = small.sentencepiece_metadata()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    normal = {t: i for i, t in enumerate(tokens) if types[i] == 1}
    scores = {t: metadata["tokenizer.ggml.scores"][i] for t, i in normal.items()}
    expected: list[int] = []
    for symbol in sentencepiece_merge(list(f" {text}".replace(" ", "▁")), scores) if text else []:
        whole = normal.get(symbol)
        expected += [whole] if whole is not None else [3 + byte for byte in symbol.encode()]
    assert tokenizer_from_gguf(metadata, GGUF).encode(text) == expected


def test_sentencepiece_json_and_gguf_agree(tmp_path: Path) -> None:
    document = small.sentencepiece_json()
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    from_json = load_tokenizer(tmp_path)
    from_gguf = tokenizer_from_gguf(small.sentencepiece_metadata(), GGUF)
    whole = LibraryTokenizer.from_str(json.dumps(document))
    for text in small.SAMPLES:
        assert from_json.encode(text) == from_gguf.encode(text)
        if "</s>" not in text:
            assert from_json.encode(text) == whole.encode(text, add_special_tokens=False).ids
    assert from_json.decode(from_json.encode(" two spaces")) == " two spaces"


def read_metadata(file: Path) -> dict[str, Any]:
    from ayllu.weights.gguf import read_gguf

    return read_gguf(file).metadata


def transformers_tokenizer(file: Path) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def test_smollm2_ids_equal_transformers(smollm2_gguf: Path) -> None:
    oracle = transformers_tokenizer(smollm2_gguf)
    tokenizer = tokenizer_from_gguf(read_metadata(smollm2_gguf), smollm2_gguf)
    for text in small.SAMPLES + small.CORPUS[:6]:
        if "½" not in text:
            assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # Reading a GGUF, transformers forgets that this model splits off every digit; it shows on ½ and ² alone.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    oracle.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    for text in small.SAMPLES:
        assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False)
    chat = "<|im_start|>user\n日本語 Hi!\n\n<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode_trusted(chat) == oracle.encode(chat, add_special_tokens=False)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (oracle.bos_token_id, oracle.eos_token_id)
    assert tokenizer.stop_ids == {tokenizer.special_id("<|im_end|>"), tokenizer.special_id("<|endoftext|>")}


def test_smollm2_lacks_some_bytes_and_replaces_their_characters(smollm2_gguf: Path) -> None:
    tokenizer = tokenizer_from_gguf(read_metadata(smollm2_gguf), smollm2_gguf)
    assert tokenizer.decode(tokenizer.encode("a\x04b\U00050000c")) == "a\ufffdb\ufffdc"


@pytest.mark.large
def test_qwen_ids_equal_transformers(qwen05_gguf: Path) -> None:
    oracle = transformers_tokenizer(qwen05_gguf)
    tokenizer = tokenizer_from_gguf(read_metadata(qwen05_gguf), qwen05_gguf)
    for text in small.SAMPLES + small.CORPUS[:6]:
        if unicodedata.is_normalized("NFC", text):
            assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False)
    # Its Qwen2Tokenizer normalises to NFC, but not when it is read from a GGUF.
    oracle.backend_tokenizer.normalizer = normalizers.NFC()
    for text in small.SAMPLES + small.CORPUS[:6]:
        assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False)
    chat = "<|im_start|>user\n日本語 Hi!\n\n<tool_call>\n{}</tool_call><|im_end|>\n"
    assert tokenizer.encode_trusted(chat) == oracle.encode(chat, add_special_tokens=False)
    assert tokenizer.stop_ids == {tokenizer.special_id("<|im_end|>"), tokenizer.special_id("<|endoftext|>")}
    typed = "<tool_call></s>[PAD151665]<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(typed)) == typed
    assert not any(map(tokenizer.is_special, tokenizer.encode(typed)))


def test_surrogate_pairs_are_read_as_tiktoken_reads_them(byte_ranks: dict[bytes, int]) -> None:
    encoding = tiktoken.Encoding("t", pat_str=O200K_PATTERN, mergeable_ranks=byte_ranks, special_tokens={})
    text = "a\ud83d\ude00b\udc00"
    assert encoding.encode_ordinary(valid_unicode(text)) == encoding.encode_ordinary(text)
