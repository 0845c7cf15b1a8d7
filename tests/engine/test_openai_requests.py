"""Bodies of OpenAI's API: every field honoured or refused by name, whatever is in it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.chat.images import MAX_IMAGE_BYTES
from ayllu.chat.messages import ImagePart, Message, TextPart, ToolCall, ToolDefinition
from ayllu.engine.openai import body as openai_body
from ayllu.engine.openai.body import InvalidBodyError, read_json_object
from ayllu.engine.openai.fields import MAX_PROMPTS, ChatBody, CompletionBody, EmbeddingBody
from ayllu.engine.openai.requests import (
    API_COMPLETION_TOKENS,
    ENDPOINTS,
    chat_call,
    completion_call,
    embedding_call,
    for_model,
)
from ayllu.engine.requests import (
    MAX_EMBEDDING_INPUTS,
    ChatPrompt,
    ChoiceStructure,
    GrammarStructure,
    InfillPrompt,
    JsonStructure,
    RegexStructure,
    TextPrompt,
    TokenPrompt,
    ToolUse,
)
from ayllu.errors import UnknownModelError, UnsupportedError

USER = {"role": "user", "content": "hi"}
PIXEL = b"\x89PNG\r\n\x1a\n and so on"
DATA_URL = "data:image/png;base64," + base64.b64encode(PIXEL).decode()
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def _words(text: str) -> list[str]:
    return text.split()


# As documented for POST /v1/chat/completions, /v1/completions and /v1/embeddings in November 2026.
CHAT_FIELDS = _words(
    """audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens
    messages metadata modalities model n parallel_tool_calls prediction presence_penalty prompt_cache_key
    prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier stop store
    stream stream_options temperature tool_choice tools top_logprobs top_p user verbosity
    web_search_options"""
)
COMPLETION_FIELDS = _words(
    """best_of echo frequency_penalty logit_bias logprobs max_tokens model n presence_penalty prompt seed stop
    stream stream_options suffix temperature top_p user"""
)
EMBEDDING_FIELDS = _words("dimensions encoding_format input model user")


def chat(**fields: Any):
    return chat_call({"messages": [USER], **fields})


def chat_request(**fields: Any):
    (request,) = chat(**fields).requests
    return request


def messages(*given: dict[str, Any]) -> tuple[Message, ...]:
    (request,) = chat_call({"messages": list(given)}).requests
    assert isinstance(request.prompt, ChatPrompt)
    return request.prompt.messages


def refused(read, body: dict[str, Any]) -> InvalidBodyError:
    with pytest.raises(InvalidBodyError) as caught:
        read(body)
    error = caught.value
    assert error.problem and error.fix and error.http_status == 400
    return error


@pytest.mark.parametrize(
    ("model", "fields"),
    [(ChatBody, CHAT_FIELDS), (CompletionBody, COMPLETION_FIELDS), (EmbeddingBody, EMBEDDING_FIELDS)],
)
def test_every_field_of_the_api_is_honoured_or_refused_by_name(model, fields: list[str]) -> None:
    known = {field.alias or name for name, field in model.model_fields.items()} | set(model.refused)
    assert set(fields) - known == set()


@pytest.mark.parametrize("model", [ChatBody, CompletionBody, EmbeddingBody])
def test_the_page_about_the_api_names_every_field(model) -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in (*model.model_fields, *model.refused) if f"`{name}`" not in page] == []


def test_what_is_left_out_has_the_apis_defaults() -> None:
    request = chat_request()
    assert (request.sampling.temperature, request.sampling.top_p) == (1.0, 1.0)
    assert (request.max_new_tokens, request.n, request.logprobs, request.stop) == (None, 1, None, ())
    (request,) = completion_call({"prompt": "x"}).requests
    assert (request.sampling.temperature, request.max_new_tokens) == (1.0, API_COMPLETION_TOKENS)


def test_null_is_as_good_as_left_out() -> None:
    body = dict.fromkeys(set(CHAT_FIELDS) - {"messages"})
    (request,) = chat_call({"messages": [USER], **body}).requests
    assert request.sampling == chat_request().sampling
    assert request.tool_use is None and request.structure is None


def test_a_completion_without_a_limit_goes_on_to_the_end_only_if_null_says_so() -> None:
    (request,) = completion_call({"prompt": "x", "max_tokens": None}).requests
    assert request.max_new_tokens is None


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"temperature": 0}, lambda r: r.sampling.temperature == 0),
        ({"top_p": 0.5}, lambda r: r.sampling.top_p == 0.5),
        ({"top_k": 7}, lambda r: r.sampling.top_k == 7),
        ({"top_k": -1}, lambda r: r.sampling.top_k == 0),
        ({"min_p": 0.1}, lambda r: r.sampling.min_p == 0.1),
        ({"repetition_penalty": 1.1}, lambda r: r.sampling.repetition_penalty == 1.1),
        ({"presence_penalty": -1}, lambda r: r.sampling.presence_penalty == -1),
        ({"frequency_penalty": 2}, lambda r: r.sampling.frequency_penalty == 2),
        ({"seed": 5}, lambda r: r.sampling.seed == 5),
        ({"logit_bias": {"12": -100, "0": 1.5}}, lambda r: r.sampling.logit_bias == {12: -100, 0: 1.5}),
        ({"max_tokens": 3}, lambda r: r.max_new_tokens == 3),
        ({"max_completion_tokens": 3}, lambda r: r.max_new_tokens == 3),
        ({"max_completion_tokens": 3, "max_tokens": 3}, lambda r: r.max_new_tokens == 3),
        ({"n": 3}, lambda r: r.n == 3),
        ({"stop": "\n"}, lambda r: r.stop == ("\n",)),
        ({"stop": ["a", "b"]}, lambda r: r.stop == ("a", "b")),
        ({"logprobs": True}, lambda r: r.logprobs == 0),
        ({"logprobs": True, "top_logprobs": 5}, lambda r: r.logprobs == 5),
        ({"logprobs": False}, lambda r: r.logprobs is None),
        ({"prompt_logprobs": 2}, lambda r: r.prompt_logprobs == 2),
        ({"prompt_logprobs": 2, "max_tokens": 0}, lambda r: r.max_new_tokens == 0),
        ({"priority": -2}, lambda r: r.priority == -2),
        ({"ignore_eos": True, "max_tokens": 4}, lambda r: r.ignore_stop_tokens),
        ({"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}, lambda r: True),
        ({"modalities": ["text"], "safety_identifier": "x", "prompt_cache_key": "k"}, lambda r: True),
        ({"parallel_tool_calls": False}, lambda r: r.tool_use is None),
        ({"tools": [], "tool_choice": "none"}, lambda r: r.tool_use is None),
    ],
)
def test_a_field_does_what_it_says(fields: dict[str, Any], found) -> None:
    assert found(chat_request(**fields))


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temprature": 1}, "temprature", "Did you mean temperature?"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": 101}, "temperature", "0 to 100"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": 1.5}, "top_p", "0 to 1"),
        ({"top_k": -2}, "top_k", "whole number"),
        ({"top_k": 1.5}, "top_k", "integer"),
        ({"seed": -1}, "seed", "out of range"),
        ({"logit_bias": {"the": 1}}, "logit_bias.the", "token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "-100 to 100"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 65}, "n", "64"),
        ({"max_tokens": 0}, "max_tokens", "asks for nothing"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "differ"),
        ({"stop": [""]}, "stop.0", "1 character"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"stop": 3}, "stop", "list"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs to true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"priority": 5}, "priority", "4"),
        ({"store": True}, "store", "False"),
        ({"service_tier": "flex"}, "service_tier", "auto"),
        ({"modalities": ["audio"]}, "modalities.0", "text"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"audio": {}}, "audio", "text"),
        ({"functions": []}, "functions", "Use tools"),
        ({"function_call": "auto"}, "function_call", "tool_choice"),
        ({"prediction": {}}, "prediction", "Leave it out"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "leave it out"),
        ({"verbosity": "low"}, "verbosity", "how long"),
        ({"web_search_options": {}}, "web_search_options", "Nothing is fetched"),
        ({"guided_json": {}}, "guided_json", "structured_outputs: {json"),
        ({"guided_choice": ["a"]}, "guided_choice", "structured_outputs: {choice"),
        ({"stop_token_ids": [1]}, "stop_token_ids", "Use stop"),
        ({"min_tokens": 1}, "min_tokens", "ignore_eos"),
        ({"chat_template": "x"}, "chat_template", "model's own"),
        ({"prompt_cache_retention": "24h"}, "prompt_cache_retention", "in_memory"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "without stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "no known field"),
        ({"tool_choice": "required"}, "tool_choice", "without tools"),
        ({"messages": []}, "messages", "1 item"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": ["hi"]}, "messages.0", "dictionary"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "x", "schema": {}}}},
            "response_format.json_schema",
            "does not go with",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "missing",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "several"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "several",
        ),
        ({"structured_outputs": {"regx": "a"}}, "structured_outputs.regx", "Did you mean regex?"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
        ({"structured_outputs": {"regex": "a", "syntax": "lark"}}, "structured_outputs.syntax", "grammar"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs", "out of range"),
        (
            {"structured_outputs": {"whitespace_pattern": "x"}},
            "structured_outputs.whitespace_pattern",
            "no known",
        ),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "tools", "exclude each other"),
    ],
)
def test_a_wrong_field_is_named_with_the_way_out(fields: dict[str, Any], param: str, says: str) -> None:
    error = refused(lambda body: chat(**body), fields)
    assert error.param == param
    assert says in str(error)
    assert param.split(".")[0] in str(error)


def test_a_body_without_messages_says_so() -> None:
    error = refused(chat_call, {"model": "x"})
    assert (error.param, error.code) == ("messages", "missing_required_parameter")


def test_errors_have_the_apis_codes() -> None:
    assert refused(chat_call, {"messages": [USER], "x": 1}).code == "unknown_parameter"
    assert refused(chat_call, {"messages": [USER], "audio": {}}).code == "unsupported_parameter"
    assert refused(chat_call, {"messages": [USER], "n": 0}).code == "invalid_value"


def test_roles_become_the_conversations_own() -> None:
    assert messages(
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": "hi", "name": "Ana"},
        {"role": "assistant", "content": "hello"},
    ) == (
        Message("system", "Be brief."),
        Message("system", "Be kind."),
        Message("user", "hi", name="Ana"),
        Message("assistant", "hello"),
    )


def test_calls_and_their_results_are_joined_by_id() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Qosqo"}'}}
    assert messages(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "cold"},
    )[1:] == (
        Message("assistant", "", (ToolCall("weather", {"city": "Qosqo"}, "c1"),)),
        Message("tool", "cold", tool_call_id="c1", name="weather"),
    )


def test_an_answer_comes_back_as_the_api_gave_it() -> None:
    answer = {
        "role": "assistant", "content": "hello", "refusal": None, "annotations": [], "audio": None,
        "function_call": None, "tool_calls": None,
    }  # fmt: skip
    assert messages(USER, answer, USER)[1] == Message("assistant", "hello")
    refusal = {"role": "assistant", "content": None, "refusal": "No."}
    assert messages(USER, refusal)[1] == Message("assistant", "No.")


def test_parts_keep_their_order_and_images_their_bytes() -> None:
    parts = [
        {"type": "text", "text": "What is"},
        {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "high"}},
        {"type": "image_url", "image_url": DATA_URL},
        {"type": "text", "text": "?"},
    ]
    (message,) = messages({"role": "user", "content": parts})
    assert message.content == (TextPart("What is"), ImagePart(PIXEL), ImagePart(PIXEL), TextPart("?"))


def _image(url: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url, **more}}]}


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "place", "says"),
    [
        ({"role": "function", "content": "x", "name": "f"}, "role", "'tool'"),
        ({"role": "usr", "content": "x"}, "role", "'user'"),
        ({"content": "x"}, "role", "missing"),
        ({"role": "user"}, "content", "missing"),
        ({"role": "user", "content": None}, "content", "missing"),
        ({"role": "user", "content": 3}, "content", "string, or a list"),
        ({"role": "user", "content": "x", "contnet": "y"}, "contnet", "Did you mean content?"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "tool_calls", "assistant only"),
        ({"role": "user", "content": "x", "tool_call_id": "c"}, "tool_call_id", "tool only"),
        ({"role": "assistant"}, "content", "missing"),
        ({"role": "assistant", "content": "x", "function_call": {}}, "function_call", "tool_calls"),
        ({"role": "assistant", "content": "x", "reasoning_content": "hm"},
         "reasoning_content", "leave it out"),
        ({"role": "assistant", "content": "x", "annotations": [{}]}, "annotations", "0 items"),
        ({"role": "tool", "content": "x"}, "tool_call_id", "missing"),
        ({"role": "user", "content": [{"type": "text"}]}, "content.0.text", "missing"),
        ({"role": "user", "content": [{"type": "txt", "text": "x"}]}, "content.0.type", "'text'"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "image_url": DATA_URL}]},
         "content.0.image_url", "stands in a part"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
         "content.0.input_audio", "text and images"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "no"}]},
         "content.0.refusal", "assistant"),
        ({"role": "system", "content": [{"type": "image_url", "image_url": DATA_URL}]},
         "content.0.image_url", "'user'"),
        (_image("https://example.org/a.png"), "content.0.image_url.url", "fetches nothing"),
        (_image("file:///etc/passwd"), "content.0.image_url.url", "fetches nothing"),
        (_image("data:text/html;base64,AAAA"), "content.0.image_url.url", "no image"),
        (_image("data:image/png,raw"), "content.0.image_url.url", "no image in base64"),
        (_image("data:image/png;base64,A"), "content.0.image_url.url", "damaged"),
        (_image("data:image/png;base64,AA\u00e9A"), "content.0.image_url.url", "damaged"),
        (_image("data:image/png;base64," + "A" * (MAX_IMAGE_BYTES * 4 // 3 + 8)),
         "content.0.image_url.url", "Save it smaller"),
        (_image(DATA_URL, detail="low"), "content.0.image_url.detail", "'high'"),
        ({"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1]"}}]},
         "tool_calls.0.function.arguments", "JSON object, written as a string"),
        ({"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]},
         "tool_calls.0.function.arguments", "string"),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, "tool_calls.0.type", "function"),
    ],
)  # fmt: skip
def test_a_wrong_message_is_named_down_to_its_part(message: dict[str, Any], place: str, says: str) -> None:
    error = refused(chat_call, {"messages": [USER, message]})
    assert error.param == f"messages.1.{place}"
    assert says in str(error)
    assert len(str(error)) < 500


def test_tools_and_the_forms_of_tool_choice() -> None:
    def use(**fields: Any) -> ToolUse | None:
        return chat_request(tools=[WEATHER, CLOCK], **fields).tool_use

    weather = ToolDefinition("weather", "Weather of a city.", WEATHER["function"]["parameters"])
    clock = ToolDefinition("clock")
    both = (weather, clock)
    assert use() == ToolUse(both, "auto", True)
    assert use(tool_choice="none") == ToolUse(both, "none")
    assert use(tool_choice="required", parallel_tool_calls=False) == ToolUse(both, "required", False)
    assert use(tool_choice={"type": "function", "function": {"name": "clock"}}) == ToolUse(both, "clock")
    named = {"type": "function", "function": {"name": "clock"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    assert use(tool_choice=allowed) == ToolUse((clock,), "required")


def test_strict_is_taken_as_arguments_are_always_held_to_the_schema() -> None:
    strict = {"type": "function", "function": {"name": "f", "strict": True}}
    for choice in ("auto", "required"):
        assert chat_request(tools=[strict], tool_choice=choice).tool_use.choice == choice


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools.0.custom", "function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"tools": [{"type": "function", "function": {"name": "auto"}}]}, "tools.0.function.name", "Rename"),
        ({"tools": [CLOCK, CLOCK]}, "tools", "same name"),
        ({"tools": [CLOCK] * 129}, "tools", "128"),
        ({"tools": [CLOCK], "tool_choice": "clock"}, "tool_choice.type", "allowed_tools"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "clok"}}},
         "tool_choice.function.name", "Known: clock"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function"}}, "tool_choice.function", "missing"),
        ({"tools": [CLOCK], "tool_choice": {"type": "custom", "custom": {"name": "x"}}},
         "tool_choice.custom", "Only functions"),
    ],
)  # fmt: skip
def test_a_wrong_tool_is_named(fields: dict[str, Any], param: str, says: str) -> None:
    error = refused(chat_call, {"messages": [USER], **fields})
    assert error.param == param
    assert says in str(error)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "structure"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, JsonStructure({"type": "object"})),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            JsonStructure(SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, JsonStructure(SCHEMA)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, JsonStructure(SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, JsonStructure({"type": "object"})),
        ({"structured_outputs": {"regex": "a+"}}, RegexStructure("a+")),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, ChoiceStructure(("yes", "no"))),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, GrammarStructure('start: "a"', "lark")),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, GrammarStructure('root ::= "a"', "ebnf")),
        (
            {"structured_outputs": {"grammar": 'start: "x ::= y"'}},
            GrammarStructure('start: "x ::= y"', "lark"),
        ),
        (
            {"structured_outputs": {"grammar": 'start: "a"', "syntax": "ebnf"}},
            GrammarStructure('start: "a"', "ebnf"),
        ),
    ],
)
def test_structures_in_both_spellings(fields: dict[str, Any], structure: object) -> None:
    assert chat_request(**fields).structure == structure
    (request,) = completion_call({"prompt": "x", **fields}).requests
    assert request.structure == structure


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", [TextPrompt("a")]),
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ([1, 2], [TokenPrompt((1, 2))]),
        ([[1, 2], [3]], [TokenPrompt((1, 2)), TokenPrompt((3,))]),
        (["a", [1]], [TextPrompt("a"), TokenPrompt((1,))]),
    ],
)
def test_each_prompt_of_a_completion_is_a_request_of_its_own(prompt: object, prompts: list[object]) -> None:
    call = completion_call({"prompt": prompt, "n": 2, "best_of": 2, "logprobs": 3, "max_tokens": 9})
    assert [request.prompt for request in call.requests] == prompts
    assert {(request.n, request.logprobs, request.max_new_tokens) for request in call.requests} == {(2, 3, 9)}
    assert len({request.id for request in call.requests}) == len(prompts)


def test_echo_has_the_prompt_scored_only_where_it_must_be() -> None:
    def scores(**fields: Any) -> int | None:
        (request,) = completion_call(fields).requests
        return request.prompt_logprobs

    assert scores(prompt="a", echo=True) is None
    assert scores(prompt="a", echo=True, logprobs=2) == 2
    assert scores(prompt=[1], echo=True) == 0
    assert scores(prompt="a", logprobs=2) is None
    assert scores(prompt=[1], echo=True, logprobs=1, max_tokens=0) == 1


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({}, "prompt", "missing"),
        ({"prompt": None}, "prompt", "nothing to read"),
        ({"prompt": []}, "prompt", "nothing to read"),
        ({"prompt": [[]]}, "prompt.0", "no text and no list"),
        ({"prompt": ["a", 1]}, "prompt.1", "no text and no list"),
        ({"prompt": [1, -1]}, "prompt.0", "no text and no list"),
        ({"prompt": [True]}, "prompt.0", "no text and no list"),
        ({"prompt": {"a": 1}}, "prompt", "nothing to read"),
        ({"prompt": ["x"] * (MAX_PROMPTS + 1)}, "prompt", str(MAX_PROMPTS)),
        ({"prompt": [1, 2], "suffix": "y"}, "suffix", "as text"),
        ({"prompt": "x", "suffix": "y", "echo": True}, "echo", "suffix"),
        ({"prompt": "x", "suffix": ["y"]}, "suffix", "string"),
        ({"prompt": "x", "best_of": 2}, "best_of", "choose among them"),
        ({"prompt": "x", "logprobs": True}, "logprobs", "integer"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "echo with logprobs"),
        ({"prompt": "x", "messages": [USER]}, "messages", "/v1/chat/completions"),
        ({"prompt": "x", "max_completion_tokens": 3}, "max_completion_tokens", "max_tokens"),
        ({"prompt": "x", "promt": "y"}, "promt", "Did you mean prompt?"),
    ],
)
def test_a_wrong_completion_is_named(fields: dict[str, Any], param: str, says: str) -> None:
    error = refused(completion_call, fields)
    assert error.param == param
    assert says in str(error)


def test_a_suffix_makes_a_gap_to_fill_and_an_empty_one_makes_none() -> None:
    call = completion_call({"prompt": ["a", "b"], "suffix": "z"})
    assert [one.prompt for one in call.requests] == [InfillPrompt("a", "z"), InfillPrompt("b", "z")]
    for nothing in ("", None):
        assert completion_call({"prompt": "a", "suffix": nothing}).requests[0].prompt == TextPrompt("a")


def test_images_that_are_not_in_the_request_are_asked_for_by_name() -> None:
    asked: list[tuple[str, str]] = []

    def image_of(url: str, param: str) -> bytes:
        asked.append((url, param))
        return b"bytes of " + url.encode()

    parts = [
        {"type": "image_url", "image_url": {"url": "https://host/a.png"}},
        {"type": "image_url", "image_url": "file-1"},
        {"type": "image_url", "image_url": {"file_id": "file-2"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ]
    body = {"messages": [{"role": "user", "content": parts}]}
    prompt = chat_call(body, image_of=image_of).requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert [part.data for part in prompt.messages[0].parts if isinstance(part, ImagePart)] == [
        b"bytes of https://host/a.png",
        b"bytes of file-1",
        b"bytes of file-2",
        bytes(3),
    ]
    assert asked == [
        ("https://host/a.png", "messages.0.content.0.image_url.url"),
        ("file-1", "messages.0.content.1.image_url.url"),
        ("file-2", "messages.0.content.2.image_url.file_id"),
    ]


@pytest.mark.parametrize("image", [{}, {"url": "file-1", "file_id": "file-1"}, {"file_id": ""}])
def test_an_image_names_one_place(image: dict[str, str]) -> None:
    part = {"type": "image_url", "image_url": image}
    assert "image_url" in str(refused(chat_call, {"messages": [{"role": "user", "content": [part]}]}).param)


def test_embeddings_take_texts_and_tokens() -> None:
    call = embedding_call({"input": ["a", "b"], "model": "m", "encoding_format": "base64", "user": "u"})
    assert (call.request.inputs, call.model, call.as_base64) == (("a", "b"), "m", True)
    assert embedding_call({"input": "a"}).request.inputs == ("a",)
    assert embedding_call({"input": [1, 2]}).request.inputs == ((1, 2),)
    assert embedding_call({"input": [[1], [2]]}).request.inputs == ((1,), (2,))


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input": ""}, "input.0", "empty"),
        ({"input": ["a", ""]}, "input.1", "empty"),
        ({"input": ["a"] * (MAX_EMBEDDING_INPUTS + 1)}, "input", str(MAX_EMBEDDING_INPUTS)),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "dimensions": 8.0}, "dimensions", "integer"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "base64"),
        ({"inputs": "a"}, "inputs", "Did you mean input?"),
    ],
)
def test_a_wrong_embedding_is_named(fields: dict[str, Any], param: str, says: str) -> None:
    error = refused(embedding_call, fields)
    assert error.param == param
    assert says in str(error)


def test_a_model_is_the_opened_one_or_an_adapter_of_it() -> None:
    plain = chat(model="tiny")
    assert for_model(plain, ["tiny"], []) is plain
    nameless = chat()
    assert for_model(nameless, ["tiny"], ["lora"]) is nameless
    adapted = for_model(completion_call({"prompt": ["a", "b"], "model": "lora"}), ["tiny"], ["lora"])
    assert [request.adapter for request in adapted.requests] == ["lora", "lora"]
    with pytest.raises(UnknownModelError, match="Did you mean tiny"):
        for_model(chat(model="tini"), ["tiny"], ["lora"])
    with pytest.raises(UnsupportedError, match="adapter"):
        for_model(embedding_call({"input": "a", "model": "lora"}), ["tiny"], ["lora"])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "does not hold a JSON object"),
        (b'{"a": NaN}', "not finite"),
        (b'{"a": 1e999}', "not finite"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": "\\ud83d"}', "surrogate"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested deeper"),
        (b'{"a": ' + b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_what_is_no_harmless_json_object_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(InvalidBodyError) as caught:
        read_json_object(data, "body")
    assert says in str(caught.value)
    assert caught.value.code == "invalid_json"


def test_size_and_number_of_values_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidBodyError, match="larger than 10 bytes"):
        read_json_object(b'{"a": "0123456789"}', "body", max_bytes=10)
    monkeypatch.setattr(openai_body, "MAX_VALUES", 10)
    assert read_json_object(b'{"a": ",,,,,,,,,,,[[[[[[\\",,,"}', "body")
    for many in (b'{"a": [1,1,1,1,1,1,1,1,1,1,1]}', b'{"a": [[],[],[],[],[],[]]}'):
        with pytest.raises(InvalidBodyError, match="more than 10 values"):
            read_json_object(many, "body")


def test_characters_outside_the_first_plane_may_be_escaped() -> None:
    assert read_json_object(json.dumps({"a": "🦙"}).encode(), "body") == {"a": "🦙"}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = sorted({*ChatBody.model_fields, *CompletionBody.model_fields, *EmbeddingBody.model_fields})


@given(
    st.sampled_from(sorted(ENDPOINTS)),
    st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), JSON_VALUES, max_size=5),
    st.booleans(),
)
def test_no_body_does_anything_but_be_taken_or_refused(url: str, body: dict[str, Any], whole: bool) -> None:
    if whole:
        body = {"messages": [USER], "prompt": "x", "input": "x", **body}
    try:
        ENDPOINTS[url](body)
    except InvalidBodyError as error:
        assert str(error).isprintable()


@given(
    st.binary(max_size=64)
    | st.lists(st.sampled_from([*'{}[]",:\\u', "1e9", "a"])).map("".join).map(str.encode)
)
def test_no_bytes_do_anything_but_be_read_or_refused(data: bytes) -> None:
    try:
        assert isinstance(read_json_object(data, "body"), dict)
    except InvalidBodyError as error:
        assert error.code == "invalid_json"


@given(st.lists(st.sampled_from(['"', "\\", ",", "[", "a"])).map("".join).map(str.encode))
def test_strings_are_told_from_values_however_they_end(data: bytes) -> None:
    rest = openai_body._STRING.sub(b"", data)
    assert b'"' not in rest
