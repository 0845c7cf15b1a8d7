"""Gaps in a text become prompts in each family's own form, and no text becomes a control token."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.chat.infill import InfillFormat, infill_format_for
from ayllu.chat.tokenizer import Tokenizer, tokenizer_from_gguf
from ayllu.engine.events import TextDelta
from ayllu.engine.model_files import ModelFiles, open_model_files
from ayllu.engine.native import open_engine
from ayllu.engine.options import EngineOptions
from ayllu.engine.parameters import Sampling
from ayllu.engine.preparation import Preparation
from ayllu.engine.prepared import CoreFacts
from ayllu.engine.requests import GenerateRequest, InfillPrompt
from ayllu.errors import UnsupportedError, UsageError
from tests.chat import small_vocabularies as small
from tests.engine.toy_engine import toy_folder

QWEN = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]
FAMILIES = {
    "qwen": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    "starcoder": ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    "santacoder": ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    "code llama": ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    "deepseek": ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
}


def with_tokens(metadata: dict[str, Any], names: list[str], kind: int = 3) -> dict[str, Any]:
    """The vocabulary with more tokens behind its own (kind 3: control tokens, 1: plain ones)."""
    more = dict(metadata)
    more["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], *names]
    more["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], *[kind] * len(names)]
    if "tokenizer.ggml.scores" in metadata:
        more["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], *[-1e9] * len(names)]
    return more


def opened(metadata: dict[str, Any]) -> tuple[Tokenizer, InfillFormat]:
    tokenizer = tokenizer_from_gguf(metadata, Path("model.gguf"))
    found = infill_format_for(tokenizer, metadata)
    assert found is not None
    return tokenizer, found


@pytest.fixture(scope="module")
def qwen() -> tuple[Tokenizer, InfillFormat]:
    return opened(with_tokens(small.gguf_metadata(), QWEN))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_tokens_are_found_by_name_and_laid_out_prefix_suffix_middle(family: str) -> None:
    names = FAMILIES[family]
    tokenizer, infill = opened(with_tokens(small.gguf_metadata(), list(names)))
    prefix, suffix, middle = (tokenizer.specials[name] for name in names)
    expected = [prefix, *tokenizer.encode("def f():"), suffix, *tokenizer.encode(" return"), middle]
    assert infill.render("def f():", " return") == expected


def test_the_files_own_ids_go_before_names_in_todays_keys_and_in_the_older_ones() -> None:
    metadata = with_tokens(small.gguf_metadata(), [*QWEN, "[A]", "[B]", "[C]"])
    first = len(metadata["tokenizer.ggml.tokens"]) - 3
    for keys in (("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")):
        stated = {f"tokenizer.ggml.{key}_token_id": first + place for place, key in enumerate(keys)}
        _, infill = opened(metadata | stated)
        assert (infill.prefix_id, infill.suffix_id, infill.middle_id) == (first, first + 1, first + 2)


@pytest.mark.parametrize("wrong", [-1, 1 << 30, "5", True, None])
def test_ids_that_cannot_be_are_none_of_the_files_words(wrong: Any) -> None:
    metadata = with_tokens(small.gguf_metadata(), QWEN)
    keys = ("fim_pre", "fim_suf", "fim_mid")
    tokenizer, infill = opened(metadata | {f"tokenizer.ggml.{key}_token_id": wrong for key in keys})
    assert infill.prefix_id == tokenizer.specials["<|fim_prefix|>"]


def test_one_id_for_two_of_the_three_is_no_format() -> None:
    metadata: dict[str, Any] = small.gguf_metadata()
    metadata |= {f"tokenizer.ggml.fim_{key}_token_id": 5 for key in ("pre", "suf", "mid")}
    assert infill_format_for(tokenizer_from_gguf(metadata, Path("m")), metadata) is None


def test_what_may_follow_a_filling_ends_it(qwen: tuple[Tokenizer, InfillFormat]) -> None:
    tokenizer, infill = qwen
    assert infill.stop_ids == {tokenizer.specials[name] for name in QWEN[3:]}


def test_a_suffix_gets_no_leading_space_and_a_prefix_gets_the_vocabularys() -> None:
    """Code Llama's own layout: the vocabulary adds a space where a text begins; a suffix goes on."""
    metadata = with_tokens(small.sentencepiece_metadata(), ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"])
    tokenizer, infill = opened(metadata)
    ids = infill.render("cat", "cat")
    at = ids.index(infill.suffix_id)
    assert ids[:2] == [tokenizer.bos_id, infill.prefix_id]
    assert tokenizer.decode_bytes(ids[2:at], continuation=True) == b" cat"
    assert tokenizer.decode_bytes(ids[at + 1 : -1], continuation=True) == b"cat"
    assert ids[-1] == infill.middle_id
    assert tokenizer.specials["▁<EOT>"] in infill.stop_ids


@given(
    st.lists(st.sampled_from([*QWEN, *small.CHAT_SPECIALS, "x", " ", "<|", "\ud800"]), max_size=6).map(
        "".join
    ),
    st.lists(st.sampled_from([*QWEN, *small.CHAT_SPECIALS, "x", " ", "|>", "é"]), max_size=6).map("".join),
)
def test_no_text_becomes_a_control_token(prefix: str, suffix: str) -> None:
    tokenizer, infill = _QWEN
    ids = infill.render(prefix, suffix)
    assert [token for token in ids if tokenizer.is_special(token)] == [
        infill.prefix_id,
        infill.suffix_id,
        infill.middle_id,
    ]
    shown = tokenizer.decode(ids, skip_specials=True)
    assert shown == (prefix + suffix).replace("\ud800", "\ufffd")


_QWEN = opened(with_tokens(small.gguf_metadata(), QWEN))


def test_a_text_that_a_vocabulary_spells_as_a_control_token_is_refused() -> None:
    """A file may state ids of tokens that it types as plain text; no text may reach those either."""
    metadata = small.gguf_metadata()
    tokens: Any = metadata["tokenizer.ggml.tokens"]
    ids = {"pre": tokens.index("a"), "suf": tokens.index("b"), "mid": tokens.index("c")}
    metadata |= {f"tokenizer.ggml.fim_{key}_token_id": token for key, token in ids.items()}
    _, infill = opened(metadata)
    assert infill.render("x", "y")
    for prefix, suffix in (("a", "y"), ("x", "b"), ("x", "c")):
        with pytest.raises(UsageError, match="fill-in-the-middle"):
            infill.render(prefix, suffix)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    opened_files = open_model_files(toy_folder(tmp_path_factory.mktemp("model") / "model"))
    assert isinstance(opened_files, ModelFiles)
    return opened_files


def prepares(files: ModelFiles) -> Preparation:
    facts = CoreFacts(context=256, slots=1, reads_images=False, vocab_size=files.tokenizer.vocab_size)
    return Preparation(files, facts)


def test_a_model_without_such_tokens_says_so(files: ModelFiles) -> None:
    request = GenerateRequest(prompt=InfillPrompt("a", "b"))
    with pytest.raises(UnsupportedError, match="no fill-in-the-middle tokens") as caught:
        prepares(files).prepare(request)
    assert caught.value.http_status == 400 and "suffix" in caught.value.fix


def test_a_gap_is_prepared_as_a_text_that_goes_on(files: ModelFiles) -> None:
    tokenizer, infill = _QWEN
    filling = dataclasses.replace(files, tokenizer=tokenizer)
    prepared = prepares(filling).prepare(GenerateRequest(prompt=InfillPrompt("a", "b"))).request
    assert prepared.token_ids == infill.render("a", "b")
    assert prepared.stop_ids == filling.stop_ids | infill.stop_ids
    assert prepared.continuation
    assert prepares(filling).token_ids(InfillPrompt("a", "b")) == prepared.token_ids


def test_a_gap_between_nothing_and_nothing_is_no_prompt() -> None:
    with pytest.raises(UsageError, match="characters of the prompt"):
        InfillPrompt("", "")


@pytest.mark.large
def test_qwen_coder_fills_a_gap_with_what_belongs_there(qwen05_gguf: Path) -> None:
    prompt = InfillPrompt("def add(a, b):\n    return ", "\n\nprint(add(2, 3))  # prints 5\n")
    request = GenerateRequest(prompt=prompt, sampling=Sampling(temperature=0), max_new_tokens=16)
    with open_engine(qwen05_gguf, EngineOptions(context=256, slots=1)) as engine:
        events = list(engine.submit(request).results())
    assert "".join(e.text for e in events if isinstance(e, TextDelta)).strip().startswith("a + b")
