"""Bodies of /v1/responses: every field honoured or refused by name, turns as the chat endpoint has them."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.chat.messages import ImagePart, Message, TextPart, ToolCall, ToolDefinition
from ayllu.engine.openai.body import InvalidBodyError
from ayllu.engine.openai.fields import ChatBody, GenerateBody
from ayllu.engine.openai.requests import chat_call
from ayllu.engine.requests import MAX_LOGPROBS, ChatPrompt, JsonStructure, ToolUse
from ayllu.server.responses.bodies import LOGPROBS, SHARED, ResponsesBody, ResponsesCall, responses_call
from ayllu.server.responses.items import _REFUSED_ITEMS, _REFUSED_PARTS, MAX_ITEMS
from ayllu.server.responses.tools import REFUSED_TOOLS
from ayllu.server.responses.turns import MAX_FILE_BYTES

PIXEL = b"\x89PNG\r\n\x1a\n and so on"
DATA_URL = "data:image/png;base64," + base64.b64encode(PIXEL).decode()
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "Weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
CLOCK = {"type": "function", "name": "clock", "parameters": None}
CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Cusco"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}


def _words(text: str) -> list[str]:
    return text.split()


# As the official client 3.57 declares them for responses.create.
API_FIELDS = _words(
    """access_programs background background_options context_management conversation image include
    input instructions max_output_tokens max_tool_calls metadata model moderation
    parallel_tool_calls previous_response_id prompt prompt_cache_key prompt_cache_options
    prompt_cache_retention reasoning safety_identifier service_tier store stream stream_options
    temperature text tool_choice tools top_logprobs top_p truncation user"""
)
API_ITEMS = _words(
    """message file_search_call computer_call computer_call_output web_search_call function_call
    function_call_output tool_search_call tool_search_output additional_tools configuration_update
    reasoning compaction image_generation_call code_interpreter_call local_shell_call
    local_shell_call_output shell_call shell_call_output apply_patch_call apply_patch_call_output
    mcp_list_tools mcp_approval_request mcp_approval_response mcp_call custom_tool_call_output
    custom_tool_call compaction_trigger item_reference program program_output"""
)
API_TOOLS = _words(
    """function file_search computer computer_use_preview web_search web_search_2025_08_26 mcp
    code_interpreter programmatic_tool_calling image_generation local_shell shell custom namespace
    tool_search web_search_preview web_search_preview_2025_03_11 apply_patch"""
)


def call(**body: Any) -> ResponsesCall:
    return responses_call({"input": "hi", **body})


def request(**body: Any):
    (one,) = call(**body).generate.requests
    return one


def turns(items: Any, **options: Any) -> tuple[Message, ...]:
    (one,) = responses_call({"input": items}, **options).generate.requests
    assert isinstance(one.prompt, ChatPrompt)
    return one.prompt.messages


def refusal(body: dict[str, Any], **options: Any) -> InvalidBodyError:
    with pytest.raises(InvalidBodyError) as caught:
        responses_call({"input": "hi", **body}, **options)
    error = caught.value
    assert error.problem and error.fix and error.http_status == 400
    assert error.param is not None and error.param.split(".")[0] in error.problem
    return error


def test_every_field_of_the_api_is_honoured_or_refused_by_name() -> None:
    known = set(ResponsesBody.model_fields) | set(ResponsesBody.refused)
    assert set(API_FIELDS) - known == set()


def test_every_field_shared_with_chats_is_one_of_both() -> None:
    assert set(SHARED) <= GenerateBody.model_fields.keys() & ResponsesBody.model_fields.keys()


def test_every_kind_of_item_and_tool_is_honoured_or_refused_by_name() -> None:
    honoured = {"message", "function_call", "function_call_output", "reasoning", "item_reference"}
    assert set(API_ITEMS) - honoured - set(_REFUSED_ITEMS) == set()
    assert set(API_TOOLS) - {"function"} - set(REFUSED_TOOLS) == set()


@pytest.mark.parametrize("name", ResponsesBody.refused)
def test_a_refused_field_is_named_with_the_reason_and_null_is_no_wish(name: str) -> None:
    error = refusal({name: "x"})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert error.fix == ResponsesBody.refused[name]
    assert call(**{name: None})


@pytest.mark.parametrize("kind", _REFUSED_ITEMS)
def test_a_refused_item_is_named_with_the_reason(kind: str) -> None:
    error = refusal({"input": [{"role": "user", "content": "x"}, {"type": kind, "id": "x"}]})
    assert (error.param, error.code) == ("input.1.type", "unsupported_parameter")
    assert kind in error.problem


@pytest.mark.parametrize("kind", _REFUSED_PARTS)
def test_a_refused_part_is_named_with_the_reason(kind: str) -> None:
    error = refusal({"input": [{"role": "user", "content": [{"type": kind}]}]})
    assert (error.param, error.code) == ("input.0.content.0.type", "unsupported_parameter")


@pytest.mark.parametrize("kind", REFUSED_TOOLS)
def test_a_refused_tool_is_named_with_the_reason_wherever_it_stands(kind: str) -> None:
    assert refusal({"tools": [WEATHER, {"type": kind}]}).param == "tools.1.type"
    assert refusal({"tools": [WEATHER], "tool_choice": {"type": kind}}).param == "tool_choice.type"
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": kind}]}
    assert refusal({"tools": [WEATHER], "tool_choice": allowed}).param == "tool_choice.tools.0.type"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"truncation": "auto"}, "truncation"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}},
         "stream_options.include_obfuscation"),
        ({"stream_options": {}}, "stream_options"),
        ({"background": True, "store": False}, "background"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_object"}}, "tools": [WEATHER]}, "text.format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["everything"]}, "include.0"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"x": "y" * 513}}, "metadata.x"),
        ({"metadata": {"x": 1}}, "metadata.x"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{}]}, "tools.0.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [CLOCK]}},
         "tool_choice.tools.0.parameters"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "auto",
          "tools": [{"type": "function", "name": "clock"}]}}, "tool_choice.tools.0.name"),
        ({"max_output_tokenz": 3}, "max_output_tokenz"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [3]}, "input.0"),
        ({"input": [None]}, "input.0"),
        ({"input": [{}]}, "input.0.id"),
        ({"input": [{"content": "x"}]}, "input.0.type"),
        ({"input": [{"type": ["message"]}]}, "input.0.type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": 3}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": [{"type": "output_text", "text": "x"}]}]},
         "input.0.content.0.type"),
        ({"input": [{"role": "system", "content": [{"type": "input_image", "image_url": DATA_URL}]}]},
         "input.0.content.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"input": [{"role": "user", "content": [
            {"type": "input_image", "image_url": DATA_URL, "detail": "low"}]}]}, "input.0.content.0.detail"),
        ({"input": [{"role": "user", "content": [
            {"type": "input_image", "image_url": "https://example.org/a.png"}]}]},
         "input.0.content.0.image_url"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}]},
         "input.0.content.0.file_id"),
        ({"input": [{"role": "user", "content": [
            {"type": "input_file", "file_url": "https://example.org/a.txt"}]}]},
         "input.0.content.0.file_url"),
        ({"input": [{"role": "user", "content": [
            {"type": "input_file", "file_data": "data:application/pdf;base64,AAAA"}]}]},
         "input.0.content.0.file_data"),
        ({"input": [{"role": "user", "content": [
            {"type": "input_file", "file_data": "data:text/plain;base64,/w=="}]}]},
         "input.0.content.0.file_data"),
        ({"input": [{**CALL, "arguments": "{"}]}, "input.0.arguments"),
        ({"input": [{**CALL, "arguments": "[]"}]}, "input.0.arguments"),
        ({"input": [{**CALL, "namespace": "x"}]}, "input.0.namespace"),
        ({"input": [RESULT]}, "input.0.call_id"),
        ({"input": [CALL, {**RESULT, "output": [{"type": "input_image", "image_url": DATA_URL}]}]},
         "input.1.output.0.type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.id"),
        ({"input": [{"role": "assistant", "content": "x", "tool_calls": []}]}, "input.0.tool_calls"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_at_its_own_path(body: dict[str, Any], param: str) -> None:
    assert refusal(body).param == param


NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
           "frequency_penalty", "seed", "priority", "max_output_tokens", "max_tool_calls",
           "top_logprobs"]  # fmt: skip
EXTREMES = [-(2**63), -(2**63) - 1, -1, 0, 1, 2**31, 2**63 - 1, 2**63, 10**400, -1e308, 1e308, 1e-308, 0.5,
            float("nan"), float("inf"), True, "1", [], {}]  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", EXTREMES, ids=lambda value: str(value)[:12])
def test_a_number_is_taken_within_its_range_or_refused_by_its_name(name: str, value: Any) -> None:
    try:
        call(**{name: value})
    except InvalidBodyError as error:
        assert error.param == name and name in error.problem


def test_numbers_beyond_their_range_are_refused() -> None:
    for name, value in {
        "temperature": 101, "top_p": 1.1, "top_k": -2, "min_p": -0.1, "repetition_penalty": 0,
        "presence_penalty": 3, "frequency_penalty": -3, "seed": 2**63, "priority": 5, "max_output_tokens": 0,
        "max_tool_calls": 0, "top_logprobs": MAX_LOGPROBS + 1,
    }.items():  # fmt: skip
        assert refusal({name: value}).param == name


def test_lists_are_bounded() -> None:
    item = {"role": "user", "content": ""}
    assert refusal({"input": [item] * (MAX_ITEMS + 1)}).param == "input"
    assert refusal({"tools": [{**WEATHER, "name": f"f{n}"} for n in range(129)]}).param == "tools"
    assert refusal({"stop": ["x"] * 17}).param == "stop"
    too_much = base64.b64encode(bytes(MAX_FILE_BYTES + 1)).decode()
    part = {"type": "input_file", "file_data": f"data:text/plain;base64,{too_much}"}
    error = refusal({"input": [{"role": "user", "content": [part]}]})
    assert error.param == "input.0.content.0.file_data" and len(error.problem) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "role", "content", "id", "text", "name", "arguments", "call_id", "output",
                         "format", "schema", "mode", "tools"]), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
KINDS = st.sampled_from([*API_ITEMS, *API_TOOLS, "input_text", "input_image", "input_file", "json_schema"])


@given(
    st.dictionaries(st.sampled_from(sorted(ResponsesBody.model_fields)), JSON, max_size=4),
    st.lists(st.fixed_dictionaries({"type": KINDS}, optional={"role": JSON, "content": JSON, "id": JSON,
             "output": JSON, "call_id": JSON, "name": JSON}), max_size=2),
)  # fmt: skip
def test_whatever_is_in_a_body_it_is_understood_or_refused(body: dict[str, Any], items: list[Any]) -> None:
    for whole in ({"input": "hi", **body}, {**body, "input": items}, {"input": "hi", "tools": items}):
        try:
            made = responses_call(whole)
        except InvalidBodyError as error:
            assert error.problem and error.fix
        else:
            assert len(made.generate.requests) == 1
            json.dumps(made.input_items)


def test_what_is_left_out_has_the_apis_defaults() -> None:
    made = call()
    (one,) = made.generate.requests
    assert (made.store, made.background, made.stream, made.previous_response_id) == (True, False, False, None)
    assert (one.sampling.temperature, one.sampling.top_p) == (1.0, 1.0)
    assert (one.max_new_tokens, one.logprobs, one.tool_use, one.structure) == (None, None, None, None)
    assert one.sampling == request(**dict.fromkeys(set(API_FIELDS) - {"input"})).sampling


def test_sampling_and_limits_mean_what_they_mean_to_a_chat() -> None:
    shared = {"temperature": 0.5, "top_p": 0.25, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1,
              "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {"7": 3}, "seed": 11, "stop": "x",
              "priority": -2, "ignore_eos": True, "model": "m"}  # fmt: skip
    assert set(shared) == set(SHARED)
    made = responses_call({"input": "hi", **shared, "max_output_tokens": 9}, tenant="t")
    chat = chat_call({"messages": [{"role": "user", "content": "hi"}], **shared, "max_tokens": 9}, tenant="t")
    ((one,), (other,)) = made.generate.requests, chat.requests
    for name in ("prompt", "sampling", "max_new_tokens", "stop", "priority", "ignore_stop_tokens", "tenant"):
        assert getattr(one, name) == getattr(other, name)
    assert made.generate.model == "m" and made.generate.kind == "chat"


def test_a_structure_is_asked_for_as_text_format() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    assert request(text={"format": wanted}).structure == JsonStructure(schema)
    assert request(text={"format": {"type": "json_object"}}).structure == JsonStructure({"type": "object"})
    assert request(text={"format": {"type": "text"}, "verbosity": "medium"}).structure is None
    assert request(text={"format": wanted}, tools=[WEATHER], tool_choice="none").structure is not None


def test_log_probabilities_are_asked_for_by_include() -> None:
    assert request(include=[LOGPROBS]).logprobs == 0
    assert request(include=[LOGPROBS], top_logprobs=3).logprobs == 3
    assert request(include=["reasoning.encrypted_content"], top_logprobs=0).logprobs is None


WEATHER_TOOL = ToolDefinition("weather", "Weather of a city.", WEATHER["parameters"])
CLOCK_TOOL = ToolDefinition("clock")


@pytest.mark.parametrize(
    ("choice", "use"),
    [
        (None, ToolUse((WEATHER_TOOL, CLOCK_TOOL))),
        ("auto", ToolUse((WEATHER_TOOL, CLOCK_TOOL))),
        ("none", ToolUse((WEATHER_TOOL, CLOCK_TOOL), "none")),
        ("required", ToolUse((WEATHER_TOOL, CLOCK_TOOL), "required")),
        ({"type": "function", "name": "clock"}, ToolUse((WEATHER_TOOL, CLOCK_TOOL), "clock")),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "weather"}],
            },
            ToolUse((WEATHER_TOOL,), "required"),
        ),
    ],
)
def test_tools_are_offered_as_the_choice_says_and_strict_goes_with_auto(choice: Any, use: ToolUse) -> None:
    assert request(tools=[WEATHER, CLOCK], tool_choice=choice).tool_use == use


def test_parallel_calls_can_be_forbidden() -> None:
    use = request(tools=[WEATHER], parallel_tool_calls=False).tool_use
    assert use is not None and not use.parallel


def test_messages_may_be_short_or_full() -> None:
    expected = (Message("system", "be"), Message("user", "hi"), Message("assistant", "yes"))
    assert turns([
        {"role": "developer", "content": "be"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
    ]) == expected  # fmt: skip
    assert turns([
        {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "be"}]},
        {"type": "message", "role": "user", "status": "completed", "id": "msg_1",
         "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "message", "role": "assistant", "status": "completed", "id": "msg_2",
         "content": [{"type": "output_text", "text": "yes", "annotations": [], "logprobs": []}]},
    ]) == expected  # fmt: skip


def test_a_refusal_and_reasoning_come_back_the_one_as_text_the_other_not_at_all() -> None:
    assert turns([
        {"role": "user", "content": "x"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]) == (Message("user", "x"), Message("assistant", "no"))  # fmt: skip


def test_images_are_read_from_the_request_or_asked_for() -> None:
    parts = [{"type": "input_text", "text": "what?"}, {"type": "input_image", "image_url": DATA_URL,
             "detail": "auto"}, {"type": "input_image", "file_id": "file-1"},
             {"type": "input_image", "image_url": "https://example.org/a.png"}]  # fmt: skip
    asked = []

    def image_of(name: str, param: str) -> bytes:
        asked.append((name, param))
        return name.encode()

    (message,) = turns([{"role": "user", "content": parts}], image_of=image_of)
    assert message.content == (
        TextPart("what?"), ImagePart(PIXEL), ImagePart(b"file-1"), ImagePart(b"https://example.org/a.png")
    )  # fmt: skip
    assert asked == [
        ("file-1", "input.0.content.2.file_id"), ("https://example.org/a.png", "input.0.content.3.image_url")
    ]  # fmt: skip


def test_a_file_of_text_stands_in_the_conversation_under_its_name() -> None:
    data = "data:text/csv;base64," + base64.b64encode("año,1".encode()).decode()
    (message,) = turns(
        [
            {
                "role": "user",
                "content": [
                    {"type": "input_file", "file_data": data, "filename": "a.csv"},
                    {"type": "input_file", "file_id": "file-1"},
                ],
            }
        ],
        image_of=lambda name, param: b"kept",
    )
    assert message.content == (TextPart("a.csv\n\naño,1"), TextPart("kept"))


def test_a_stored_file_that_is_no_text_is_refused() -> None:
    part = {"type": "input_file", "file_id": "file-1"}
    body = {"input": [{"role": "user", "content": [part]}]}
    for data in (b"\xff\xfe", b"a\0b", bytes(MAX_FILE_BYTES + 1)):
        error = refusal(body, image_of=lambda name, param, data=data: data)
        assert error.param == "input.0.content.0.file_id"


def test_calls_join_the_turn_they_were_made_in() -> None:
    items = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "Let me see. "},
        CALL,
        {**CALL, "call_id": "c2"},
        {"role": "assistant", "content": "One moment."},
        RESULT,
        {**RESULT, "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
        {"role": "assistant", "content": "Mixed."},
    ]
    calls = (ToolCall("weather", {"city": "Cusco"}, "c1"), ToolCall("weather", {"city": "Cusco"}, "c2"))
    assert turns(items) == (
        Message("user", "weather?"),
        Message("assistant", "Let me see. One moment.", calls),
        Message("tool", "sunny", (), "c1", "weather"),
        Message("tool", "rain", (), "c2", "weather"),
        Message("assistant", "Mixed."),
    )


def test_instructions_go_first_and_the_history_before_the_input() -> None:
    first = responses_call({"input": [{"role": "user", "content": "a"}, CALL], "instructions": "old"})
    second = responses_call(
        {"input": [RESULT], "instructions": "new", "previous_response_id": "resp_1"},
        history=first.input_items,
    )
    (one,) = second.generate.requests
    assert isinstance(one.prompt, ChatPrompt)
    assert one.prompt.messages == (
        Message("system", "new"),
        Message("user", "a"),
        Message("assistant", "", (ToolCall("weather", {"city": "Cusco"}, "c1"),)),
        Message("tool", "sunny", (), "c1", "weather"),
    )
    assert second.previous_response_id == "resp_1"
    assert [item["type"] for item in second.input_items] == ["function_call_output"]


def test_of_a_history_that_was_cut_short_only_what_is_whole_is_read() -> None:
    message = {"id": "msg_1", "type": "message", "status": "incomplete", "role": "assistant"}
    said = {"type": "output_text", "text": "On", "annotations": [], "logprobs": []}
    history = [
        {**message, "content": [said]},
        {**message, "content": []},
        {**message, "content": [{**said, "text": ""}]},
        {**CALL, "id": "fc_1", "status": "incomplete", "arguments": '{"ci'},
    ]
    assert turns("go on", history=history) == (Message("assistant", "On"), Message("user", "go on"))


def test_a_damaged_history_is_a_mistake_of_previous_response_id() -> None:
    error = refusal({}, history=[{"type": "mystery"}])
    assert error.param == "previous_response_id"


def test_a_reference_means_the_item_that_is_kept() -> None:
    kept = {"id": "msg_1", "type": "message", "role": "user", "content": "kept"}
    for reference in (
        {"type": "item_reference", "id": "msg_1"},
        {"id": "msg_1"},
        {"type": None, "id": "msg_1"},
    ):
        made = responses_call({"input": [reference]}, item_of=lambda name, param: {"msg_1": kept}.get(name))
        (one,) = made.generate.requests
        assert isinstance(one.prompt, ChatPrompt) and one.prompt.messages == (Message("user", "kept"),)
        assert made.input_items[0]["id"] == "msg_1"
    unknown = {"input": [{"type": "item_reference", "id": "x"}]}
    assert refusal(unknown, item_of=lambda name, param: None).param == "input.0.id"
    circle = {"type": "item_reference", "id": "x"}
    assert refusal(unknown, item_of=lambda name, param: circle).param == "input.0"


EVERY_ITEM: list[dict[str, Any]] = [
    {"role": "developer", "content": "be"},
    {"role": "user", "content": [{"type": "input_text", "text": "hi"},
                                 {"type": "input_image", "image_url": DATA_URL, "detail": "high"}]},
    {"type": "reasoning"},
    {"role": "assistant", "content": "yes", "phase": "commentary"},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    CALL,
    RESULT,
    {**RESULT, "output": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
]  # fmt: skip


def test_listed_items_have_ids_and_mean_the_same_when_they_are_sent_again() -> None:
    first = responses_call({"input": EVERY_ITEM})
    ids = [item["id"] for item in first.input_items]
    assert [name.split("_")[0] for name in ids] == ["msg", "msg", "rs", "msg", "msg", "fc", "fco", "fco"]
    assert len(set(ids)) == len(ids)
    assert all(item["status"] == "completed" for item in first.input_items)
    again = responses_call({"input": json.loads(json.dumps(first.input_items))})
    assert again.input_items == first.input_items
    assert again.generate.requests[0].prompt == first.generate.requests[0].prompt
    assert turns("x", history=first.input_items)[:-1] == turns(EVERY_ITEM)


def test_nulls_that_the_official_client_writes_into_items_are_no_wishes() -> None:
    nulls = dict.fromkeys(("caller", "namespace", "async", "created_by"))
    assert turns([{**CALL, **nulls, "id": "fc_1", "status": "completed"}, {**RESULT, "name": None}])


def test_the_body_can_be_documented() -> None:
    schema = ResponsesBody.model_json_schema()
    assert {"type": "string"} in schema["properties"]["input"]["anyOf"]
    assert not {"ChatMessage"} & set(schema["$defs"]) and ChatBody.model_json_schema()
