"""Reading vocabulary files: the specification's ids, stop ids from every source, hostile files refused."""

from __future__ import annotations

import base64
import copy
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.chat import tiktoken_vocabulary, tokenizer_json
from ayllu.chat.llama4_tokens import SPECIAL_NAMES
from ayllu.chat.tiktoken_vocabulary import bounded_pieces
from ayllu.chat.tokenizer import load_tokenizer, tokenizer_from_gguf
from ayllu.errors import AylluError, ModelFileError, UnsupportedError
from tests.chat import small_vocabularies as small

GGUF = Path("model.gguf")

LLAMA4_IDS = {
    "<|begin_of_text|>": 200000,
    "<|end_of_text|>": 200001,
    "<|fim_prefix|>": 200002,
    "<|fim_middle|>": 200003,
    "<|fim_suffix|>": 200004,
    "<|header_start|>": 200005,
    "<|header_end|>": 200006,
    "<|eom|>": 200007,
    "<|eot|>": 200008,
    "<|step|>": 200009,
    "<|text_post_train_reserved_special_token_0|>": 200010,
    "<|text_post_train_reserved_special_token_5|>": 200015,
    "<|python_start|>": 200016,
    "<|python_end|>": 200017,
    "<|finetune_right_pad|>": 200018,
    "<|text_post_train_reserved_special_token_8|>": 200019,
    "<|text_post_train_reserved_special_token_68|>": 200079,
    "<|image_start|>": 200080,
    "<|image_end|>": 200081,
    "<|vision_reserved_special_token_0|>": 200082,
    "<|tile_x_separator|>": 200084,
    "<|tile_y_separator|>": 200085,
    "<|image|>": 200090,
    "<|vision_reserved_special_token_6|>": 200091,
    "<|patch|>": 200092,
    "<|vision_reserved_special_token_7|>": 200093,
    "<|vision_reserved_special_token_1047|>": 201133,
    "<|reasoning_reserved_special_token_0|>": 201134,
    "<|reasoning_reserved_special_token_7|>": 201141,
    "<|reasoning_thinking_start|>": 201142,
    "<|reasoning_thinking_end|>": 201143,
    "<|reserved_special_token_0|>": 201144,
    "<|reserved_special_token_903|>": 202047,
}


def full_size_ranks() -> list[bytes]:
    """200,000 distinct tokens, the single bytes first: the size of Llama 4's vocabulary, not its contents."""
    longer = (number.to_bytes(3, "big") for number in range(200_000 - 256))
    return [bytes((byte,)) for byte in range(256)] + list(longer)


def test_special_ids_of_llama4_are_the_specifications(tmp_path: Path) -> None:
    lines = [base64.b64encode(t) + b" " + str(rank).encode() for rank, t in enumerate(full_size_ranks())]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
    tokenizer = load_tokenizer(tmp_path)
    assert {name: tokenizer.special_id(name) for name in LLAMA4_IDS} == LLAMA4_IDS
    assert len(tokenizer.specials) == len(set(SPECIAL_NAMES)) == 2048
    assert (tokenizer.vocab_size, tokenizer.embedding_rows) == (202048, 202048)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (200000, 200001)
    assert tokenizer.stop_ids == {200001, 200007, 200008}
    assert tokenizer.add_bos
    assert [i for i in tokenizer.encode("<|eot|>") if i >= 200000] == []


def test_specials_follow_the_ranks_of_a_small_vocabulary(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small.write_tiktoken(tmp_path))
    first = len(small.trained("llama4")[0])
    assert tokenizer.special_id("<|begin_of_text|>") == first
    assert tokenizer.embedding_rows == first + 2048


def cuts_of_the_reference(text: str) -> list[int]:
    """Where Llama 4's reference cuts, counted character by character: chunks of 400,000, runs of 25,000."""
    cuts = []
    run = 0
    for place in range(1, len(text)):
        run = 0 if place % 400_000 == 0 or text[place].isspace() != text[place - 1].isspace() else run + 1
        if run == 25_000:
            run = 0
        if place % 400_000 == 0 or (run == 0 and text[place].isspace() == text[place - 1].isspace()):
            cuts.append(place)
    return cuts


