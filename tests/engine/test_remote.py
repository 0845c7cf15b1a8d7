"""The remote engine against a scripted server: what it says, and what that becomes."""

from __future__ import annotations

from typing import Any

import pytest

from ayllu.chat.messages import ToolDefinition
from ayllu.engine.events import AnswerFinished, Done, Failed, Started, TextDelta, TokenLogprob, ToolCallMade
from ayllu.engine.requests import ChoiceStructure, JsonStructure, TextPrompt, TokenPrompt, ToolUse
from ayllu.errors import RemoteEngineError, RequestFailedError
from tests.engine.remote_server import (
    DONE,
    HELLO,
    Fault,
    answer,
    ask,
    asked_once,
    chunk,
    error_of,
    event,
    remote_engine,
    remote_server,
    usage,
)

KEY = "sk-very-secret-0123456789"


def test_a_streamed_answer_becomes_events_and_counts() -> None:
    with remote_server(answer(*HELLO)) as server, remote_engine(server.base, api_key=KEY) as engine:
        assert ask(engine, max_new_tokens=9) == [
            Started(0, 0),
            TextDelta(0, "Hel"),
            TextDelta(0, "lo"),
            AnswerFinished(0, "stop", 2),
            Done(7, 2, 3),
        ]
        stats = engine.stats()
        assert (stats.finished, stats.failed, stats.running, stats.waiting) == (1, 0, 0, 0)
        assert (stats.prompt_tokens, stats.new_tokens, stats.cached_prompt_tokens) == (7, 2, 3)
    asked = server.asked[0]
    assert asked.path == "/v1/chat/completions"
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert asked.body == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "hello"}],
        "n": 1,
        "max_tokens": 9,
        "temperature": 0.6,
        "top_p": 0.9,
    }


def test_text_and_token_prompts_go_to_the_completions_path() -> None:
    pieces = (event(choices=[{"index": 0, "text": " yes", "finish_reason": "length"}]), DONE)
    with remote_server(answer(*pieces)) as server, remote_engine(server.base + "/v1/") as engine:
        assert ask(engine, prompt=TokenPrompt((5, 6)), max_new_tokens=1) == [
            Started(2, 0),
            TextDelta(0, " yes"),
            AnswerFinished(0, "length", 1),
            Done(2, 1, 0),
        ]
        ask(engine, prompt=TextPrompt("so"), max_new_tokens=1)
    assert [asked.path for asked in server.asked] == ["/v1/completions"] * 2
    assert [asked.body["prompt"] for asked in server.asked] == [[5, 6], "so"]


def test_several_answers_arrive_interleaved_and_are_counted_apart() -> None:
    counted = {"prompt_tokens": 4, "total_tokens": 6}
    with_counts = [
        event(
            choices=[{"index": index, "delta": {"content": text}, "finish_reason": finish}],
            usage={**counted, "completion_tokens": new},
        )
        for index, text, new, finish in [
            (1, "b", 1, None),
            (0, "a", 1, None),
            (1, "b", 2, "stop"),
            (0, "a", 3, "length"),
        ]
    ]
    script = answer(*with_counts, usage(4, 5), DONE)
    assert asked_once(script, request={"n": 2}, dialect="vllm") == [
        Started(4, 0),
        TextDelta(1, "b"),
        TextDelta(0, "a"),
        TextDelta(1, "b"),
        AnswerFinished(1, "stop", 2),
        TextDelta(0, "a"),
        AnswerFinished(0, "length", 3),
        Done(4, 5, 0),
    ]


def test_llama_cpp_counts_each_answer_after_its_end_and_tells_the_prompt_first() -> None:
    script = answer(
        event(choices=[{"index": 0, "delta": {"content": None}}], prompt_progress={"total": 9, "cache": 4}),
        chunk("b", index=1),
        chunk(index=1, finish="stop"),
        usage(9, 1, 4),
        chunk("a"),
        event(
            choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}],
            __verbose={"stopping_word": "END"},
        ),
        usage(9, 6, 4),
        DONE,
    )
    assert asked_once(script, request={"n": 2, "stop": ("END",)}, dialect="llama.cpp") == [
        Started(9, 4),
        TextDelta(1, "b"),
        AnswerFinished(1, "stop", 1),
        TextDelta(0, "a"),
        AnswerFinished(0, "stop", 6, "END"),
        Done(9, 7, 4),
    ]


@pytest.mark.parametrize("field", ["stop_reason", "matched_stop"])
def test_the_stop_string_is_reported_by_servers_that_tell_it(field: str) -> None:
    script = answer(chunk("a"), chunk(finish="stop", **{field: "END"}), DONE)
    assert AnswerFinished(0, "stop", 1, "END") in asked_once(script, request={"stop": ("END",)})
    assert AnswerFinished(0, "stop", 1) in asked_once(
        answer(chunk("a"), chunk(finish="stop", **{field: 2}), DONE)
    )


