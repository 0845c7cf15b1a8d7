"""Events become OpenAI's response objects, to the field; errors too."""

from __future__ import annotations

import base64
import itertools
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.chat.messages import ToolCall
from ayllu.engine.events import (
    AnswerFinished,
    Done,
    Failed,
    PromptScored,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallMade,
)
from ayllu.engine.openai.body import InvalidBodyError
from ayllu.engine.openai.requests import GenerateCall, chat_call, completion_call, embedding_call
from ayllu.engine.openai.results import NO_CHANCE, Collected, embeddings_body, error_body, response_body
from ayllu.engine.protocol import Embeddings
from ayllu.errors import (
    AccessError,
    ContextOverflowError,
    EngineCrashedError,
    OverloadedError,
    RequestFailedError,
    UnknownModelError,
)

USER = {"role": "user", "content": "hi"}


def body_of(call: GenerateCall, *events_of_requests: list[Any]) -> dict[str, Any]:
    parts = []
    for request, events in zip(call.requests, events_of_requests, strict=True):
        part = Collected(request)
        for event in events:
            part.add(event)
        assert part.finished
        parts.append(part)
    body = response_body(call, parts, model="tiny", created=1_700_000_000)
    json.dumps(body, allow_nan=False)
    return body


def said(*texts: str, index: int = 0, reason: str = "stop") -> list[Any]:
    return [
        *(TextDelta(index, text, (n,)) for n, text in enumerate(texts)),
        AnswerFinished(index, reason, len(texts)),
    ]


def test_a_chat_completion_has_the_layout_of_the_api() -> None:
    call = chat_call({"messages": [USER]})
    body = body_of(call, [Started(7, 4), *said("hel", "lo"), Done(7, 2, 4)])
    assert body == {
        "id": f"chatcmpl-{call.requests[0].id}",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 2,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


def test_several_answers_stay_apart_however_they_were_interleaved() -> None:
    call = chat_call({"messages": [USER], "n": 2})
    body = body_of(
        call,
        [
            TextDelta(1, "b1"),
            TextDelta(0, "a1"),
            TextDelta(1, "b2"),
            AnswerFinished(1, "length", 2),
            TextDelta(0, "a2"),
            AnswerFinished(0, "stop", 2, "x"),
            Done(3, 4),
        ],
    )
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in body["choices"]] == [
        (0, "a1a2", "stop"),
        (1, "b1b2", "length"),
    ]


def test_tool_calls_carry_their_arguments_as_a_string_and_ids_of_their_own() -> None:
    call = chat_call({"messages": [USER]})
    body = body_of(
        call,
        [
            ToolCallMade(0, 0, ToolCall("weather", {"city": "京都"})),
            ToolCallMade(0, 1, ToolCall("clock", {}, "call_given")),
            AnswerFinished(0, "tool_calls", 9),
            Done(3, 9),
        ],
    )
    choice = body["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    first, second = choice["message"]["tool_calls"]
    assert first["function"] == {"name": "weather", "arguments": '{"city": "京都"}'}
    assert first["type"] == "function" and first["id"].startswith("call_") and len(first["id"]) <= 40
    assert second["id"] == "call_given"


def test_text_before_a_call_is_kept() -> None:
    events = [
        TextDelta(0, "I look."),
        ToolCallMade(0, 0, ToolCall("f", {})),
        AnswerFinished(0, "tool_calls", 2),
    ]
    body = body_of(chat_call({"messages": [USER]}), [*events, Done(1, 2)])
    assert body["choices"][0]["message"]["content"] == "I look."


def scored(text: bytes, logprob: float, *others: tuple[bytes, float]) -> TokenLogprob:
    alternatives = tuple(TokenLogprob(other, value) for other, value in others)
    return TokenLogprob(text, logprob, alternatives=alternatives)


def test_chat_logprobs_have_bytes_and_alternatives() -> None:
    half = scored("日".encode()[:2], -0.5, (b"a", -0.1), (b"b", float("-inf")))
    call = chat_call({"messages": [USER], "logprobs": True, "top_logprobs": 2})
    body = body_of(call, [TextDelta(0, "", (1,), (half,)), AnswerFinished(0, "length", 1), Done(1, 1)])
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "\ufffd",
                "logprob": -0.5,
                "bytes": [0xE6, 0x97],
                "top_logprobs": [
                    {"token": "a", "logprob": -0.1, "bytes": [97]},
                    {"token": "b", "logprob": NO_CHANCE, "bytes": [98]},
                ],
            }
        ],
        "refusal": None,
    }