@pytest.mark.parametrize(
    "text",
    ["", "a", "a" * 25_000, "a" * 25_001, "b c " + " \u3000" * 30_000 + "tail",
     "あ" * 60_000 + " あ" * 9_000, "a " * 201_000, "x" * 390_000 + "y" * 30_000,
     " " * 399_999 + "a" * 30_000],
    ids=["empty", "one", "limit", "limit+1", "spaces", "kana", "chunks", "run over chunk", "run at chunk"],
)  # fmt: skip
def test_long_text_is_cut_where_the_reference_cuts_it(text: str) -> None:
    pieces = list(bounded_pieces(text))
    assert "".join(pieces) == text
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    assert starts[1:-1] == cuts_of_the_reference(text)


def test_stop_ids_come_from_every_config(tmp_path: Path) -> None:
    folder = small.write_model_folder(tmp_path)
    first = len(small.trained("qwen2")[0])
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (first + 2, first + 1)
    assert tokenizer.stop_ids == {first + 1, first + 2}
    assert tokenizer.embedding_rows == first + 40
    assert not tokenizer.add_bos
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": first, "vocab_size": 5}}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, first)
    assert tokenizer.stop_ids == {first, first + 1, first + 2}
    assert tokenizer.embedding_rows == tokenizer.vocab_size


def test_a_template_that_begins_with_bos_asks_for_bos(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(small.sentencepiece_json()), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.add_bos
    assert tokenizer.stop_ids == {2}
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "add_bos_token": false}')
    assert not load_tokenizer(tmp_path).add_bos


def test_added_tokens_swallow_the_space_they_say(tmp_path: Path) -> None:
    document = small.json_document()
    document["added_tokens"][0]["rstrip"] = True
    document["added_tokens"][1]["lstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_segments([("<|im_start|> ", True), ("", False), (" hi", False)]) == [
        tokenizer.special_id("<|im_start|>"),
        *tokenizer.encode("hi"),
    ]
    assert tokenizer.decode(tokenizer.encode_trusted("<|im_start|> \n hi \n<|im_end|> x")) == (
        "<|im_start|>hi<|im_end|> x"
    )


def test_metaspace_prefix_only_at_the_very_start_when_so_configured(tmp_path: Path) -> None:
    document = small.sentencepiece_json()
    document["normalizer"] = None
    document["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode_trusted("the<s>the<s> the")) == "the<s>the<s> the"
    assert tokenizer.encode("the") == tokenizer.encode(" the")


def test_gguf_defaults_and_names(tmp_path: Path) -> None:
    metadata = small.gguf_metadata("llama-bpe")
    del metadata["tokenizer.ggml.add_bos_token"]
    assert tokenizer_from_gguf(metadata, GGUF).add_bos
    metadata["tokenizer.ggml.pre"] = "qwen2"
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], dtype=np.int32)
    assert not tokenizer_from_gguf(metadata, GGUF).add_bos
    tokens: Any = metadata["tokenizer.ggml.tokens"]
    types: Any = metadata["tokenizer.ggml.token_type"]
    types[tokens.index("<|im_end|>")] = 1
    del metadata["tokenizer.ggml.eos_token_id"]
    tokenizer = tokenizer_from_gguf(metadata, GGUF)
    assert tokenizer.special_id("<|im_end|>") in tokenizer.stop_ids
    assert types[tokens.index("<|im_end|>")] == 1
    assert tokenizer.token_bytes(tokens.index("[PAD0]")) == b""


def test_unknown_pre_tokenizer_names_the_known_ones() -> None:
    metadata = {**small.gguf_metadata(), "tokenizer.ggml.pre": "qwen22"}
    with pytest.raises(UnsupportedError, match=r"qwen22.*Did you mean qwen2\?.*llama-bpe"):
        tokenizer_from_gguf(metadata, GGUF)


def test_unknown_vocabulary_kind_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="bert"):
        tokenizer_from_gguf({**small.gguf_metadata(), "tokenizer.ggml.model": "bert"}, GGUF)


