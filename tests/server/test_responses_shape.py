"""A response while it comes and at its end: what the events add up to is the result, whenever they stop."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.chat.messages import ToolCall
from ayllu.engine.events import AnswerFinished, Done, Event, Started, TextDelta, TokenLogprob, ToolCallMade
from ayllu.engine.openai.requests import chat_call
from ayllu.engine.openai.results import Collected, chat_logprobs, response_body
from ayllu.engine.requests import ChatPrompt
from ayllu.errors import AylluError, EngineCrashedError, ImageError, OverloadedError, UsageError
from ayllu.server.responses.bodies import LOGPROBS, responses_call
from ayllu.server.responses.shape import FINAL, ResponseShape, partial_response
from ayllu.server.shapes import ServerEvent

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True}
CREATED = 1_700_000_000.5
Events = list[dict[str, Any]]


def new_shape(**body: Any) -> ResponseShape:
    call = responses_call({"input": "hi", "tools": [TOOL], **body})
    return ResponseShape(call, model="tiny", response_id="resp_1", created_at=CREATED)


def parsed(said: Iterable[ServerEvent]) -> Events:
    events = []
    for one in said:
        event = json.loads(one.data)
        assert one.name == event["type"]
        events.append(event)
    return events


def token(text: str) -> TokenLogprob:
    return TokenLogprob(text.encode(), -0.5, 1, (TokenLogprob(b"other", -1.5, 2),))


# "text" that lags behind its tokens, as an engine says it: a piece may be empty.
PIECES = st.tuples(st.just("text"), st.text(max_size=5), st.lists(st.text(max_size=3), max_size=2))
CALLS = st.tuples(
    st.just("call"),
    st.sampled_from(["f", "g"]),
    st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2),
)
SCRIPTS = st.lists(PIECES | CALLS, max_size=8)
REASONS = st.sampled_from(["stop", "length", "tool_calls", "cancelled"])


def engine_events(script: list[Any], reason: Any = "stop") -> list[Event]:
    events: list[Event] = [Started(3, 1)]
    calls = 0
    for kind, first, second in script:
        if kind == "text":
            events.append(TextDelta(0, first, (), tuple(map(token, second))))
        else:
            events.append(ToolCallMade(0, calls, ToolCall(first, second)))
            calls += 1
    return [*events, AnswerFinished(0, reason, 7), Done(3, 7, 1)]


def streamed(shape: ResponseShape, script: list[Any], reason: Any = "stop") -> Events:
    said = [*shape.opening()]
    for event in engine_events(script, reason):
        said += shape.add(0, event)
    return parsed([*said, *shape.closing()])


def accumulated(events: Events) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a client of the API knows at the end: the last response told, and the items that it put together
    of the smallest pieces, each held to what its 'done' says."""
    response: dict[str, Any] = {}
    items: list[dict[str, Any]] = []
    done: list[bool] = []
    for event in events:
        name = event["type"]
        if "response" in event:
            response = event["response"]
        elif name == "response.output_item.added":
            assert event["output_index"] == len(items) and all(done)
            assert event["item"]["status"] == "in_progress"
            items.append(copy.deepcopy(event["item"]))
            done.append(False)
        elif name == "response.output_item.done":
            item = items[event["output_index"]]
            item["status"] = event["item"]["status"]
            assert item == event["item"] and not done[-1]
            done[-1] = True
        else:
            item = items[event["output_index"]]
            assert event["item_id"] == item["id"] and not done[-1]
            if name == "response.content_part.added":
                assert event["content_index"] == len(item["content"]) == 0
                item["content"].append(copy.deepcopy(event["part"]))
            elif name == "response.content_part.done":
                assert item["content"][event["content_index"]] == event["part"]
            elif name == "response.output_text.delta":
                item["content"][event["content_index"]]["text"] += event["delta"]
                item["content"][event["content_index"]]["logprobs"] += event["logprobs"]
            elif name == "response.output_text.done":
                assert item["content"][event["content_index"]]["text"] == event["text"]
                assert item["content"][event["content_index"]]["logprobs"] == event["logprobs"]
            elif name == "response.function_call_arguments.delta":
                item["arguments"] += event["delta"]
            else:
                assert name == "response.function_call_arguments.done"
                assert item["arguments"] == event["arguments"]
    return response, items