def test_a_text_completion_has_the_layout_of_the_api() -> None:
    call = completion_call({"prompt": ["ab", "cd"], "n": 2})
    body = body_of(
        call,
        [*said("1"), *said("2", index=1), Done(2, 2, 1)],
        [*said("3"), *said("4", index=1, reason="length"), Done(2, 2)],
    )
    assert body["object"] == "text_completion"
    assert body["id"] == f"cmpl-{call.requests[0].id}"
    assert body["choices"] == [
        {"index": 0, "text": "1", "logprobs": None, "finish_reason": "stop"},
        {"index": 1, "text": "2", "logprobs": None, "finish_reason": "stop"},
        {"index": 2, "text": "3", "logprobs": None, "finish_reason": "stop"},
        {"index": 3, "text": "4", "logprobs": None, "finish_reason": "length"},
    ]
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 4,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_completion_logprobs_name_the_token_beside_its_alternatives() -> None:
    call = completion_call({"prompt": "x", "logprobs": 1})
    tokens = (scored(b"Hi", -0.7, (b"Yo", -0.2)), scored(b"!", -0.1, (b"!", -0.1)))
    body = body_of(call, [TextDelta(0, "Hi!", (1, 2), tokens), AnswerFinished(0, "stop", 2), Done(1, 2)])
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["Hi", "!"],
        "token_logprobs": [-0.7, -0.1],
        "top_logprobs": [{"Yo": -0.2, "Hi": -0.7}, {"!": -0.1}],
        "text_offset": [0, 2],
    }


def _echo(
    prompt: object, tokens: list[TokenLogprob | None], answer: bytes, first: bytes = b"", **fields: Any
) -> dict[str, Any]:
    call = completion_call({"prompt": prompt, "echo": True, **fields})
    ids = tuple(range(10, 10 + len(tokens)))
    body = body_of(
        call,
        [
            PromptScored(ids, tuple(tokens), first),
            TextDelta(0, answer.decode(), (1,), (scored(answer, -1.0),) if "logprobs" in fields else ()),
            AnswerFinished(0, "length", 1),
            Done(len(tokens), 1),
        ],
    )
    (choice,) = body["choices"]
    return choice


def test_echo_puts_the_prompt_and_its_scores_before_the_answer() -> None:
    rest = [scored(b"lo", -0.3, (b"p", -0.2)), scored(b" you", -0.4)]
    choice = _echo("Hello you", [None, *rest], b"!", b"Hel", logprobs=1)
    assert choice["text"] == "Hello you!"
    assert choice["logprobs"]["tokens"] == ["Hel", "lo", " you", "!"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.3, -0.4, -1.0]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 3, 5, 9]
    assert "prompt_logprobs" not in choice


def test_a_token_that_begins_the_prompt_without_text_takes_no_room() -> None:
    choice = _echo("lo", [None, scored(b"lo", -0.3)], b"!", logprobs=0)
    assert choice["logprobs"]["tokens"] == ["", "lo", "!"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 2]


def test_echo_of_tokens_is_their_text() -> None:
    choice = _echo([10, 11], [None, scored(b"lo", -0.3)], b"!", b"Hel", logprobs=0)
    assert choice["text"] == "Hello!"
    assert choice["logprobs"]["tokens"] == ["Hel", "lo", "!"]
    assert choice["logprobs"]["text_offset"] == [0, 3, 5]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.3, -1.0]


def test_echo_without_scores_is_the_prompt_alone() -> None:
    call = completion_call({"prompt": "Hi", "echo": True})
    assert body_of(call, [*said("!"), Done(1, 1)])["choices"][0]["text"] == "Hi!"


def test_prompt_logprobs_have_vllms_layout() -> None:
    token = TokenLogprob(b"b", -1.0, 5, (TokenLogprob(b"a", -0.5, 4), TokenLogprob(b"b", -1.0, 5)))
    far = TokenLogprob(b"z", -9.0, 30, (TokenLogprob(b"a", -0.5, 4),))
    scores = PromptScored((1, 5, 30), (None, token, far))
    expected = [
        None,
        {
            "4": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
            "5": {"logprob": -1.0, "rank": 2, "decoded_token": "b"},
        },
        {
            "4": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
            "30": {"logprob": -9.0, "rank": None, "decoded_token": "z"},
        },
    ]
    events = [scores, *said("x"), Done(3, 1)]
    assert (
        body_of(chat_call({"messages": [USER], "prompt_logprobs": 2}), events)["prompt_logprobs"] == expected
    )
    choices = body_of(completion_call({"prompt": "x", "prompt_logprobs": 2}), events)["choices"]
    assert choices[0]["prompt_logprobs"] == expected