GGUF_DAMAGE: dict[str, dict[str, object]] = {
    "no model": {"model": None},
    "model is a number": {"model": 3},
    "no tokens": {"tokens": None},
    "empty tokens": {"tokens": []},
    "tokens are numbers": {"tokens": [1, 2]},
    "tokens are one string": {"tokens": "abc"},
    "a token twice": {"tokens": ["a", "a"], "token_type": [1, 1], "merges": []},
    "a special twice": {"tokens": ["<a>", "<a>"], "token_type": [3, 3], "merges": []},
    "types too short": {"token_type": [1]},
    "types of text": {"token_type": ["x"]},
    "type unknown": {"tokens": ["a"], "token_type": [77], "merges": []},
    "ragged types": {"token_type": [[1], [1, 2]]},
    "no merges": {"merges": None},
    "merge without space": {"merges": ["ab"]},
    "merge of unknown tokens": {"merges": ["zzzz qqqq"]},
    "merges are numbers": {"merges": [1.0]},
    "eos out of range": {"eos_token_id": 10**9},
    "eos negative": {"eos_token_id": -1},
    "bos is text": {"bos_token_id": "1"},
    "add_bos is a number": {"add_bos_token": 7},
    "pre is a list": {"pre": ["qwen2"]},
}


@pytest.mark.parametrize("damage", GGUF_DAMAGE.values(), ids=GGUF_DAMAGE.keys())
def test_damaged_gguf_vocabularies_are_refused(damage: dict[str, object]) -> None:
    metadata = small.gguf_metadata()
    metadata.update({f"tokenizer.ggml.{key}": value for key, value in damage.items()})
    with pytest.raises(ModelFileError, match=r"model\.gguf"):
        tokenizer_from_gguf(metadata, GGUF)


SENTENCEPIECE_DAMAGE: dict[str, dict[str, object]] = {
    "no scores": {"scores": None},
    "scores too short": {"scores": [0.0]},
    "scores of text": {"scores": ["a"]},
    "add_space_prefix of text": {"add_space_prefix": "yes"},
    "very long token": {"tokens": ["a", "b" * 5000], "scores": [0.0, 0.0], "token_type": [1, 1]},
    "bad byte token": {"tokens": ["a", "<0xZZ>"], "scores": [0.0, 0.0], "token_type": [1, 6]},
}


@pytest.mark.parametrize("damage", SENTENCEPIECE_DAMAGE.values(), ids=SENTENCEPIECE_DAMAGE.keys())
def test_damaged_sentencepiece_vocabularies_are_refused(damage: dict[str, object]) -> None:
    metadata = small.sentencepiece_metadata()
    metadata.update({f"tokenizer.ggml.{key}": value for key, value in damage.items()})
    with pytest.raises(ModelFileError, match=r"model\.gguf"):
        tokenizer_from_gguf(metadata, GGUF)


def test_tokens_with_a_quadratic_number_of_merges_are_refused_in_little_memory() -> None:
    long = ["a" * i + "b" * j for i in range(161) for j in range(161) if i + j]
    pairs = zip("acegikmoqsuwy", "bdfhjlnprtvxz", strict=True)
    short = [x * i + y * j for x, y in pairs for i in range(1, 17) for j in range(17)]
    short += [letter * i for letter in "bdfhjlnprtvxz" for i in range(1, 17)]
    for tokens, reason in ((long, "too much text"), (short, "too many merges")):
        metadata = small.sentencepiece_metadata()
        metadata["tokenizer.ggml.tokens"] = tokens
        metadata["tokenizer.ggml.scores"] = [0.0] * len(tokens)
        metadata["tokenizer.ggml.token_type"] = [1] * len(tokens)
        tracemalloc.start()
        with pytest.raises(ModelFileError, match=reason):
            tokenizer_from_gguf(metadata, GGUF)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40 << 20


def bytes_only() -> list[bytes]:
    return [base64.b64encode(bytes((b,))) + b" " + str(b).encode() for b in range(256)]