def test_logprobs_are_read_in_both_shapes() -> None:
    chat = {
        "content": [
            {
                "token": "é",
                "bytes": [195, 169],
                "logprob": -0.5,
                "id": 7,
                "top_logprobs": [
                    {"token": "x", "bytes": None, "logprob": -1.0},
                    {"token": "é", "bytes": [195, 169], "logprob": -0.5},
                    {"token": "y", "bytes": None, "logprob": None},
                ],
            }
        ]
    }
    events = asked_once(
        answer(chunk("é", logprobs=chat), chunk(finish="stop"), DONE), request={"logprobs": 2}
    )
    best = (TokenLogprob("é".encode(), -0.5), TokenLogprob(b"x", -1.0))
    assert events[1] == TextDelta(0, "é", (7,), (TokenLogprob("é".encode(), -0.5, 7, best),))
    older = {
        "tokens": ["a", "bytes:\\xe2\\x82"],
        "token_logprobs": [-1, 1e-9],
        "top_logprobs": [{"a": -1, "b": -0.5}, None],
    }
    piece = event(choices=[{"index": 0, "text": "a", "logprobs": older, "finish_reason": "stop"}])
    request = {"logprobs": 5, "prompt": TextPrompt("x"), "max_new_tokens": 2}
    first, second = asked_once(answer(piece, DONE), request=request)[1].logprobs  # type: ignore[union-attr]
    assert first == TokenLogprob(b"a", -1.0, None, (TokenLogprob(b"b", -0.5), TokenLogprob(b"a", -1.0)))
    assert second == TokenLogprob(b"\xe2\x82", 0.0)


