"""Bodies of /v1/messages: every field honoured or refused by name, turns as Anthropic merges them."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.chat.messages import ImagePart, Message, TextPart, ToolCall, ToolDefinition
from ayllu.engine.openai.body import InvalidBodyError
from ayllu.engine.requests import (
    MAX_PROMPT_TOKENS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOOLS,
    ChatPrompt,
    GenerateRequest,
    JsonStructure,
    ToolUse,
)
from ayllu.server.anthropic.blocks import _REFUSED
from ayllu.server.anthropic.bodies import (
    MAX_TOP_K,
    CountTokensBody,
    CustomTool,
    MessagesBody,
    count_tokens_call,
    messages_call,
)

PIXEL = b"\x89PNG\r\n\x1a\n and so on"
IN_BASE64 = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(PIXEL).decode()}
IMAGE = {"type": "image", "source": IN_BASE64}
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
HELLO = {"role": "user", "content": "hi"}
USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Cusco"}}
RESULT: dict[str, Any] = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"}
CALLED = [HELLO, {"role": "assistant", "content": [USE]}]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
JSON_FORMAT = {"type": "json_schema", "schema": SCHEMA}
EPHEMERAL = {"type": "ephemeral", "ttl": "1h"}


def _words(text: str) -> list[str]:
    return text.split()


# As the official client 2.13 declares them for messages.create, betas included.
API_FIELDS = _words(
    """max_tokens messages model billing_policy cache_control compaction container context_management
    diagnostics fallback_credit_token fallbacks inference_geo mcp_servers metadata output_config output_format
    service_tier speed stop_sequences system temperature thinking thread tool_choice tools top_k top_p betas
    user_profile_id workspace_id stream"""
)
API_BLOCKS = _words(
    """text image document search_result thinking redacted_thinking tool_use tool_result
    server_tool_use web_search_tool_result web_fetch_tool_result code_execution_tool_result
    bash_code_execution_tool_result text_editor_code_execution_tool_result tool_search_tool_result
    container_upload advisor_tool_result browser_state compaction fallback mcp_tool_listing mcp_tool_result
    mcp_tool_use tool_addition tool_removal"""
)
API_TOOL_FIELDS = _words(
    """input_schema name allowed_callers cache_control defer_loading description
    eager_input_streaming input_examples strict type"""
)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 5, "messages": [HELLO], **fields}


def request(**fields: Any) -> GenerateRequest:
    call = messages_call(body(**fields), tenant="t")
    assert call.kind == "chat" and call.model == "tiny"
    (one,) = call.requests
    return one


def turns(*messages: Any, image_of: Any = None, **fields: Any) -> tuple[Message, ...]:
    (one,) = messages_call(body(messages=list(messages), **fields), image_of=image_of).requests
    assert isinstance(one.prompt, ChatPrompt)
    return one.prompt.messages


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def refused(**fields: Any) -> InvalidBodyError:
    with pytest.raises(InvalidBodyError) as caught:
        messages_call(body(**fields))
    return caught.value


def test_every_field_of_the_api_is_known():
    known = {field.alias or name for name, field in MessagesBody.model_fields.items()}
    assert set(API_FIELDS) == {name for name in API_FIELDS if name in known or name in MessagesBody.refused}
    assert not known & set(MessagesBody.refused)
    assert set(API_TOOL_FIELDS) == set(CustomTool.model_fields)


@pytest.mark.parametrize("kind", API_BLOCKS)
def test_every_block_of_the_api_is_read_or_refused_with_a_reason(kind):
    error = refused(messages=[user({"type": kind, "nonsense": 1})])
    if kind in _REFUSED:
        assert error.param == "messages.0.content.0.type" and error.fix == _REFUSED[kind]
        assert error.code == "unsupported_parameter"
    else:
        assert error.param == "messages.0.content.0.nonsense" and error.code == "unknown_parameter"


def test_what_is_asked_becomes_the_request():
    made = request(
        stop_sequences=["a", "b"],
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        tools=[WEATHER],
        stream=True,
    )
    assert (made.max_new_tokens, made.stop, made.n, made.tenant) == (5, ("a", "b"), 1, "t")
    sampling = made.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 7)
    definition = ToolDefinition("weather", "Weather of a city.", WEATHER["input_schema"])
    assert made.tool_use == ToolUse((definition,))
    assert messages_call(body(stream=True)).stream and not messages_call(body()).stream


def test_defaults_are_those_of_the_api():
    sampling = request().sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [(name, "x") for name in MessagesBody.refused]
    + [
        ("mcp_servers", [{"type": "url", "url": "http://a", "name": "a"}]),
        ("speed", "fast"),
        ("service_tier", "priority"),
    ],
)
def test_refused_field_is_named_with_a_reason(field, value):
    error = refused(**{field: value})
    assert error.param == field and field in error.problem and error.fix


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"output_config": {"task_budget": {}}}, "output_config.task_budget"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"output_config": {"format": JSON_FORMAT}, "output_format": JSON_FORMAT}, "output_format"),
        ({"output_config": {"format": JSON_FORMAT}, "tools": [WEATHER]}, "output_config.format"),
        ({"output_format": JSON_FORMAT, "tools": [WEATHER]}, "output_format"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
         "context_management.edits.0.type"),
        ({"context_management": {"compact": 1}}, "context_management.compact"),
        ({"metadata": {"name": "x"}}, "metadata.name"),
        ({"cache_control": {"type": "forever"}}, "cache_control.type"),
        ({"system": [IMAGE]}, "system.0.type"),
        ({"system": [text("a", cache_control={"type": "ephemeral", "ttl": "9m"})]},
         "system.0.cache_control.ttl"),
        ({"system": 5}, "system"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools.0.defer_loading"),
        ({"tools": [{**WEATHER, "allowed_callers": ["code_execution_20250825"]}]}, "tools.0.allowed_callers"),
        ({"tools": [{**WEATHER, "nonsense": 1}]}, "tools.0.nonsense"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools.0.name"),
        ({"tools": [{**WEATHER, "name": "a\n"}]}, "tools.0.name"),
        ({"tools": [{**WEATHER, "name": "required"}]}, "tools.0.name"),
        ({"tools": [{**WEATHER, "input_schema": {"type": "string"}}]}, "tools.0.input_schema.type"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.name"),
        ({"tools": [WEATHER] * (MAX_TOOLS + 1)}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "clock"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "auto", "name": "weather"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"tools": [WEATHER], "tool_choice": "auto"}, "tool_choice"),
        ({"stop_sequences": [""]}, "stop_sequences.0"),
        ({"stop_sequences": ["a" * (MAX_STOP_CHARACTERS + 1)]}, "stop_sequences.0"),
        ({"stop_sequences": ["a"] * (MAX_STOPS + 1)}, "stop_sequences"),
        ({"stop_sequences": "a"}, "stop_sequences"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{**HELLO, "name": "x"}]}, "messages.0.name"),
        ({"messages": [{**HELLO, "clear_at": "next_user_message"}]}, "messages.0.clear_at"),
        ({"messages": [{**HELLO, "output_config": {}}]}, "messages.0.output_config"),
        ({"messages": [user("hi")]}, "messages.0.content.0"),
        ({"messages": [user({"text": "hi"})]}, "messages.0.content.0.type"),
        ({"messages": [user({"type": ["text"]})]}, "messages.0.content.0.type"),
        ({"messages": [user({"type": "txt"})]}, "messages.0.content.0.type"),
        ({"messages": [user(USE)]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "assistant", "content": [RESULT]}, HELLO]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}, HELLO]}, "messages.0.content.0.type"),
        ({"messages": [user(text("a", citations=[{"type": "char_location"}]))]},
         "messages.0.content.0.citations"),
        ({"messages": [user({**IMAGE, "transformations": {}})]}, "messages.0.content.0.transformations"),
        ({"messages": [user({"type": "image", "source": {"type": "url", "url": "http://a/b.png"}})]},
         "messages.0.content.0.source.url"),
        ({"messages": [user({"type": "image", "source": {"type": "file", "file_id": "file-1"}})]},
         "messages.0.content.0.source.file_id"),
        ({"messages": [user({"type": "image", "source": {**IN_BASE64, "data": "!"}})]},
         "messages.0.content.0.source.data"),
        ({"messages": [user({"type": "image", "source": {**IN_BASE64, "media_type": "image/tiff"}})]},
         "messages.0.content.0.source.media_type"),
        ({"messages": [user({"type": "document", "source": {**IN_BASE64, "media_type": "application/pdf"}})]},
         "messages.0.content.0.source.type"),
        ({"messages": [user({"type": "document", "citations": {"enabled": True},
                             "source": {"type": "text", "media_type": "text/plain", "data": "x"}})]},
         "messages.0.content.0.citations.enabled"),
        ({"messages": [user(RESULT)]}, "messages.0.content.0.tool_use_id"),
        ({"messages": [*CALLED, user({**RESULT, "tool_use_id": "toolu_2"})]},
         "messages.2.content.0.tool_use_id"),
        ({"messages": [*CALLED, user({**RESULT, "content": [{"type": "tool_reference", "tool_name": "x"}]})]},
         "messages.2.content.0.content.0.type"),
        ({"messages": [*CALLED, user({**RESULT, "content": [{"type": "image", "source": {"type": "ftp"}}]})]},
         "messages.2.content.0.content.0.source.type"),
        ({"messages": [{"role": "assistant", "content": [{**USE, "caller": {"type": "code"}}]}, HELLO]},
         "messages.0.content.0.caller.type"),
        ({"messages": [HELLO, {"role": "assistant", "content": [{**USE, "input": "{}"}]}, HELLO]},
         "messages.1.content.0.input"),
        ({"messages": [HELLO, {"role": "assistant", "content": "The best answer is ("}]}, "messages.1.role"),
    ],
)  # fmt: skip
def test_mistake_is_told_at_its_place(fields, param):
    error = refused(**fields)
    assert error.param == param
    assert error.problem and error.fix


@pytest.mark.parametrize("value", [-(2**63), -1, "5", True, [], {}, float("nan"), float("inf"), 10**400])
@pytest.mark.parametrize("field", ["max_tokens", "temperature", "top_p", "top_k"])
def test_impossible_number_is_refused_by_name(field, value):
    assert refused(**{field: value}).param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", MAX_PROMPT_TOKENS + 1),
        ("max_tokens", 1.5),
        ("max_tokens", None),
        ("temperature", 1.0001),
        ("top_p", 2),
        ("top_k", MAX_TOP_K + 1),
        ("top_k", 0.5),
    ],
)
def test_number_beyond_its_limit_is_refused_by_name(field, value):
    assert refused(**{field: value}).param == field


@pytest.mark.parametrize("field", ["model", "max_tokens", "messages"])
def test_missing_field_is_named(field):
    fields = body()
    del fields[field]
    with pytest.raises(InvalidBodyError) as caught:
        messages_call(fields)
    assert (caught.value.param, caught.value.code) == (field, "missing_required_parameter")


def test_limits_themselves_are_taken():
    made = request(max_tokens=MAX_PROMPT_TOKENS, temperature=0, top_p=0, top_k=MAX_TOP_K)
    assert (made.max_new_tokens, made.sampling.temperature) == (MAX_PROMPT_TOKENS, 0)
    assert request(max_tokens=1, temperature=1, top_p=1.0, top_k=0).max_new_tokens == 1


def test_null_means_not_given_wherever_a_field_may_be_left_out():
    required = {name for name, field in MessagesBody.model_fields.items() if field.is_required()}
    nothing = dict.fromkeys(set(MessagesBody.model_fields) | set(MessagesBody.refused))
    nulls = {name: value for name, value in nothing.items() if name not in required}
    (asked,) = messages_call(body(**nulls)).requests
    (plain,) = messages_call(body()).requests
    assert (asked.prompt, asked.sampling, asked.stop) == (plain.prompt, plain.sampling, plain.stop)


def test_hints_of_coding_tools_are_taken_and_change_nothing():
    plain = request(system="a\nb", tools=[WEATHER])
    hinted = request(
        system=[text("a"), text("b", cache_control=EPHEMERAL)],
        tools=[{**WEATHER, "type": "custom", "cache_control": EPHEMERAL, "eager_input_streaming": True,
                "strict": True, "defer_loading": False, "allowed_callers": ["direct"]}],
        messages=[user(text("hi", cache_control={"type": "ephemeral"}, citations=None))],
        metadata={"user_id": '{"device":"x"}'},
        betas=["claude-code-20250219", "interleaved-thinking-2025-05-14"],
        thinking={"type": "adaptive"},
        output_config={"effort": "medium"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        cache_control=EPHEMERAL,
        service_tier="auto",
        speed="standard",
        mcp_servers=[],
    )  # fmt: skip
    assert hinted.prompt == plain.prompt and hinted.tool_use == plain.tool_use
    assert hinted.sampling == plain.sampling
    assert request(thinking={"type": "disabled"}).prompt == request().prompt


def test_examples_of_input_are_shown_below_the_description():
    offer = request(tools=[{**WEATHER, "input_examples": [{"city": "Puno"}]}]).tool_use
    assert offer is not None
    assert offer.tools[0].description == 'Weather of a city.\nExample of its input: {"city": "Puno"}'


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        (None, ("auto", True)),
        ({"type": "auto"}, ("auto", True)),
        ({"type": "auto", "disable_parallel_tool_use": True}, ("auto", False)),
        ({"type": "any", "disable_parallel_tool_use": False}, ("required", True)),
        ({"type": "tool", "name": "weather"}, ("weather", True)),
        ({"type": "none"}, ("none", True)),
    ],
)
def test_tool_choice_is_kept(choice, wanted):
    offer = request(tools=[WEATHER], tool_choice=choice).tool_use
    assert offer is not None and (offer.choice, offer.parallel) == wanted


@pytest.mark.parametrize(
    "fields", [{"output_config": {"format": JSON_FORMAT}}, {"output_format": JSON_FORMAT}]
)
def test_schema_of_the_output_is_enforced(fields):
    assert request(**fields).structure == JsonStructure(SCHEMA)
    forbidden = request(**fields, tools=[WEATHER], tool_choice={"type": "none"})
    assert forbidden.structure == JsonStructure(SCHEMA)


def test_system_stands_first_and_its_blocks_on_lines_of_their_own():
    assert turns(HELLO, system=[text("a"), text("b")]) == (Message("system", "a\nb"), Message("user", "hi"))
    assert turns(HELLO, system="") == (Message("system", ""), Message("user", "hi"))


def test_instructions_in_the_middle_stay_there():
    said = turns(HELLO, {"role": "system", "content": "Be brief."}, HELLO)
    assert said == (Message("user", "hi"), Message("system", "Be brief."), Message("user", "hi"))


def test_neighbours_of_one_role_are_one_turn():
    said = turns(HELLO, user(text("there"), text("friend")), {"role": "assistant", "content": "a"},
                 {"role": "assistant", "content": [text("b"), text("c")]}, HELLO)  # fmt: skip
    assert said == (
        Message("user", "hi\nthere\nfriend"),
        Message("assistant", "a\nbc"),
        Message("user", "hi"),
    )


def test_results_of_tools_come_before_the_rest_of_a_turn():
    second = {**USE, "id": "toolu_2", "name": "clock", "input": {}}
    said = turns(
        HELLO,
        {"role": "assistant", "content": [text("Let me see."), USE, second]},
        user(text("Here:"), {**RESULT, "tool_use_id": "toolu_2", "content": [text("1"), text("2")]}, RESULT),
        user(text("Well?")),
    )
    assert said[1:] == (
        Message(
            "assistant",
            "Let me see.",
            (ToolCall("weather", {"city": "Cusco"}, "toolu_1"), ToolCall("clock", {}, "toolu_2")),
        ),
        Message("tool", "1\n2", tool_call_id="toolu_2", name="clock"),
        Message("tool", "sunny", tool_call_id="toolu_1", name="weather"),
        Message("user", "Here:\nWell?"),
    )


def test_failed_and_empty_results_are_told():
    assert turns(*CALLED, user({**RESULT, "is_error": True}))[-1].text == "Error: sunny"
    assert turns(*CALLED, user({**RESULT, "is_error": False}))[-1].text == "sunny"
    del (silent := dict(RESULT))["content"]
    (*_, last) = turns(*CALLED, user(silent))
    assert last == Message("tool", "", tool_call_id="toolu_1", name="weather")


def test_images_of_a_result_begin_what_the_user_says():
    said = turns(*CALLED, user({**RESULT, "content": [text("look"), IMAGE]}, text("What is it?")))
    assert said[-2] == Message("tool", "look", tool_call_id="toolu_1", name="weather")
    assert said[-1] == Message("user", (ImagePart(PIXEL), TextPart("What is it?")))


def test_images_are_read_or_asked_for_by_their_place():
    asked = []

    def image_of(name: str, param: str) -> bytes:
        asked.append((name, param))
        return b"found"

    said = turns(
        user(IMAGE, text("a"), {"type": "image", "source": {"type": "url", "url": "http://a/b.png"}}),
        user({"type": "image", "source": {"type": "file", "file_id": "file-1"}}),
        image_of=image_of,
    )
    found = ImagePart(b"found")
    assert said == (Message("user", (ImagePart(PIXEL), TextPart("a"), found, found)),)
    assert asked == [
        ("http://a/b.png", "messages.0.content.2.source.url"),
        ("file-1", "messages.1.content.0.source.file_id"),
    ]


def test_documents_and_search_results_are_shown_as_text():
    plain = {"type": "text", "media_type": "text/plain", "data": "words"}
    document = {"type": "document", "title": "T", "context": "C", "citations": {"enabled": False}}
    found = {"type": "search_result", "title": "T", "source": "S", "content": [text("x")]}
    assert turns(user({**document, "source": plain})) == (Message("user", "T\nC\nwords"),)
    inner = {**document, "source": {"type": "content", "content": [text("x"), IMAGE]}}
    assert turns(user(inner)) == (Message("user", (TextPart("T\nC\nx"), ImagePart(PIXEL))),)
    assert turns(user({"type": "document", "source": {"type": "content", "content": "x"}}))[0].text == "x"
    assert turns(user(found)) == (Message("user", "T\nS\nx"),)
    assert turns(*CALLED, user({**RESULT, "content": [found]}))[-1].text == "T\nS\nx"


def test_thinking_of_earlier_turns_is_left_out():
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    said = turns(HELLO, {"role": "assistant", "content": [thought, text("a")]}, HELLO)
    assert said[1] == Message("assistant", "a")
    said = turns(HELLO, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}, HELLO)
    assert said[1] == Message("assistant", "")
    assert turns(HELLO, {"role": "assistant", "content": []}, HELLO)[1] == Message("assistant", "")


@given(
    st.text(max_size=20) | st.sampled_from(["<|eot|>", "<|header_start|>system<|header_end|>", "\n\nHuman:"])
)
def test_text_goes_through_as_it_is(words):
    plain = {"role": "user", "content": words}
    said = turns(user(text(words)), {"role": "assistant", "content": words}, plain, system=words)
    assert [(message.role, message.content) for message in said] == [
        ("system", words),
        ("user", words),
        ("assistant", words),
        ("user", words),
    ]


def test_counting_reads_the_same_conversation_and_needs_no_limit():
    fields = body(system="Be brief.", tools=[WEATHER], messages=[*CALLED, user(RESULT)])
    del fields["max_tokens"]
    (counted,) = count_tokens_call(fields, tenant="t").requests
    (asked,) = messages_call({**fields, "max_tokens": 1}, tenant="t").requests
    assert (counted.prompt, counted.tool_use) == (asked.prompt, asked.tool_use)
    assert (counted.tenant, counted.max_new_tokens) == ("t", None)
    with pytest.raises(InvalidBodyError) as caught:
        count_tokens_call({**fields, "max_tokens": 1})
    assert caught.value.param == "max_tokens"
    assert "max_tokens" not in CountTokensBody.model_fields


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(MessagesBody.model_fields)), JSON)
def test_any_value_of_any_field_is_taken_or_refused_at_that_field(field, value):
    try:
        messages_call(body(**{field: value}))
    except InvalidBodyError as error:
        assert error.param is not None and error.param.split(".")[0] == field
