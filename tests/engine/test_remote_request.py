"""Requests in each dialect: every field is either translated or refused by name."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.chat.messages import ImagePart, Message, TextPart, ToolCall, ToolDefinition, user_message
from ayllu.engine.openai.requests import ENDPOINTS, GenerateCall
from ayllu.engine.parameters import Sampling
from ayllu.engine.remote.endpoint import Dialect, RemoteEndpoint
from ayllu.engine.remote.request import Call, choice_grammar, generate_call, tenant_digest
from ayllu.engine.requests import (
    ChatPrompt,
    ChoiceStructure,
    GenerateRequest,
    GrammarStructure,
    InfillPrompt,
    JsonStructure,
    RegexStructure,
    TextPrompt,
    TokenPrompt,
    ToolUse,
)
from ayllu.errors import AylluError, GrammarError, ImageError, UnsupportedError, UsageError

CHAT = ChatPrompt((user_message("hello"),))
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
PNG = b"\x89PNG\r\n\x1a\nrest"


def endpoint(dialect: Dialect = "openai", **settings: Any) -> RemoteEndpoint:
    version = "2024-10-21" if dialect == "azure" else None
    settings = {"base_url": "https://host", "model": "m", "api_version": version, **settings}
    return RemoteEndpoint(dialect=dialect, **settings)


def body_of(dialect: Dialect = "openai", **request: Any) -> dict[str, Any]:
    call = generate_call(GenerateRequest(**{"prompt": CHAT, **request}), endpoint(dialect))
    body = json.loads(call.body)
    assert isinstance(body, dict)
    return body


Asked = dict[str, Any]
REFUSED = "refused"
SALT = {"cache_salt": tenant_digest("ana")}
TEXT = {"prompt": TextPrompt("x"), "max_new_tokens": 5}

# What is asked, and what each dialect (in the order of DIALECTS: openai, vllm, sglang, llama.cpp, azure,
# ayllu) makes of it: the fields that must be in the body, or a refusal that holds this word.
TABLE: list[tuple[Asked, str, tuple[Any, ...]]] = [
    (
        {"sampling": Sampling(top_k=40)},
        "top_k",
        (REFUSED, {"top_k": 40}, {"top_k": 40}, {"top_k": 40}, REFUSED, {"top_k": 40}),
    ),
    (
        {"sampling": Sampling(min_p=0.1)},
        "min_p",
        (REFUSED, {"min_p": 0.1}, {"min_p": 0.1}, {"min_p": 0.1}, REFUSED, {"min_p": 0.1}),
    ),
    (
        {"sampling": Sampling(repetition_penalty=1.2)},
        "repetition_penalty",
        (
            REFUSED,
            {"repetition_penalty": 1.2},
            {"repetition_penalty": 1.2},
            {"repeat_penalty": 1.2, "repeat_last_n": 1 << 20},
            REFUSED,
            {"repetition_penalty": 1.2},
        ),
    ),
    (
        {"sampling": Sampling(presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={7: -100.0})},
        "penalties and biases",
        ({"presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"7": -100.0}},) * 6,
    ),
    ({"sampling": Sampling(seed=5)}, "seed", ({"seed": 5},) * 6),
    ({"n": 3, "stop": ("a", "b")}, "n and stop", ({"n": 3, "stop": ["a", "b"]},) * 6),
    ({"stop": ("a",)}, "stop", ({}, {}, {}, {"verbose": True}, {}, {})),
    ({"max_new_tokens": 5}, "max_new_tokens", ({"max_tokens": 5},) * 6),
    (
        {"prompt": TextPrompt("x")},
        "max_new_tokens",
        (REFUSED, {"max_tokens": None}, REFUSED, {}, REFUSED, {"max_tokens": None}),
    ),
    (
        {"logprobs": 0},
        "logprobs",
        tuple({"logprobs": True, "top_logprobs": count} for count in (0, 0, 0, 1, 0, 0)),
    ),
    ({"logprobs": 0, **TEXT}, "logprobs", tuple({"logprobs": count} for count in (0, 0, 0, 1, 0, 0))),
    ({"prompt_logprobs": 1}, "prompt_logprobs", (REFUSED,) * 6),
    (
        {"prompt": InfillPrompt("a", "b"), "max_new_tokens": 5},
        "suffix",
        ({"prompt": "a", "suffix": "b"}, *(REFUSED,) * 3, *({"prompt": "a", "suffix": "b"},) * 2),
    ),
    ({"adapter": "lora"}, "adapter", (REFUSED, {"model": "lora"}, *(REFUSED,) * 3, {"model": "lora"})),
    (
        {"priority": 2},
        "priority",
        (REFUSED, {"priority": -2}, {"priority": 2}, REFUSED, REFUSED, {"priority": 2}),
    ),
    (
        {"tenant": "ana"},
        "tenant",
        (
            {"user": tenant_digest("ana")},
            SALT,
            SALT,
            {"cache_prompt": False},
            {"user": tenant_digest("ana")},
            {"user": tenant_digest("ana")},
        ),
    ),
    (
        {"ignore_stop_tokens": True},
        "ignore_stop_tokens",
        (REFUSED, *({"ignore_eos": True},) * 3, REFUSED, {"ignore_eos": True}),
    ),
    (
        {"structure": JsonStructure(SCHEMA)},
        "JsonStructure",
        tuple(
            {"json_schema": SCHEMA} if dialect == "llama.cpp" else {"response_format": FORMAT}
            for dialect in DIALECTS
        ),
    ),
    (
        {"structure": JsonStructure(SCHEMA), **TEXT},
        "structure",
        (
            REFUSED,
            {"response_format": FORMAT},
            {"response_format": FORMAT},
            {"json_schema": SCHEMA},
            REFUSED,
            {"response_format": FORMAT},
        ),
    ),
    (
        {"structure": RegexStructure("a+")},
        "RegexStructure",
        (
            REFUSED,
            {"structured_outputs": {"regex": "a+"}},
            {"regex": "a+"},
            REFUSED,
            REFUSED,
            {"structured_outputs": {"regex": "a+"}},
        ),
    ),
    (
        {"structure": ChoiceStructure(("a", 'b"'))},
        "ChoiceStructure",
        (
            REFUSED,
            {"structured_outputs": {"choice": ["a", 'b"']}},
            {"ebnf": 'root ::= "a" | "b\\U00000022"'},
            {"grammar": 'root ::= "a" | "b\\U00000022"'},
            REFUSED,
            {"structured_outputs": {"choice": ["a", 'b"']}},
        ),
    ),
    (
        {"structure": GrammarStructure("root ::= x", "ebnf")},
        "grammar",
        (
            REFUSED,
            {"structured_outputs": {"grammar": "root ::= x"}},
            {"ebnf": "root ::= x"},
            {"grammar": "root ::= x"},
            REFUSED,
            {"structured_outputs": {"grammar": "root ::= x", "syntax": "ebnf"}},
        ),
    ),
    (
        {"structure": GrammarStructure("start: x")},
        "lark",
        (
            REFUSED,
            {"structured_outputs": {"grammar": "start: x"}},
            REFUSED,
            REFUSED,
            REFUSED,
            {"structured_outputs": {"grammar": "start: x", "syntax": "lark"}},
        ),
    ),
]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("asked", "word", "outcomes"), TABLE)
def test_each_field_is_translated_or_refused_by_name(
    asked: Asked, word: str, outcomes: tuple[Any, ...], dialect: Dialect
) -> None:
    outcome = outcomes[DIALECTS.index(dialect)]
    if outcome == REFUSED:
        with pytest.raises(UnsupportedError) as raised:
            body_of(dialect, **asked)
        assert word in str(raised.value) and dialect in str(raised.value)
    else:
        body = body_of(dialect, **asked)
        assert {name: body.get(name, "absent") for name in outcome} == outcome


@pytest.mark.parametrize("dialect", DIALECTS)
def test_defaults_ask_for_nothing_special_but_are_said_where_servers_have_their_own(dialect: Dialect) -> None:
    body = body_of(dialect)
    assert (body["temperature"], body["top_p"]) == (0.6, 0.9)
    own = {
        name: body[name]
        for name in ("top_k", "min_p", "repetition_penalty", "repeat_penalty")
        if name in body
    }
    assert (
        own
        == {
            "openai": {},
            "azure": {},
            "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
            "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
            "llama.cpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
            "ayllu": {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        }[dialect]
    )
    for name in ("user", "cache_salt", "priority", "seed", "stop", "logprobs", "tools", "response_format"):
        assert name not in body


def test_llama_cpp_seeds_stay_within_its_32_bits_and_off_the_value_for_any() -> None:
    seeds = [body_of("llama.cpp", sampling=Sampling(seed=seed))["seed"] for seed in (0, 2**32 - 1, 2**63 - 1)]
    assert all(0 <= seed < 2**32 - 1 for seed in seeds)


def test_any_object_has_a_name_of_its_own_on_openai() -> None:
    assert body_of(structure=JsonStructure({"type": "object"}))["response_format"] == {"type": "json_object"}
    assert body_of("vllm", structure=JsonStructure(True))["response_format"]["json_schema"]["schema"] == {}
    with pytest.raises(GrammarError):
        body_of(structure=JsonStructure(False))


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4))
def test_choices_in_a_grammar_are_one_printable_line_without_stray_quotes(choices: list[str]) -> None:
    grammar = choice_grammar(tuple(choices))
    assert grammar.isprintable()
    assert grammar.count('"') == 2 * len(choices)


def test_a_conversation_with_calls_results_and_images() -> None:
    messages = (
        Message("system", "be brief"),
        user_message("what is this?", [PNG]),
        Message("assistant", "", (ToolCall("look", {"at": "ñ"}, "c1"), ToolCall("go", {}))),
        Message("tool", "a door", name="go"),
        Message("tool", (TextPart("a sun"),), tool_call_id="c1"),
        Message("assistant", "A sun."),
    )
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert body_of(prompt=ChatPrompt(messages))["messages"] == [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": "what is this?"},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "ñ"}'}},
                {"id": "call_2_1", "type": "function", "function": {"name": "go", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "content": "a door", "name": "go", "tool_call_id": "call_2_1"},
        {"role": "tool", "content": "a sun", "tool_call_id": "c1"},
        {"role": "assistant", "content": "A sun."},
    ]


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"BM", "image/bmp"),
        (b"RIFF0000WEBP", "image/webp"),
    ],
)
def test_the_kind_of_an_image_is_told_from_its_bytes(head: bytes, kind: str) -> None:
    message = Message("user", (ImagePart(head),))
    part = body_of(prompt=ChatPrompt((message,)))["messages"][0]["content"][0]
    assert part["image_url"]["url"].startswith(f"data:{kind};base64,")


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ({"prompt": ChatPrompt((user_message("x", [b"<svg>"]),))}, ImageError),
        ({"prompt": ChatPrompt((Message("tool", "no call"),))}, UsageError),
        ({"prompt": ChatPrompt((user_message("half \ud800"),))}, UsageError),
        ({"prompt": TextPrompt("")}, UsageError),
        ({"structure": JsonStructure({"const": float("nan")})}, UsageError),
        ({"structure": JsonStructure({"const": {1, 2}})}, UsageError),
    ],
)
def test_what_no_server_could_answer_is_refused_before_it_is_sent(
    asked: Asked, kind: type[AylluError]
) -> None:
    with pytest.raises(kind):
        body_of("vllm", **asked)


def test_tools_and_choices() -> None:
    look = ToolDefinition("look", "looks", {"type": "object", "properties": {"at": {"type": "string"}}})
    go = ToolDefinition("go")
    body = body_of(tool_use=ToolUse((look, go), "go", parallel=False))
    assert body["tools"][0]["function"] == {
        "name": "look",
        "description": "looks",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    }
    assert body["tool_choice"] == {"type": "function", "function": {"name": "go"}}
    assert body["parallel_tool_calls"] is False
    for choice in ("auto", "none", "required"):
        assert body_of(tool_use=ToolUse((look, go), choice))["tool_choice"] == choice
    # llama.cpp reads a named choice as "auto".
    body = body_of("llama.cpp", tool_use=ToolUse((look, go), "go"))
    assert (body["tool_choice"], [tool["function"]["name"] for tool in body["tools"]]) == ("required", ["go"])


def test_paths_follow_the_prompt_and_the_address() -> None:
    def call(prompt: Any) -> Call:
        return generate_call(GenerateRequest(prompt=prompt, max_new_tokens=1), endpoint())

    assert call(CHAT).path == "chat/completions"
    assert call(TokenPrompt((1,))).path == "completions"
    assert endpoint().url("models") == "https://host/v1/models"
    assert endpoint(base_url="https://host/api/v3/").url("models") == "https://host/api/v3/models"
    azure = endpoint("azure", model="my deployment", api_key="k")
    place = "https://host/openai/deployments/my%20deployment/chat/completions?api-version=2024-10-21"
    assert azure.url("chat/completions") == place
    assert azure.request_headers()["api-key"] == "k"
    assert "Authorization" not in azure.request_headers()


def test_the_tenants_name_is_not_told() -> None:
    assert "ana" not in tenant_digest("ana@example.org")
    assert tenant_digest("a") != tenant_digest("b")


LOOK = ToolDefinition("look", "looks", {"type": "object", "properties": {"at": {"type": "string"}}})
CALLED = Message("assistant", "I look.", (ToolCall("look", {"at": "ñ"}, "c1"),))


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {
            "sampling": Sampling(
                temperature=0.0, top_p=1.0, top_k=3, min_p=0.5, repetition_penalty=1.5, seed=2**60
            )
        },
        {"sampling": Sampling(presence_penalty=1.0, frequency_penalty=-1.0, logit_bias={3: 2.5})},
        {"max_new_tokens": 7, "stop": ("a", "b"), "n": 4, "logprobs": 3, "priority": -2},
        {"ignore_stop_tokens": True, "prompt": TextPrompt("once")},
        {"prompt": TokenPrompt((1, 2, 3)), "logprobs": 0, "structure": RegexStructure("a+")},
        {"structure": JsonStructure(SCHEMA)},
        {"structure": ChoiceStructure(("yes", "no"))},
        {"structure": GrammarStructure("start: x", "lark")},
        {"structure": GrammarStructure("root ::= x", "ebnf")},
        {"tool_use": ToolUse((LOOK, ToolDefinition("go")), "look", parallel=False)},
        {"tool_use": ToolUse((LOOK,), "none")},
        {"prompt": ChatPrompt((user_message("see", [PNG]), CALLED, Message("tool", "ok", (), "c1", "look")))},
    ],
)
def test_another_ayllu_understands_exactly_what_was_asked(asked: Asked) -> None:
    request = GenerateRequest(**{"prompt": CHAT, **asked})
    call = generate_call(request, endpoint("ayllu"))
    understood = ENDPOINTS[f"/v1/{call.path}"](json.loads(call.body))
    assert isinstance(understood, GenerateCall)
    assert (understood.model, understood.stream, understood.stream_usage) == ("m", True, True)
    assert replace(understood.requests[0], id=request.id) == request
