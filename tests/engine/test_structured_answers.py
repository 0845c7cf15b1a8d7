"""Structures and a real model: whatever SmolLM2 would rather say, the answer is what was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ayllu.chat.messages import ToolDefinition, user_message
from ayllu.engine.json_schema import validate_json
from ayllu.engine.native import NativeEngine, open_engine
from ayllu.engine.options import EngineOptions
from ayllu.engine.parameters import Sampling
from ayllu.engine.reply import Reply
from ayllu.engine.requests import (
    ChatPrompt,
    ChoiceStructure,
    GenerateRequest,
    GrammarStructure,
    JsonStructure,
    RegexStructure,
    Structure,
    TextPrompt,
    ToolUse,
)
from ayllu.errors import GrammarError, RequestFailedError
from tests.engine.grammar_corpus import random_schema


@pytest.fixture(scope="module")
def engine(smollm2_gguf: Path) -> Iterator[NativeEngine]:
    with open_engine(smollm2_gguf, EngineOptions(context=2048, slots=24)) as opened:
        yield opened


@pytest.fixture(scope="module")
def exact_engine(smollm2_gguf: Path) -> Iterator[NativeEngine]:
    """In bfloat16 what runs beside an answer may flip a token between near-equals; not in this mode."""
    with open_engine(smollm2_gguf, EngineOptions(context=512, slots=4, deterministic=True)) as opened:
        yield opened


def _ask(engine: NativeEngine, question: str, structure: Structure | None, seed: int, **options) -> Reply:
    return Reply(
        engine.submit(
            GenerateRequest(
                prompt=ChatPrompt((user_message(question),)),
                sampling=Sampling(temperature=0.8, seed=seed),
                structure=structure,
                max_new_tokens=1500,
                **options,
            )
        )
    )


def _require_valid(engine: NativeEngine, seeds: range) -> None:
    schemas = {seed: random_schema(seed, ends=True) for seed in seeds}
    replies = {
        seed: _ask(engine, "Invent an example of this data.", JsonStructure(schema), seed)
        for seed, schema in schemas.items()
    }
    for seed, reply in replies.items():
        text = "".join(reply)
        assert reply.finish_reason == "stop", (seed, text)
        json.loads(text)
        validate_json(schemas[seed], text)


def test_answers_to_random_schemas_are_valid(engine: NativeEngine) -> None:
    _require_valid(engine, range(24))


@pytest.mark.large
def test_answers_to_200_random_schemas_are_all_valid(engine: NativeEngine) -> None:
    _require_valid(engine, range(200))


def test_choice_pattern_and_grammar_are_kept(engine: NativeEngine) -> None:
    kept = {
        r"(tea|coffee|水)": ChoiceStructure(("tea", "coffee", "水")),
        r"\d{4}-\d{2}-\d{2}": RegexStructure(r"\d{4}-\d{2}-\d{2}"),
        r"(ab){2,5}!": GrammarStructure('start: "ab"{2,5} "!"'),
        r"[xy]+\n": GrammarStructure('root ::= [xy] ("\\n" | root)', "ebnf"),
    }
    for pattern, structure in kept.items():
        for seed in range(3):
            text = "".join(_ask(engine, "Say anything.", structure, seed))
            assert re.fullmatch(pattern, text), (pattern, text)


def test_a_demanded_call_is_made_with_arguments_of_its_schema(engine: NativeEngine) -> None:
    weather = ToolDefinition(
        "get_weather",
        "The weather in a city.",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
        },
    )
    for choice in ("required", "get_weather"):
        reply = _ask(
            engine, "Weather in Oslo?", None, 1, tool_use=ToolUse((weather,), choice, parallel=False)
        )
        assert "".join(reply) == ""
        assert reply.finish_reason == "tool_calls"
        (call,) = reply.tool_calls
        assert call.name == "get_weather"
        assert set(call.arguments) == {"city", "unit"}
        assert call.arguments["unit"] in ("celsius", "fahrenheit")


def test_a_bad_grammar_after_a_good_one_harms_nobody(engine: NativeEngine) -> None:
    running = _ask(engine, "Tell a story.", None, 3)
    for pattern in ("(unclosed", "(a+)+" * 20_000):
        with pytest.raises(GrammarError):
            _ask(engine, "x", RegexStructure(pattern), 1)
    assert re.fullmatch(r"\d+", "".join(_ask(engine, "A number?", RegexStructure(r"\d{1,5}"), 1)))
    running.stop()
    assert running.finish_reason in ("cancelled", "stop", "length")


def _answers(engine: NativeEngine) -> list[Reply]:
    """Three answers, started together."""
    return [
        Reply(
            engine.submit(
                GenerateRequest(prompt=TextPrompt(text), sampling=Sampling(temperature=0), max_new_tokens=40)
            )
        )
        for text in ("The sea is", "Once upon a time", "1, 2, 3,")
    ]


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("ayllu.engine.preparation._require_unicode", "checked"),
        ("ayllu.engine.preparation.Preparation._text_ids", "rendered as a prompt"),
        ("ayllu.engine.grammar.grammar_of", "given a grammar"),
    ],
    ids=["validate", "tokenise", "grammar"],
)
def test_a_fault_before_the_engine_fails_its_own_request_alone_100_times_of_100(
    exact_engine: NativeEngine, monkeypatch: pytest.MonkeyPatch, where: str, what: str
) -> None:
    quiet = ["".join(reply) for reply in _answers(exact_engine)]
    others = _answers(exact_engine)

    def broken(*_: object) -> None:
        raise ValueError("nobody expected this")

    monkeypatch.setattr(where, broken)
    for _ in range(100):
        with pytest.raises(RequestFailedError, match=f"could not be {what}: ValueError"):
            exact_engine.submit(GenerateRequest(prompt=TextPrompt("x"), structure=ChoiceStructure(("a",))))
    monkeypatch.undo()
    assert ["".join(reply) for reply in others] == quiet
    assert ["".join(reply) for reply in _answers(exact_engine)] == quiet
