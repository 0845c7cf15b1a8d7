"""Streams, to the conventions: what the chunks add up to is the answer without them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx2
import pytest

from ayllu.chat.messages import ToolCall
from ayllu.engine.events import AnswerFinished, Done, Event, Started, TextDelta, TokenLogprob, ToolCallMade
from ayllu.engine.requests import GenerateRequest
from ayllu.errors import RequestFailedError
from ayllu.server import event_stream
from tests.engine.scripted_engine import prompt_text, shout
from tests.server.running import Running, events_of, running


def play(request: GenerateRequest) -> Iterable[Event]:
    """Shouts; calls tools when the prompt says so; fails half-way when told."""
    text = prompt_text(request)
    if text == "tools":
        yield Started(3, 1)
        for index in range(request.n):
            yield TextDelta(index, "Let me see. ", (1,))
            yield ToolCallMade(index, 0, ToolCall("weather", {"city": "京都"}, f"call_{index}a"))
            yield ToolCallMade(index, 1, ToolCall("time", {}, f"call_{index}b"))
            yield AnswerFinished(index, "tool_calls", 9)
        yield Done(3, 9 * request.n, 1)
        return
    if text == "fail":
        yield Started(1)
        yield TextDelta(0, "half", (1,))
        raise RequestFailedError("It broke.", "Send it again.")
    if len(text) > 1000:
        yield from (Started(len(text)), AnswerFinished(0, "length", 0), Done(len(text), 0))
        return
    if request.logprobs is not None:
        yield Started(2)
        for index in range(request.n):
            for letter in ("日".encode()[:1], "日".encode()[1:], b"x"):
                other = TokenLogprob(b"y", -2.0, 7)
                yield TextDelta(
                    index, letter.decode("utf-8", "ignore"), (5,), (TokenLogprob(letter, -0.5, 5, (other,)),)
                )
            yield AnswerFinished(index, "length", 3)
        yield Done(2, 3 * request.n)
        return
    yield from shout(request)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("streams"), script=play) as one:
        yield one


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **more}


def streamed(client: httpx2.Client, path: str, body: dict[str, Any]) -> list[Any]:
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "content-encoding" not in response.headers
        assert response.headers["x-accel-buffering"] == "no"
        return events_of(response)


def added_up(chunks: list[Any]) -> dict[int, dict[str, Any]]:
    """Choices as a client puts them together from chat chunks."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for one in chunk["choices"]:
            choice = choices.setdefault(
                one["index"], {"content": "", "calls": {}, "reason": None, "logprobs": []}
            )
            delta = one["delta"]
            choice["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                kept = choice["calls"].setdefault(call["index"], {"arguments": ""})
                kept["id"] = call.get("id") or kept["id"]
                kept["name"] = call["function"].get("name") or kept["name"]
                kept["arguments"] += call["function"].get("arguments") or ""
            choice["reason"] = one["finish_reason"] or choice["reason"]
            choice["logprobs"] += (one["logprobs"] or {}).get("content") or ()
    return choices


@pytest.mark.parametrize("text", ["hello", "tools", "日本語でお願いします", ""])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("logprobs", [False, True])
def test_chunks_add_up_to_the_answer_without_streaming(
    server: Running, text: str, n: int, logprobs: bool
) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    body = chat(text, n=n, tools=[tool]) if text == "tools" else chat(text, n=n)
    if logprobs:
        body |= {"logprobs": True, "top_logprobs": 1}
    with server.client() as client:
        whole = client.post("/v1/chat/completions", json=body).json()
        chunks = streamed(client, "/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-2])
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks[:-1]}) == 1
    assert all(chunk["choices"][0]["delta"]["role"] == "assistant" for chunk in chunks[:n])
    for index, choice in added_up(chunks[:-2]).items():
        expected = whole["choices"][index]
        assert choice["content"] == (expected["message"]["content"] or "")
        assert choice["reason"] == expected["finish_reason"]
        calls = [
            (call["function"]["name"], call["function"]["arguments"])
            for call in expected["message"].get("tool_calls", ())
        ]
        assert [(call["name"], call["arguments"]) for _, call in sorted(choice["calls"].items())] == calls
        if logprobs:
            assert choice["logprobs"] == (expected["logprobs"] or {}).get("content", [])


