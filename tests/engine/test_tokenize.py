"""What a text or a conversation is in tokens is what the model reads of it; and tokens are text again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ayllu.chat.messages import Message, ToolDefinition
from ayllu.chat.tokenizer import Tokenizer
from ayllu.engine.native import NativeEngine, open_engine
from ayllu.engine.openai.body import InvalidBodyError
from ayllu.engine.openai.tokenize import detokenize_body, prompt_tokens, tokenize_body
from ayllu.engine.options import EngineOptions
from ayllu.engine.preparation import Preparation
from ayllu.engine.prepared import CoreFacts
from ayllu.engine.remote.endpoint import RemoteEndpoint
from ayllu.engine.remote.engine import RemoteEngine
from ayllu.engine.requests import ChatPrompt, GenerateRequest, InfillPrompt, TextPrompt, TokenPrompt, ToolUse
from ayllu.errors import UnsupportedError, UsageError
from tests.engine.toy_engine import open_toy, toy_folder

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <|im_end|> 🦙"},
]
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeEngine]:
    with open_toy(toy_folder(tmp_path_factory.mktemp("toy") / "model")) as opened:
        yield opened


def test_a_texts_tokens_are_those_that_the_model_reads(engine: NativeEngine) -> None:
    said = tokenize_body({"prompt": "Hello 🦙 <|im_start|>", "model": "m", "return_token_strs": True}, engine)
    assert said["tokens"] == engine.files.tokenizer.encode("Hello 🦙 <|im_start|>")
    assert said["count"] == len(said["tokens"]) == len(said["token_strs"])
    assert said["max_model_len"] == engine.info.context
    assert detokenize_body({"tokens": said["tokens"]}, engine) == {"prompt": "Hello 🦙 <|im_start|>"}


def test_texts_of_tokens_are_told_on_request_only(engine: NativeEngine) -> None:
    assert tokenize_body({"prompt": "a"}, engine)["token_strs"] is None
    assert tokenize_body({"prompt": "", "return_token_strs": True}, engine) == {
        "tokens": [],
        "count": 0,
        "max_model_len": engine.info.context,
        "token_strs": [],
    }


def test_a_conversation_is_counted_as_it_would_be_answered(engine: NativeEngine) -> None:
    messages = tuple(Message(turn["role"], turn["content"]) for turn in CONVERSATION)  # type: ignore[arg-type]
    said = tokenize_body({"messages": CONVERSATION, "tools": [ADD]}, engine)
    tool = ToolDefinition("add", "Adds.", {"type": "object"})
    assert said["tokens"] == engine.files.chat_format.render(messages, [tool]).token_ids
    assert said["count"] == prompt_tokens(engine, ChatPrompt(messages), ToolUse((tool,)))
    request = GenerateRequest(prompt=ChatPrompt(messages), tool_use=ToolUse((tool,)), max_new_tokens=1)
    (started,) = [event for event in engine.submit(request).results() if type(event).__name__ == "Started"]
    assert said["count"] == started.prompt_tokens  # type: ignore[union-attr]


def test_tools_that_may_not_be_used_are_not_counted(engine: NativeEngine) -> None:
    alone = tokenize_body({"messages": CONVERSATION}, engine)["count"]
    barred = tokenize_body({"messages": CONVERSATION, "tools": [ADD], "tool_choice": "none"}, engine)["count"]
    assert barred == alone < tokenize_body({"messages": CONVERSATION, "tools": [ADD]}, engine)["count"]


def test_without_the_opening_of_an_answer_the_conversation_ends_before_it(engine: NativeEngine) -> None:
    whole = tokenize_body({"messages": CONVERSATION}, engine)["tokens"]
    ended = tokenize_body({"messages": CONVERSATION, "add_generation_prompt": False}, engine)["tokens"]
    assert whole[: len(ended)] == ended and len(ended) < len(whole)


def test_a_text_that_is_longer_than_the_context_is_counted_all_the_same(tmp_path: Path) -> None:
    with open_toy(toy_folder(tmp_path / "model"), EngineOptions(context=64)) as engine:
        context = engine.info.context
        assert context is not None
        assert tokenize_body({"prompt": "word " * context}, engine)["count"] > context


def test_control_tokens_come_back_by_their_names(engine: NativeEngine) -> None:
    end = engine.files.tokenizer.specials["<|im_end|>"]
    assert detokenize_body({"tokens": [end]}, engine) == {"prompt": "<|im_end|>"}


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "prompt", "missing"),
        ({"prompt": "a", "messages": CONVERSATION}, "prompt", "exclude"),
        ({"prompt": ["a"]}, "prompt", "string"),
        ({"messages": []}, "messages", "at least 1"),
        ({"prompt": "a", "tools": [ADD]}, "tools", "messages"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", "messages"),
        ({"prompt": "a", "chat_template": "{{ 1 }}"}, "chat_template", "model's own"),
        ({"prompt": "a", "promt": "a"}, "promt", "Did you mean prompt?"),
        ({"messages": CONVERSATION, "tool_choice": "required"}, "tool_choice", "without tools"),
    ],
)
def test_a_wrong_body_is_named(engine: NativeEngine, body: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(InvalidBodyError) as caught:
        tokenize_body(body, engine)
    assert caught.value.param == param and says in str(caught.value)


@pytest.mark.parametrize("tokens", [[1 << 30], [-1], ["1"], [True], None, 5, [1.0]])
def test_tokens_that_are_none_are_named(engine: NativeEngine, tokens: Any) -> None:
    with pytest.raises(InvalidBodyError) as caught:
        detokenize_body({"tokens": tokens}, engine)
    assert str(caught.value.param).startswith("tokens")


def test_a_models_bos_is_counted_unless_it_is_not_wanted(engine: NativeEngine) -> None:
    parts = dataclasses.replace(engine.files.tokenizer.parts, add_bos=True)
    with_bos = dataclasses.replace(engine.files, tokenizer=Tokenizer(parts))
    facts = CoreFacts(context=64, slots=1, reads_images=False, vocab_size=with_bos.tokenizer.vocab_size)
    prepares = Preparation(with_bos, facts)
    plain = with_bos.tokenizer.encode("a")
    assert prepares.token_ids(TextPrompt("a")) == [with_bos.tokenizer.bos_id, *plain]
    assert prepares.token_ids(TextPrompt("a"), add_special_tokens=False) == plain


def test_an_encoder_counts_its_own_markers(minilm_folder: Path) -> None:
    with open_engine(minilm_folder, EngineOptions()) as engine:
        assert tokenize_body({"prompt": "hello"}, engine)["tokens"] == [101, 7592, 102]
        assert tokenize_body({"prompt": "hello", "add_special_tokens": False}, engine)["tokens"] == [7592]
        assert detokenize_body({"tokens": [7592]}, engine) == {"prompt": "hello"}
        assert engine.token_ids(TokenPrompt((101, 102))) == [101, 102]
        with pytest.raises(UsageError, match="no conversation"):
            tokenize_body({"messages": CONVERSATION}, engine)


def test_a_remote_engine_has_no_vocabulary_to_ask() -> None:
    with RemoteEngine(RemoteEndpoint(base_url="http://127.0.0.1:9", model="m")) as engine:
        for ask in (
            lambda: tokenize_body({"prompt": "a"}, engine),
            lambda: detokenize_body({"tokens": [1]}, engine),
            lambda: prompt_tokens(engine, TextPrompt("a")),
            lambda: prompt_tokens(engine, InfillPrompt("a", "b")),
        ):
            with pytest.raises(UnsupportedError, match="another server"):
                ask()