def test_tokens_are_counted_by_what_is_seen_where_the_server_does_not_count() -> None:
    two = {"content": [{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": -1.0}]}
    pieces = (chunk("ab", logprobs=two), chunk("c", logprobs={"content": two["content"][:1]}))
    events = asked_once(answer(*pieces, chunk(finish="stop"), DONE), request={"logprobs": 0})
    assert events[-2:] == [AnswerFinished(0, "stop", 3), Done(0, 3, 0)]
    tokens = event(choices=[{"index": 0, "text": "ab", "token_ids": [4, 5], "finish_reason": "stop"}])
    request = {"prompt": TokenPrompt((1, 2, 3)), "max_new_tokens": 2}
    assert asked_once(answer(tokens, usage(0, 2), DONE), request=request) == [
        Started(3, 0),
        TextDelta(0, "ab", (4, 5)),
        AnswerFinished(0, "stop", 2),
        Done(3, 2, 0),
    ]


def test_logprobs_that_were_asked_for_and_never_came_are_an_error() -> None:
    assert isinstance(error_of(asked_once(answer(*HELLO), request={"logprobs": 0})), RequestFailedError)


@pytest.mark.parametrize(
    ("structure", "text", "fails"),
    [
        (JsonStructure({"type": "integer"}), "7", False),
        (JsonStructure({"type": "integer"}), "seven", True),
        (JsonStructure({"type": "integer"}), '"7"', True),
        (ChoiceStructure(("yes", "no")), "no", False),
        (ChoiceStructure(("yes", "no")), "nope", True),
    ],
)
def test_a_server_that_ignored_the_structure_is_found_out(structure: Any, text: str, fails: bool) -> None:
    script = answer(chunk(text[:1]), chunk(text[1:]), chunk(finish="stop"), DONE)
    last = asked_once(script, request={"structure": structure}, dialect="vllm")[-1]
    assert isinstance(last, Failed if fails else Done)
    cut = answer(chunk(text), chunk(finish="length"), DONE)
    assert isinstance(asked_once(cut, request={"structure": structure}, dialect="vllm")[-1], Done)


def tool_piece(
    index: int, arguments: str | None = None, name: str | None = None, call_id: str | None = None
) -> bytes:
    function = {"name": name, "arguments": arguments}
    return chunk(delta_tool_calls=[{"index": index, "id": call_id, "function": function}])


TOOLS = ToolUse((ToolDefinition("look"), ToolDefinition("go")))


def test_tool_calls_are_put_together_from_their_pieces() -> None:
    script = answer(
        chunk("I look."),
        tool_piece(0, "", "look", "a1"),
        tool_piece(0, '{"at": '),
        tool_piece(1, None, "go", "b2"),
        tool_piece(0, '"sun"}'),
        chunk(finish="tool_calls"),
        usage(5, 9),
        DONE,
    )
    events = asked_once(script, request={"tool_use": TOOLS})
    calls = [event for event in events if isinstance(event, ToolCallMade)]
    assert [
        (call.index, call.call_index, call.call.name, call.call.arguments, call.call.id) for call in calls
    ] == [
        (0, 0, "look", {"at": "sun"}, "a1"),
        (0, 1, "go", {}, "b2"),
    ]
    assert events[-2:] == [AnswerFinished(0, "tool_calls", 9), Done(5, 9, 0)]


def test_only_the_first_call_is_kept_where_one_was_allowed() -> None:
    script = answer(tool_piece(0, "{}", "look"), tool_piece(1, "{}", "go"), chunk(finish="stop"), DONE)
    use = ToolUse(TOOLS.tools, parallel=False)
    events = asked_once(script, request={"tool_use": use})
    assert [event.call.name for event in events if isinstance(event, ToolCallMade)] == ["look"]
    assert events[-2].reason == "tool_calls"  # type: ignore[union-attr]


def test_arguments_without_end_are_refused_before_they_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ayllu.engine.remote.calls.MAX_ARGUMENT_CHARACTERS", 100)
    script = answer(*(tool_piece(0, "0123456789", "look") for _ in range(20)), Fault.SILENCE)
    error = error_of(asked_once(script, request={"tool_use": TOOLS}))
    assert isinstance(error, RemoteEngineError) and "100 characters" in error.problem


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", '{"a": NaN}', '"x"', "{" * 5000])
def test_arguments_that_are_no_json_object_fail_the_request(arguments: str) -> None:
    script = answer(tool_piece(0, arguments, "look"), chunk(finish="tool_calls"), DONE)
    error = error_of(asked_once(script, request={"tool_use": TOOLS}))
    assert isinstance(error, RequestFailedError)
    assert "look" in error.problem and len(str(error)) < 400


def test_a_call_cut_by_the_limit_is_no_call_but_those_before_it_are() -> None:
    script = answer(tool_piece(0, "{}", "look"), tool_piece(1, '{"a', "go"), chunk(finish="length"), DONE)
    events = asked_once(script, request={"tool_use": TOOLS})
    assert [event.call.name for event in events if isinstance(event, ToolCallMade)] == ["look"]
    assert events[-2].reason == "length"  # type: ignore[union-attr]


def test_a_demanded_call_that_does_not_come_is_an_error() -> None:
    use = ToolUse(TOOLS.tools, choice="go")
    assert "tool call" in error_of(asked_once(answer(*HELLO), request={"tool_use": use})).problem


def test_the_older_function_call_is_understood() -> None:
    script = answer(
        chunk(delta_function_call={"name": "go", "arguments": '{"x":'}),
        chunk(delta_function_call={"arguments": "1}"}),
        chunk(finish="function_call"),
        DONE,
    )
    events = asked_once(script, request={"tool_use": TOOLS})
    assert [event.call.arguments for event in events if isinstance(event, ToolCallMade)] == [{"x": 1}]


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ((chunk("a"), chunk(finish="content_filter")), "content filter"),
        ((chunk("a"), chunk(finish="abort")), "abort"),
        ((chunk(delta_refusal="I will not."), chunk(finish="stop")), "I will not"),
        ((chunk("a"), event(error={"message": "CUDA died", "code": 500})), "CUDA died"),
        ((chunk("a"), b'event: error\ndata: {"error": "oh"}\n\n'), "oh"),
        ((chunk("a"), b"event: error\ndata: it broke\n\n"), "it broke"),
        ((event(object="error", message="old style", code=400),), "old style"),
    ],
)
def test_an_answer_that_did_not_end_as_it_should_is_an_error(pieces: tuple[bytes, ...], words: str) -> None:
    error = error_of(asked_once(answer(*pieces, DONE)))
    assert isinstance(error, RequestFailedError)
    assert words in error.problem


@pytest.mark.parametrize(
    "piece",
    [
        b"data: {nonsense\n\n",
        b"data: [1, 2]\n\n",
        b"data: " + b"[" * 9000 + b"\n\n",
        event(id="no choices"),
        event(choices={}),
        event(choices=[7]),
        chunk("a", index=1),
        chunk("a", index=-1),
        event(choices=[{"index": True, "delta": {}}]),
        event(choices=[{"index": 0, "delta": {"content": 5}}]),
        event(choices=[{"index": 0, "delta": [1]}]),
        chunk(delta_tool_calls="x"),
        chunk(delta_tool_calls=[{"index": 10**9}]),
        chunk(delta_tool_calls=[{"index": 0, "function": {"arguments": 5}}]),
        event(choices=[], usage={"prompt_tokens": -1}),
        event(choices=[], usage={"prompt_tokens": "many"}),
        chunk("a", logprobs={"content": [{"token": 1}]}),
        chunk("a", logprobs={"tokens": ["a"], "token_logprobs": []}),
        chunk("a", logprobs={"content": [{"token": "a", "bytes": [999], "logprob": -1}]}),
        b"data: " + b"x" * 4096 + b"\n\n",
    ],
)
def test_nonsense_in_a_stream_is_a_typed_error(piece: bytes) -> None:
    error = error_of(
        asked_once(answer(chunk("a"), piece, DONE), request={"logprobs": 1}, max_event_bytes=2048)
    )
    assert isinstance(error, RemoteEngineError)
    assert len(str(error)) < 500


def test_an_answer_that_goes_on_after_its_end_is_an_error() -> None:
    assert isinstance(error_of(asked_once(answer(*HELLO[:3], chunk("more"), DONE))), RequestFailedError)


def test_remarks_without_content_are_passed_over() -> None:
    filters = event(choices=[], prompt_filter_results=[{}])
    remark = event(choices=[{"index": 0, "finish_reason": None, "content_filter_results": {}}])
    events = asked_once(answer(filters, b": ping\n\n", *HELLO[:3], remark, *HELLO[3:]))
    assert events[-1] == Done(7, 2, 3)