def require_valid(response: dict[str, Any]) -> None:
    """The fields that the official client requires, with the values that it knows."""
    assert response["object"] == "response" and response["id"] == "resp_1" and response["model"] == "tiny"
    assert response["created_at"] == int(CREATED)
    status = response["status"]
    assert status in ("queued", "in_progress", "completed", "incomplete", "failed", "cancelled")
    assert (response["error"] is not None) == (status == "failed")
    assert (response["incomplete_details"] is not None) == (status == "incomplete")
    assert (response["completed_at"] is not None) == (status == "completed")
    running = status in ("queued", "in_progress")
    for item in response["output"]:
        assert item["status"] in ("completed", "incomplete", *(["in_progress"] if running else []))
        if item["type"] == "message":
            assert item["role"] == "assistant" and item["id"].startswith("msg_")
            for part in item["content"]:
                assert part.keys() == {"type", "text", "annotations", "logprobs"}
        else:
            assert item["type"] == "function_call" and item["id"].startswith("fc_")
            assert item.keys() == {"type", "id", "status", "call_id", "name", "arguments"}
    ids = [item["id"] for item in response["output"]]
    assert len(set(ids)) == len(ids)


@given(SCRIPTS, REASONS, st.booleans(), st.booleans())
def test_what_is_streamed_adds_up_to_the_result(
    script: list[Any], reason: Any, background: bool, wanted: bool
) -> None:
    shape = new_shape(background=background, include=[LOGPROBS] if wanted else [])
    events = streamed(shape, script, reason)
    response, items = accumulated(events)
    assert response == shape.result() and items == response["output"]
    require_valid(response)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created" and events[-1]["type"] in FINAL
    assert sum(event["type"] in FINAL for event in events) == 1
    assert events[-1]["type"] == f"response.{response['status']}"


@given(SCRIPTS, REASONS)
def test_text_and_calls_are_said_whole_and_in_order(script: list[Any], reason: Any) -> None:
    shape = new_shape()
    streamed(shape, script, reason)
    said: list[tuple[str, str]] = []
    for kind, first, second in script:
        if kind == "call":
            said.append((first, json.dumps(second, ensure_ascii=False)))
        elif first and said and said[-1][0] == "":
            said[-1] = ("", said[-1][1] + first)
        elif first:
            said.append(("", first))
    if not said and reason != "cancelled":
        said = [("", "")]
    output = shape.result()["output"]
    assert said == [
        ("", item["content"][0]["text"]) if item["type"] == "message" else (item["name"], item["arguments"])
        for item in output
    ]


@given(SCRIPTS, REASONS)
def test_log_probabilities_of_text_are_told_once_each(script: list[Any], reason: Any) -> None:
    shape = new_shape(include=[LOGPROBS], top_logprobs=1)
    streamed(shape, script, reason)
    pieces = [piece for piece in script if piece[0] == "text"]
    result = shape.result()["output"]
    told = [one for item in result if item["type"] == "message" for one in item["content"][0]["logprobs"]]
    if len(pieces) == len(script) and (reason != "cancelled" or result):
        assert told == chat_logprobs([token(text) for _, _, texts in pieces for text in texts])
    assert all(one["top_logprobs"][0]["token"] == "other" for one in told)