TIKTOKEN_DAMAGE: dict[str, bytes] = {
    "empty": b"",
    "text": b"hello world this is not it",
    "bad base64": b"!!!! 0",
    "no rank": b"YQ==",
    "negative rank": b"YQ== -1",
    "huge rank": b"YQ== 99999999999999999999",
    "rank twice": b"YQ== 0\nYg== 0",
    "token twice": b"\n".join([*bytes_only(), b"YQ== 256"]),
    "hole": b"\n".join([*bytes_only(), b"YWI= 300"]),
    "a byte missing": b"\n".join(bytes_only()[:-1]),
    "long line": b"Y" * 10_000 + b" 0",
    "blank line": b"\n".join([*bytes_only()[:9], b"", *bytes_only()[9:]]),
    "only line breaks": b"\n" * 100_000,
    "binary": bytes(range(256)) * 20,
    "empty token": b"= 0",
}


@pytest.mark.parametrize("content", TIKTOKEN_DAMAGE.values(), ids=TIKTOKEN_DAMAGE.keys())
def test_damaged_tiktoken_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_model_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(UnsupportedError, match="SentencePiece"):
        load_tokenizer(tmp_path)


def test_files_over_the_size_limit_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken_vocabulary, "MAX_FILE_BYTES", 10)
    monkeypatch.setattr(tokenizer_json, "MAX_FILE_BYTES", 10)
    with pytest.raises(ModelFileError, match="too large"):
        load_tokenizer(small.write_tiktoken(tmp_path / "a"))
    with pytest.raises(ModelFileError, match="too large"):
        load_tokenizer(small.write_model_folder(tmp_path / "b"))


def test_counts_over_the_limits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken_vocabulary, "MAX_TOKENS", 300)
    with pytest.raises(ModelFileError, match="too many tokens"):
        load_tokenizer(small.write_tiktoken(tmp_path / "a"))
    bomb = b'{"model": [' + b"[]," * tokenizer_json.MAX_FILE_VALUES + b"[]]}"
    (tmp_path / "tokenizer.json").write_bytes(bomb)
    with pytest.raises(ModelFileError, match="too many values"):
        load_tokenizer(tmp_path)


NAMES = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"]


@pytest.mark.parametrize("name", NAMES)
def test_links_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = small.write_model_folder(tmp_path / "model")
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to("../secret")
    with pytest.raises(ModelFileError, match=f"{name}: is a link out of"):
        load_tokenizer(folder)


def test_a_tiktoken_file_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = small.write_tiktoken(tmp_path / "model")
    (folder / "tokenizer.model").rename(tmp_path / "secret")
    (folder / "tokenizer.model").symlink_to("../secret")
    with pytest.raises(ModelFileError, match=r"tokenizer\.model: is a link out of"):
        load_tokenizer(folder)


def test_links_into_the_blobs_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    plain = small.write_model_folder(tmp_path / "plain")
    snapshot, blobs = tmp_path / "snapshots" / "0a1b", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in plain.iterdir():
        (blobs / file.stem).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.stem)
    tokenizer = load_tokenizer(snapshot)
    assert tokenizer.stop_ids == load_tokenizer(plain).stop_ids
    assert tokenizer.encode("the cat") == load_tokenizer(plain).encode("the cat")


def _set(*keys: str | int, to: object) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = to

    return change


JSON_DAMAGE: dict[str, Callable[[Any], None]] = {
    "model is text": _set("model", to="BPE"),
    "vocab is a list": _set("model", "vocab", to=["a"]),
    "vocab is empty": _set("model", "vocab", to={}),
    "id is text": _set("model", "vocab", "a", to="7"),
    "id is negative": _set("model", "vocab", "a", to=-7),
    "id is huge": _set("model", "vocab", "a", to=2**40),
    "id far out": _set("model", "vocab", "a", to=4_000_000),
    "id twice": _set("model", "vocab", "a", to=5),
    "merges missing": _set("model", "merges", to=None),
    "merge of three": _set("model", "merges", to=[["a", "b", "c"]]),
    "merge of unknown": _set("model", "merges", to=[["zzzz", "qqqq"]]),
    "merge of numbers": _set("model", "merges", to=[[1, 2]]),
    "added is an object": _set("added_tokens", to={"a": 1}),
    "added of text": _set("added_tokens", to=["<s>"]),
    "added without id": _set("added_tokens", to=[{"content": "<s>"}]),
    "added empty": _set("added_tokens", to=[{"content": "", "id": 3}]),
    "added twice": _set("added_tokens", to=[{"content": "<s>", "id": 900}, {"content": "<s>", "id": 901}]),
    "normalizer is text": _set("normalizer", to="NFC"),
    "sequence without list": _set("pre_tokenizer", to={"type": "Sequence"}),
    "split without pattern": _set("pre_tokenizer", to={"type": "Split"}),
    "split with a broken pattern": _set(
        "pre_tokenizer",
        to={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False},
    ),
}


