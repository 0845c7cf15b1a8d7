"""A message while it comes and at its end: what its events add up to, by the API's rules, is the result."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu import errors
from ayllu.chat.messages import ToolCall
from ayllu.engine.events import AnswerFinished, Done, Event, Started, TextDelta, ToolCallMade
from ayllu.server.anthropic.bodies import messages_call
from ayllu.server.anthropic.shape import MessagesShape, error_body, status_of
from ayllu.server.shapes import ServerEvent

Script = list[Any]
MESSAGES = [{"role": "user", "content": "hi"}]


def new_shape(*, stream: bool = True, limit: int = 7) -> MessagesShape:
    call = messages_call({"model": "m", "max_tokens": limit, "messages": MESSAGES, "stream": stream})
    return MessagesShape(call, model="tiny", message_id="msg_1")


def parsed(said: Iterable[ServerEvent]) -> list[dict[str, Any]]:
    events = []
    for one in said:
        event = json.loads(one.data)
        assert one.name == event["type"]
        events.append(event)
    return events


def engine_events(script: Script, reason: Any = "stop", stop: str | None = None) -> list[Event]:
    """A string is text, a dictionary the arguments of a call."""
    events: list[Event] = [Started(9, 4)]
    calls = 0
    for step in script:
        if isinstance(step, str):
            events.append(TextDelta(0, step))
        else:
            events.append(ToolCallMade(0, calls, ToolCall("f", step)))
            calls += 1
    return [*events, AnswerFinished(0, reason, 7, stop), Done(9, 7, 4)]


def streamed(shape: MessagesShape, events: Iterable[Event]) -> list[dict[str, Any]]:
    said = [*shape.opening()]
    for event in events:
        said += shape.add(0, event)
    return parsed([*said, *shape.closing()])


def accumulated(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message as the API's documentation puts it together, each event held to where it may stand."""
    message: dict[str, Any] | None = None
    open_index: int | None = None
    written = ""
    ended = False
    for event in events:
        assert not ended
        name = event["type"]
        if name == "message_start":
            assert message is None
            message = copy.deepcopy(event["message"])
            assert message["content"] == [] and message["stop_reason"] is None
            continue
        assert message is not None
        content = message["content"]
        match name:
            case "ping":
                pass
            case "content_block_start":
                assert open_index is None and event["index"] == len(content)
                open_index, written = event["index"], ""
                content.append(copy.deepcopy(event["content_block"]))
                assert content[-1].get("text", "") == "" and content[-1].get("input", {}) == {}
            case "content_block_delta":
                assert event["index"] == open_index
                delta = event["delta"]
                if delta["type"] == "text_delta":
                    assert delta["text"]
                    content[open_index]["text"] += delta["text"]
                else:
                    assert delta["type"] == "input_json_delta"
                    written += delta["partial_json"]
            case "content_block_stop":
                assert event["index"] == open_index
                if content[open_index]["type"] == "tool_use" and written:
                    content[open_index]["input"] = json.loads(written)
                open_index = None
            case "message_delta":
                assert open_index is None
                message |= event["delta"]
                message["usage"] |= event["usage"]
            case "message_stop":
                ended = True
            case _:
                raise AssertionError(name)
    assert ended and message is not None
    return message


VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=2)
ARGUMENTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=3)
SCRIPTS = st.lists(st.text(max_size=5) | ARGUMENTS, max_size=8)
REASONS = st.sampled_from(["stop", "length", "tool_calls", "cancelled"])


@given(SCRIPTS, REASONS, st.none() | st.text(min_size=1, max_size=3))
def test_what_the_events_add_up_to_is_the_result(script, reason, stop):
    shape = new_shape()
    made = accumulated(streamed(shape, engine_events(script, reason, stop)))
    assert made == shape.result()
    silent = new_shape(stream=False)
    assert streamed(silent, engine_events(script, reason, stop)) == []
    said = silent.result()
    for one, other in zip(said["content"], made["content"], strict=True):
        assert {**one, "id": None} == {**other, "id": None}
    assert {**said, "content": None} == {**made, "content": None}