@given(st.text(max_size=30), st.lists(st.integers(0, 200), max_size=12))
def test_offsets_point_at_each_tokens_characters(text: str, cuts: list[int]) -> None:
    data = text.encode()
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    pieces = [data[a:b] for a, b in itertools.pairwise(places)]
    tokens = [scored(piece, -1.0) for piece in pieces]
    call = completion_call({"prompt": "x", "logprobs": 0})
    body = body_of(
        call, [TextDelta(0, text, (), tuple(tokens)), AnswerFinished(0, "stop", len(tokens)), Done(1, 1)]
    )
    logprobs = body["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(pieces)
    begin = 0
    for piece, offset, shown in zip(pieces, logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert offset == len(data[:begin].decode("utf-8", "ignore"))
        if not shown.startswith("bytes:"):
            assert text[offset:].startswith(shown)
        begin += len(piece)


def test_tokens_that_are_no_whole_characters_are_told_apart() -> None:
    call = completion_call({"prompt": "x", "logprobs": 2})
    token = scored(b"\xe6\x97", -1.0, (b"\xe6\x98", -0.5), (b"\xe6\x97", -1.0))
    body = body_of(call, [TextDelta(0, "", (1,), (token,)), AnswerFinished(0, "length", 1), Done(1, 1)])
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xe6\\x97"]
    assert logprobs["top_logprobs"] == [{"bytes:\\xe6\\x98": -0.5, "bytes:\\xe6\\x97": -1.0}]


def test_embeddings_as_numbers_and_as_base64() -> None:
    made = Embeddings(((0.5, -2.0), (1.0, 0.25)), 5)
    body = embeddings_body(embedding_call({"input": ["a", "b"]}), made, model="tiny")
    assert body == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.5, -2.0]},
            {"object": "embedding", "index": 1, "embedding": [1.0, 0.25]},
        ],
        "model": "tiny",
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }
    call = embedding_call({"input": ["a", "b"], "encoding_format": "base64"})
    packed = embeddings_body(call, made, model="tiny")["data"][1]["embedding"]
    assert struct.unpack("<2f", base64.b64decode(packed)) == (1.0, 0.25)
    with pytest.raises(RequestFailedError, match="not finite"):
        embeddings_body(call, Embeddings(((float("nan"),),), 1), model="tiny")


def test_embeddings_are_cut_to_the_dimensions_asked_for_and_have_length_one_again() -> None:
    made = Embeddings(((0.6, 0.0, 0.8), (0.0, 0.0, 1.0)), 2)

    def vectors(dimensions: int) -> list[list[float]]:
        call = embedding_call({"input": ["a", "b"], "dimensions": dimensions})
        return [item["embedding"] for item in embeddings_body(call, made, model="tiny")["data"]]

    assert vectors(3) == [[0.6, 0.0, 0.8], [0.0, 0.0, 1.0]]
    assert vectors(2) == [[1.0, 0.0], [0.0, 0.0]]
    with pytest.raises(InvalidBodyError, match=r"have 3.*Ask for 1 to 3") as caught:
        vectors(4)
    assert caught.value.param == "dimensions"


@pytest.mark.parametrize(
    ("error", "kind", "param", "code"),
    [
        (InvalidBodyError("n = 0.", "Use 1.", param="n"), "invalid_request_error", "n", "invalid_value"),
        (ContextOverflowError("Too long.", "Cut."), "invalid_request_error", None, "context_length_exceeded"),
        (UnknownModelError("No model.", "Pull."), "not_found_error", "model", "model_not_found"),
        (AccessError("No.", "Ask."), "permission_error", None, None),
        (OverloadedError("Full."), "rate_limit_error", None, "rate_limit_exceeded"),
        (EngineCrashedError("Gone.", "Again."), "server_error", None, "engine_crashed"),
        (RequestFailedError("Bad.", ""), "server_error", None, None),
    ],
)
def test_errors_have_the_layout_of_the_api(error, kind: str, param: str | None, code: str | None) -> None:
    assert error_body(error) == {
        "error": {
            "message": f"{error.problem} {error.fix}".strip(),
            "type": kind,
            "param": param,
            "code": code,
        }
    }


def test_a_failed_request_keeps_its_error() -> None:
    (request,) = chat_call({"messages": [USER]}).requests
    part = Collected(request)
    part.add(TextDelta(0, "hal"))
    part.add(Failed(RequestFailedError("Bad.", "")))
    assert part.finished and part.error is not None and part.done is None