def test_without_include_usage_no_chunk_speaks_of_it(server: Running) -> None:
    with server.client() as client:
        chunks = streamed(client, "/v1/chat/completions", chat("hello"))
    assert all("usage" not in chunk for chunk in chunks[:-1])
    assert all(len(chunk["choices"]) == 1 for chunk in chunks[:-1])


def test_text_completions_stream_echo_and_several_prompts(server: Running) -> None:
    body = {"model": "tiny", "prompt": ["ab", "cd"], "echo": True, "n": 2}
    with server.client() as client:
        whole = client.post("/v1/completions", json=body).json()
        chunks = streamed(client, "/v1/completions", body)
    texts = ["", "", "", ""]
    for chunk in chunks[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [choice["text"] for choice in whole["choices"]] == ["abAB", "abAB", "cdCD", "cdCD"]


def test_a_failure_after_the_beginning_is_told_in_the_stream(server: Running) -> None:
    """The status has been sent; a clean end would be a lie."""
    with server.client() as client:
        chunks = streamed(client, "/v1/chat/completions", chat("fail"))
        assert chunks[-1] == "[DONE]"
        assert "It broke." in chunks[-2]["error"]["message"]
        assert not any(choice["finish_reason"] for chunk in chunks[:-2] for choice in chunk["choices"])
        assert client.post("/v1/chat/completions", json=chat("fail")).status_code == 500


def test_a_silent_stream_is_kept_alive(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "KEEP_ALIVE_S", 0.05)
    import threading

    go_on = threading.Event()

    def slow(request: GenerateRequest) -> Iterable[Event]:
        yield Started(1)
        go_on.wait(30)
        yield AnswerFinished(0, "stop", 0)
        yield Done(1, 0)

    engine = server.engines["tiny"]
    monkeypatch.setattr(engine, "_script", slow)
    with server.client() as client:
        body = chat("x", stream=True)
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            comments = 0
            for line in lines:
                comments += line.startswith(":")
                if comments == 3:
                    go_on.set()
                if line == "data: [DONE]":
                    break
    assert comments >= 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        (chat("x") | {"temprature": 1}, "temprature"),
        (chat("x") | {"best_of": 3}, "best_of"),
        (chat("x") | {"audio": {"voice": "x"}}, "audio"),
        (chat("x") | {"n": 0}, "n"),
        (chat("x") | {"n": 10_000}, "n"),
        (
            {
                "model": "tiny",
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}],
                    }
                ],
            },
            "messages.0.content.0.image_url.url",
        ),
    ],
)
def test_what_is_not_done_is_refused_by_name(server: Running, body: dict[str, Any], param: str) -> None:
    with server.client() as client:
        response = client.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"
        assert error["message"]


def test_unknown_models_are_404_and_name_the_nearest(server: Running) -> None:
    with server.client() as client:
        response = client.post("/v1/chat/completions", json=chat("x") | {"model": "tinny"})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert "tiny" in response.json()["error"]["message"]


NUMBERS = [-(2**63), -1, 0, 2**31, 2**63, 2**64, 1e308, "5", True, [], {}, [[[]]], None]
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400)
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat("x", max_tokens=2),
    "/v1/completions": {"model": "tiny", "prompt": "x"},
    "/v1/embeddings": {"model": "tiny", "input": "x"},
    "/v1/responses": {"model": "tiny", "input": "x", "store": False},
    "/v1/responses/input_tokens": {"model": "tiny", "input": "x"},
    "/v1/messages": {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "x"}]},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": [{"role": "user", "content": "x"}]},
    "/tokenize": {"model": "tiny", "prompt": "x"},
    "/detokenize": {"model": "tiny", "tokens": [1]},
    "/api/conversations": {"title": "x"},
    "/api/keys": {"name": "x"},
    "/api/users": {"name": "x"},
    "/api/pulls": {"model": "nothing-of-that-name"},
    "/api/adapters": {"name": "x", "model": "tiny", "folder": "x"},
    "/api/sign-in": {"name": "x", "password": "x"},
    "/api/sign-in/link": {"token": "x"},
}
"""A body for every address that takes one (those with ids in them have the same fields as these)."""