@given(st.text(max_size=12), st.data())
def test_text_is_the_same_however_it_is_split(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    made = accumulated(streamed(new_shape(), engine_events([*pieces])))
    assert made["content"] == ([{"type": "text", "text": text}] if text else [])


def test_text_and_calls_are_blocks_in_the_order_they_were_made():
    shape = new_shape()
    events = streamed(shape, engine_events(["a", "b", {"x": 1}, {}, "", "c"], "tool_calls"))
    content = shape.result()["content"]
    assert [block["type"] for block in content] == ["text", "tool_use", "tool_use", "text"]
    assert (content[0]["text"], content[1]["input"], content[2]["input"]) == ("ab", {"x": 1}, {})
    assert content[1]["id"] != content[2]["id"] and content[1]["id"].startswith("toolu_")
    starts = [event["index"] for event in events if event["type"] == "content_block_start"]
    assert starts == [0, 1, 2, 3]


def test_answer_of_calls_alone_has_no_text():
    shape = new_shape()
    assert accumulated(streamed(shape, engine_events(["", {"x": 1}, ""], "tool_calls"))) == shape.result()
    (block,) = shape.result()["content"]
    assert block["type"] == "tool_use"


def test_id_that_the_engine_gave_a_call_is_kept():
    shape = new_shape()
    list(shape.add(0, ToolCallMade(0, 0, ToolCall("f", {}, "call_9"))))
    assert shape.result()["content"][0]["id"] == "call_9"


def test_stream_begins_when_the_prompt_is_being_read():
    shape = new_shape()
    assert list(shape.opening()) == []
    first, ping = parsed(shape.add(0, Started(9, 4)))
    assert (first["type"], ping) == ("message_start", {"type": "ping"})
    assert first["message"]["usage"] == {
        "input_tokens": 5,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 0,
    }
    assert list(shape.add(0, Started(9, 4))) == []


@pytest.mark.parametrize("script", [[], ["a"], [{}]])
def test_stream_of_an_engine_that_says_no_beginning_is_whole(script):
    shape = new_shape()
    made = accumulated(streamed(shape, engine_events(script)[1:]))
    assert made == shape.result() and made["usage"]["input_tokens"] == 5


@pytest.mark.parametrize(
    ("script", "reason", "stop", "limit", "wanted"),
    [
        (["a"], "stop", None, 7, ("end_turn", None)),
        (["a"], "stop", "END", 7, ("stop_sequence", "END")),
        (["a"], "length", None, 7, ("max_tokens", None)),
        (["a"], "length", None, 8, ("model_context_window_exceeded", None)),
        ([{}], "tool_calls", None, 7, ("tool_use", None)),
        ([{}], "stop", None, 7, ("tool_use", None)),
        ([{}], "length", None, 7, ("max_tokens", None)),
        (["a"], "cancelled", None, 7, ("cancelled", None)),
    ],
)
def test_reason_of_the_end_is_told(script, reason, stop, limit, wanted):
    shape = new_shape(limit=limit)
    events = streamed(shape, engine_events(script, reason, stop))
    (delta,) = [event for event in events if event["type"] == "message_delta"]
    assert (delta["delta"]["stop_reason"], delta["delta"]["stop_sequence"]) == wanted
    assert (shape.result()["stop_reason"], shape.result()["stop_sequence"]) == wanted


def test_result_has_the_layout_of_a_message():
    shape = new_shape(stream=False)
    for event in engine_events(["hi"]):
        shape.add(0, event)
    assert shape.result() == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "hi"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 5,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": 7,
        },
    }


def test_message_without_a_given_id_has_that_of_its_request():
    call = messages_call({"model": "m", "max_tokens": 1, "messages": MESSAGES})
    assert MessagesShape(call, model="m").result()["id"] == f"msg_{call.requests[0].id}"


def test_error_ends_a_stream_as_an_event_of_its_own():
    shape = new_shape()
    list(shape.add(0, TextDelta(0, "a")))
    (event,) = shape.failed(errors.EngineCrashedError("It ended.", "Ask again."))
    assert event.name == "error"
    assert json.loads(event.data) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "It ended. Ask again."},
    }


@pytest.mark.parametrize(
    ("kind", "status", "name"),
    [
        (errors.UsageError, 400, "invalid_request_error"),
        (errors.ContextOverflowError, 400, "invalid_request_error"),
        (errors.TemplateError, 400, "invalid_request_error"),
        (errors.SignInError, 401, "authentication_error"),
        (errors.ForbiddenError, 403, "permission_error"),
        (errors.NotFoundError, 404, "not_found_error"),
        (errors.UnknownModelError, 404, "not_found_error"),
        (errors.ConflictError, 409, "invalid_request_error"),
        (errors.TooLargeError, 413, "request_too_large"),
        (errors.OverloadedError, 429, "rate_limit_error"),
        (errors.RequestFailedError, 500, "api_error"),
        (errors.RemoteEngineError, 500, "api_error"),
        (errors.NoSpaceError, 500, "api_error"),
        (errors.EngineUnavailableError, 529, "overloaded_error"),
        (errors.EngineCrashedError, 529, "overloaded_error"),
    ],
)
def test_error_has_the_status_and_type_that_clients_know(kind, status, name):
    error = kind("Wrong.", "Right.")
    assert status_of(error) == status
    assert error_body(error) == {"type": "error", "error": {"type": name, "message": "Wrong. Right."}}