@given(SCRIPTS, REASONS, st.integers(0, 60), st.sampled_from(["incomplete", "failed", "cancelled"]))
def test_a_response_put_together_of_any_beginning_of_its_events_is_what_was_said(
    script: list[Any], reason: Any, cut: int, status: Any
) -> None:
    shape = new_shape()
    events = streamed(shape, script, reason)
    response = partial_response(events[0]["response"], events[: max(cut, 1)], status)
    require_valid(response)
    json.dumps(response)
    if cut >= len(events):
        assert response == shape.result()
        return
    _, items = accumulated(events[: max(cut, 1)])
    for item in items:
        item["status"] = "completed" if item["status"] == "completed" else "incomplete"
    assert response["output"] == items and response["status"] == status
    # It can be the history of the next request, whatever it is.
    assert responses_call({"input": "go on"}, history=response["output"])


@given(SCRIPTS, REASONS, st.integers(0, 12))
def test_a_snapshot_is_what_the_events_so_far_tell(script: list[Any], reason: Any, taken: int) -> None:
    shape = new_shape()
    said = parsed(shape.opening())
    for event in engine_events(script, reason)[:taken]:
        said += parsed(shape.add(0, event))
    snapshot = shape.snapshot("in_progress")
    require_valid(snapshot)
    assert snapshot == partial_response(said[0]["response"], said, "in_progress")
    for status in ("incomplete", "failed", "cancelled", "completed"):
        require_valid(shape.snapshot(status))
    assert shape.snapshot("in_progress") == snapshot


@given(SCRIPTS, st.integers(0, 12), st.booleans())
def test_a_response_that_is_ended_early_ends_once_with_what_was_said(
    script: list[Any], taken: int, fails: bool
) -> None:
    shape = new_shape()
    said = parsed(shape.opening()) if taken else []
    events = engine_events(script)[: max(taken - 1, 0)]
    for event in events:
        said += parsed(shape.add(0, event))
    error = EngineCrashedError("The engine ended.", "Ask again.")
    said += parsed(shape.failed(error) if fails else shape.cancelled())
    response, items = accumulated(said)
    require_valid(response)
    assert response["status"] == ("failed" if fails else "cancelled")
    assert response == shape.result() and items == response["output"]
    assert [event["sequence_number"] for event in said] == list(range(len(said)))
    assert said[0]["type"] == "response.created"
    for more in (shape.closing(), shape.cancelled(), shape.failed(error), shape.opening()):
        assert list(more) == []
    assert shape.result() == response


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineCrashedError("It ended.", "Ask again."), "server_error"),
        (OverloadedError("Full."), "rate_limit_exceeded"),
        (ImageError("No image.", "Send one."), "invalid_image"),
        (UsageError("Wrong.", "Right it."), "invalid_prompt"),
    ],
)
def test_an_error_is_told_in_the_apis_words(error: AylluError, code: str) -> None:
    shape = new_shape()
    last = parsed([*shape.opening(), *shape.failed(error)])[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": code, "message": f"{error.problem} {error.fix}"}


@pytest.mark.parametrize(
    ("reason", "status", "details", "item"),
    [
        ("stop", "completed", None, "completed"),
        ("tool_calls", "completed", None, "completed"),
        ("length", "incomplete", {"reason": "max_output_tokens"}, "incomplete"),
        ("cancelled", "cancelled", None, "incomplete"),
    ],
)
def test_why_an_answer_ended_is_its_status(reason: Any, status: str, details: Any, item: str) -> None:
    shape = new_shape()
    streamed(shape, [("text", "On", [])], reason)
    result = shape.result()
    assert (result["status"], result["incomplete_details"]) == (status, details)
    assert [one["status"] for one in result["output"]] == [item]


def test_a_run_that_broke_off_does_not_claim_to_have_reached_its_limit() -> None:
    shape = new_shape()
    created = parsed(shape.opening())[0]["response"]
    assert partial_response(created, [], "incomplete")["incomplete_details"] == {"reason": "interrupted"}


def test_the_order_of_events_is_the_documented_one() -> None:
    events = streamed(new_shape(), [("text", "Hi", []), ("call", "f", {}), ("text", "!", [])])
    text = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done",
            "content_part.done", "output_item.done"]  # fmt: skip
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
            "output_item.done"]  # fmt: skip
    names = [event["type"].removeprefix("response.") for event in events]
    assert names == ["created", "in_progress", *text, *call, *text, "completed"]


