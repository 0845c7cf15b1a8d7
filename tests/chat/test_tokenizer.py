"""One tokenizer for every vocabulary: specials stay out of user text, ids and bytes stay right."""

from __future__ import annotations

import json
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.chat.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf
from ayllu.chat.vocabulary import pieces_of, valid_unicode
from ayllu.errors import ModelFileError, UnsupportedError, UsageError
from tests.chat import small_vocabularies as small

GGUF = Path("model.gguf")
KINDS = ["gguf", "gguf-smollm", "gguf-llama3", "json", "tiktoken", "sentencepiece", "sentencepiece-json"]


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("vocabularies")
    spm = folder / "spm"
    spm.mkdir()
    (spm / "tokenizer.json").write_text(json.dumps(small.sentencepiece_json()), encoding="utf-8")
    (spm / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return {
        "gguf": tokenizer_from_gguf(small.gguf_metadata(), GGUF),
        "gguf-smollm": tokenizer_from_gguf(small.gguf_metadata("smollm"), GGUF),
        "gguf-llama3": tokenizer_from_gguf(small.gguf_metadata("llama-bpe"), GGUF),
        "json": load_tokenizer(small.write_model_folder(folder / "json")),
        "tiktoken": load_tokenizer(small.write_tiktoken(folder / "tiktoken")),
        "sentencepiece": tokenizer_from_gguf(small.sentencepiece_metadata(), GGUF),
        "sentencepiece-json": load_tokenizer(spm),
    }


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers[request.param]


def test_typed_special_names_never_become_special_tokens(tokenizer: Tokenizer) -> None:
    names = list(tokenizer.specials)
    for text in [*names, "".join(names), " ".join(names), "x".join(names), "".join(n + n for n in names)]:
        ids = tokenizer.encode(text)
        assert not [i for i in ids if tokenizer.is_special(i)]
        assert tokenizer.decode(ids) == text


def test_trusted_text_names_special_tokens(tokenizer: Tokenizer) -> None:
    for name, token in tokenizer.specials.items():
        assert tokenizer.encode_trusted(name) == [token]
        assert tokenizer.special_id(name) == token
        around = tokenizer.encode_trusted(f"cat{name}the")
        assert around == [*tokenizer.encode("cat"), token, *tokenizer.encode("the")]


@pytest.mark.parametrize("text", small.SAMPLES)
def test_decoding_returns_the_encoded_text(tokenizers: dict[str, Tokenizer], text: str) -> None:
    for kind in KINDS:
        expected = text
        if kind in ("gguf", "json"):
            expected = unicodedata.normalize("NFC", text)  # Qwen's own normalisation
        assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == expected, kind


def test_segments_equal_the_whole_text_when_nobody_types_a_marker(tokenizer: Tokenizer) -> None:
    name = next(iter(tokenizer.specials))
    parts = [(f"{name}the\n", True), ("\n\n  cat", False), (f" in{name}", True), ("ab", False)]
    assert tokenizer.encode_segments(parts) == tokenizer.encode_trusted("".join(text for text, _ in parts))


def test_segments_keep_typed_markers_plain(tokenizer: Tokenizer) -> None:
    name, token = next(iter(tokenizer.specials.items()))
    ids = tokenizer.encode_segments([(name, True), (f"a {name} b", False), (name, True)])
    assert ids.count(token) == 2
    assert tokenizer.decode(ids) == f"{name}a {name} b{name}"
    halves = tokenizer.encode_segments([(name[:2], True), (name[2:], False)])
    assert token not in halves


def test_every_id_decodes_and_others_are_refused(tokenizer: Tokenizer) -> None:
    wider = tokenizer.with_embedding_rows(tokenizer.vocab_size + 50)
    wider.decode(range(wider.embedding_rows))
    assert wider.token_bytes(wider.embedding_rows - 1) == b""
    for token in (-1, wider.embedding_rows):
        with pytest.raises(UsageError, match="outside"):
            wider.decode([token])
    with pytest.raises(UsageError, match="rows"):
        tokenizer.with_embedding_rows(tokenizer.vocab_size - 1)


def test_token_bytes_concatenate_to_the_text(tokenizer: Tokenizer) -> None:
    text = "the cat 日本語 😀"
    joined = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text)).decode()
    assert joined.removeprefix(" ") == text


def test_unknown_special_name_is_refused_with_the_nearest_one(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(UnsupportedError, match=r"Did you mean <\|im_end\|>\?"):
        tokenizers["gguf"].special_id("<|im_ends|>")


def test_control_tokens_can_be_hidden_and_text_tokens_stay(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["gguf"]
    ids = tokenizer.encode_trusted("<|im_start|>a<tool_call>b</tool_call><|im_end|>")
    assert tokenizer.decode(ids) == "<|im_start|>a<tool_call>b</tool_call><|im_end|>"
    assert tokenizer.decode(ids, skip_specials=True) == "a<tool_call>b</tool_call>"
    assert tokenizer.decode_bytes(ids, skip_specials=True) == b"a<tool_call>b</tool_call>"


def test_lone_surrogates_become_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udc00")) == "a\ufffdb\ufffd"
    assert valid_unicode("\ud83d\ude00") == "😀"


@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=60))
def test_any_text_round_trips(tokenizers: dict[str, Tokenizer], text: str) -> None:
    for kind in ("gguf-smollm", "gguf-llama3", "tiktoken"):
        assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


MEGABYTES = {"gguf": "a あ", "gguf-smollm": "1", "tiktoken": "a あ\nA!1", "sentencepiece": "a "}


@pytest.mark.parametrize(
    ("kind", "unit"), [(kind, unit) for kind, units in MEGABYTES.items() for unit in units]
)
def test_a_megabyte_of_one_thing_encodes_and_comes_back(
    tokenizers: dict[str, Tokenizer], kind: str, unit: str
) -> None:
    text = unit * (1_000_000 // len(unit.encode()))
    assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


@given(
    st.lists(st.sampled_from(["word", " ", "\n", "  ", "日本語", "1", ".", "/", "'s", "\r\n"]), max_size=200)
)
def test_cutting_long_text_changes_no_token(tokenizers: dict[str, Tokenizer], words: list[str]) -> None:
    text = "".join(words)
    for kind in ("gguf", "gguf-smollm", "gguf-llama3", "tiktoken"):
        vocabulary = tokenizers[kind]._vocabulary
        pieces = list(pieces_of(text, 40))
        assert "".join(pieces) == text
        if all(_cut_is_soft(left, right) for left, right in pairwise(pieces)):
            cut = [i for piece in pieces for i in vocabulary.encode(piece, prefix_space=False)]
            assert cut == vocabulary.encode(text, prefix_space=False)


def _cut_is_soft(left: str, right: str) -> bool:
    after_word = left[-1].isalnum() and right[0] == " "
    after_line = left[-1] == "\n" and not left[-2:-1].isspace() and len(left) > 1 and right[0].isalnum()
    return after_word or after_line


def test_a_folder_without_tokenizer_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