@pytest.mark.parametrize("damage", JSON_DAMAGE.values(), ids=JSON_DAMAGE.keys())
def test_damaged_tokenizer_json_is_refused(tmp_path: Path, damage: Callable[[Any], None]) -> None:
    document = copy.deepcopy(small.json_document())
    damage(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 200_000, b"9" * 10_000, b'{"model": {}}'],
    ids=["empty", "array", "cut", "no utf-8", "deep array", "deep object", "long number", "no vocab"],
)
def test_files_that_are_no_tokenizer_json_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        _set("model", "type", to="Unigram"),
        _set("normalizer", to={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        _set("pre_tokenizer", to={"type": "BertPreTokenizer"}),
        _set("pre_tokenizer", to={"type": "ByteLevel", "add_prefix_space": True}),
        _set("model", "end_of_word_suffix", to="</w>"),
    ],
)
def test_other_kinds_of_tokenizer_json_are_named_unsupported(
    tmp_path: Path, damage: Callable[[Any], None]
) -> None:
    document = copy.deepcopy(small.json_document())
    damage(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_pattern_that_never_ends_is_stopped_with_an_error(tmp_path: Path) -> None:
    document = copy.deepcopy(small.json_document())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"]["pretokenizers"].insert(0, split)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(ModelFileError, match="pre-tokenizer"):
        tokenizer.encode("a" * 60)


def test_damaged_configs_beside_the_tokenizer_are_named(tmp_path: Path) -> None:
    folder = small.write_model_folder(tmp_path)
    for content in (
        "{",
        "[]",
        '{"eos_token_id": "x"}',
        '{"eos_token_id": [1, -5]}',
        '{"eos_token_id": 99999}',
    ):
        (folder / "generation_config.json").write_text(content)
        with pytest.raises(ModelFileError):
            load_tokenizer(folder)


def test_special_tokens_are_out_of_reach_of_merges(tmp_path: Path) -> None:
    document = copy.deepcopy(small.json_document())
    vocab = document["model"]["vocab"]
    vocab["ab"] = vocab.get("ab", 990)
    document["added_tokens"].append({"content": "ab", "id": vocab["ab"], "special": True})
    document["model"]["merges"].append(["a", "b"])
    document["model"]["ignore_merges"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert not any(map(tokenizer.is_special, tokenizer.encode("ab cab ab")))
    assert tokenizer.decode(tokenizer.encode("ab cab ab")) == "ab cab ab"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(small.gguf_metadata())), VALUES)
def test_any_value_under_any_gguf_key_loads_or_gives_a_typed_error(key: str, value: object) -> None:
    try:
        tokenizer_from_gguf({**small.gguf_metadata(), key: value}, GGUF).encode("the cat")
    except AylluError as error:
        assert "model.gguf" in str(error)


JSON_PLACES = [
    ("model",), ("model", "vocab"), ("model", "merges"), ("model", "vocab", "a"), ("added_tokens",),
    ("added_tokens", 0), ("added_tokens", 0, "id"), ("normalizer",), ("pre_tokenizer",), ("post_processor",),
    ("pre_tokenizer", "pretokenizers"), ("pre_tokenizer", "pretokenizers", 0), ("model", "merges", 0),
    ("pre_tokenizer", "pretokenizers", 0, "pattern"), ("model", "ignore_merges"), ("model", "byte_fallback"),
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(JSON_PLACES), VALUES)
def test_any_value_anywhere_in_tokenizer_json_loads_or_gives_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[str | int, ...], value: object
) -> None:
    document = copy.deepcopy(small.json_document())
    _set(*place, to=value)(document)
    file = tmp_path_factory.getbasetemp() / "tokenizer.json"
    file.write_text(json.dumps(document), encoding="utf-8", errors="surrogatepass")
    try:
        load_tokenizer(file).encode("the cat")
    except AylluError as error:
        assert "tokenizer.json" in str(error)