def test_a_background_response_is_queued_first() -> None:
    events = parsed(new_shape(background=True).opening())
    assert [(event["type"], event["response"]["status"]) for event in events] == [
        ("response.created", "queued"),
        ("response.queued", "queued"),
        ("response.in_progress", "in_progress"),
    ]


def test_usage_is_told_at_the_end() -> None:
    shape = new_shape()
    events = streamed(shape, [("text", "x", [])])
    assert events[0]["response"]["usage"] is None
    assert shape.result()["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 10,
    }


def test_the_request_is_echoed() -> None:
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    asked = {"instructions": "be", "max_output_tokens": 9, "max_tool_calls": 2, "metadata": {"a": "b"},
             "parallel_tool_calls": False, "previous_response_id": "resp_0", "prompt_cache_key": "k",
             "safety_identifier": "s", "temperature": 0.5, "top_p": 0.25, "user": "u", "store": True,
             "seed": 4, "top_k": 3}  # fmt: skip
    shape = new_shape(**asked, tools=None, text={"format": schema}, reasoning={"effort": "none"})
    response = shape.snapshot("in_progress")
    assert {name: response[name] for name in asked} == asked
    assert response["text"]["format"] == {**schema, "description": None, "strict": True}
    assert response["reasoning"] == {"effort": "none", "summary": None}
    plain = new_shape().snapshot("in_progress")
    assert plain["tools"] == [{**TOOL, "description": None}] and plain["tool_choice"] == "auto"
    assert (plain["temperature"], plain["top_p"], plain["metadata"]) == (1.0, 1.0, {})
    assert plain["text"]["format"] == {"type": "text"} and plain["truncation"] == "disabled"
    assert "seed" not in plain
    choice = {"type": "function", "name": "f"}
    assert new_shape(tool_choice=choice).snapshot("in_progress")["tool_choice"] == choice
    assert new_shape(tool_choice="required").snapshot("in_progress")["tool_choice"] == "required"


def test_a_result_can_be_changed_without_changing_the_next() -> None:
    shape = new_shape(metadata={"a": "b"})
    streamed(shape, [("text", "x", [])])
    first = shape.result()
    first["output"].clear()
    first["metadata"].clear()
    assert shape.result()["output"] and shape.result()["metadata"] == {"a": "b"}


@given(st.lists(SCRIPTS, min_size=1, max_size=3))
def test_a_conversation_of_several_turns_is_the_one_a_chat_would_have(scripts: list[list[Any]]) -> None:
    history: list[dict[str, Any]] = []
    messages: list[dict[str, Any]] = []
    user: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
    results: list[dict[str, Any]] = []
    for script in scripts:
        call = responses_call({"input": [*results, *user]}, history=history)
        messages += user
        chat = chat_call({"messages": messages})
        ((one,), (other,)) = call.generate.requests, chat.requests
        assert isinstance(one.prompt, ChatPrompt) and one.prompt == other.prompt
        shape = ResponseShape(call, model="m", response_id="r", created_at=0)
        # Ids of calls are made of the request's.
        collected = Collected(one)
        for event in engine_events(script):
            list(shape.add(0, event))
            collected.add(event)
        list(shape.closing())
        history += [*call.input_items, *shape.result()["output"]]
        answer = response_body(chat, [collected], model="m", created=0)["choices"][0]["message"]
        messages.append(answer)
        calls = answer.get("tool_calls", ())
        results = [{"type": "function_call_output", "call_id": made["id"], "output": "r"} for made in calls]
        messages += [{"role": "tool", "tool_call_id": made["id"], "content": "r"} for made in calls]