def _post(client: httpx2.Client, path: str, text: str) -> httpx2.Response:
    return client.post(path, content=text, headers={"content-type": "application/json"})


def test_every_field_of_every_body_at_its_extremes(server: Running) -> None:
    """Every documented field at values nobody means: refused by name or answered, never an error of ours. In
    one of five bodies the values also stand inside lists and objects, as deep as there are any."""
    with server.client(server.admin_key) as client:
        schema = client.get("/openapi.json").json()
        documented = {
            path: operation["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            for path, operation in schema["paths"].items()
            if "application/json" in operation.get("post", {}).get("requestBody", {}).get("content", {})
        }
        assert {path for path in documented if "{" not in path} == set(GOOD)
        tried = 0
        for path, body in GOOD.items():
            fields = schema["components"]["schemas"][documented[path].rsplit("/", 1)[1]]["properties"]
            for name in fields:
                if name == "background":
                    continue
                values = [json.dumps(value) for value in NUMBERS]
                values += [json.dumps([value]) for value in NUMBERS]
                values += [json.dumps([0] * 100_000), json.dumps({"a" * n: n for n in range(300)})]
                for value in (*values, *RAW, f"[{RAW[0]}]"):
                    text = json.dumps(body | {name: "@"}).replace('"@"', value)
                    response = _post(client, path, text)
                    assert response.status_code < 500 or response.status_code == 501, (path, name, value[:80])
                    if value in RAW:
                        assert response.status_code in (400, 429), (path, name, value)
                    tried += 1
        print(f"{tried} bodies")
        for place in (
            {"messages": [{"role": "user", "content": "@"}]},
            {"messages": [{"role": "@", "content": "x"}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "@"}]}]},
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "@"}}]}]},
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": "@"}}]},
            {"tools": [{"type": "function", "function": "@"}]},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": "@"}}},
            {"structured_outputs": {"regex": "@"}},
            {"structured_outputs": {"choice": ["@"]}},
            {"logit_bias": {"5": "@"}},
            {"logit_bias": {"-1": 1}},
            {"stream_options": {"include_usage": "@"}},
            {"stop": ["@"]},
        ):
            for value in (*map(json.dumps, NUMBERS), *RAW):
                text = json.dumps(GOOD["/v1/chat/completions"] | place).replace('"@"', value)
                assert _post(client, "/v1/chat/completions", text).status_code in (200, 400), (place, value)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"a":1,"a":2}',
        b"{" * 200_000,
        b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"model":"\\ud800"}',
        b"{" + b'"x":1,' * 2_100_000 + b'"y":1}',
    ],
)
def test_bodies_that_are_no_json_are_refused(server: Running, raw: bytes) -> None:
    with server.client() as client:
        response = client.post(
            "/v1/chat/completions", content=raw, headers={"content-type": "application/json"}
        )
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_large_bodies_and_other_kinds_are_refused(server: Running) -> None:
    with server.client() as client:
        large = client.post(
            "/v1/chat/completions", content=b" " * (33 << 20), headers={"content-type": "application/json"}
        )
        assert large.status_code == 413
        form = client.post("/v1/chat/completions", data={"model": "tiny"})
        assert form.status_code == 400
        packed = client.post(
            "/v1/chat/completions",
            content=b"x",
            headers={"content-encoding": "gzip", "content-type": "application/json"},
        )
        assert packed.status_code == 400
        assert client.get("/v1/models", headers={"x-big": "a" * 20_000}).status_code == 431
        assert client.get("/v1/models", headers={f"x-{n}": "a" for n in range(200)}).status_code == 431
