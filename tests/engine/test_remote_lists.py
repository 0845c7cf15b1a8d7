"""What a remote server says in one piece: vectors, its list of models, and adapters coming and going."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from ayllu.chat.messages import user_message
from ayllu.engine.remote.endpoint import RemoteEndpoint
from ayllu.engine.remote.engine import RemoteEngine
from ayllu.engine.requests import ChatPrompt, EmbedRequest, GenerateRequest
from ayllu.errors import (
    AylluError,
    EngineUnavailableError,
    OverloadedError,
    RemoteEngineError,
    UnknownModelError,
    UnsupportedError,
    UsageError,
)
from tests.engine.remote_server import (
    HANG_GUARD_S,
    Fault,
    RemoteServer,
    Scripted,
    answer,
    chunk,
    remote_server,
    wait_until,
)

JSON = {"Content-Type": "application/json"}
PROMPT = ChatPrompt((user_message("x"),))


def said(value: Any) -> Scripted:
    return Scripted((json.dumps(value).encode(),), 200, JSON)


def engine_at(server: RemoteServer, **settings: Any) -> RemoteEngine:
    settings = {"model": "m", "backoff_s": 0.01, **settings}
    return RemoteEngine(RemoteEndpoint(base_url=server.base, **settings))


def vectors(*entries: tuple[int, list[Any]]) -> Scripted:
    data = [{"index": index, "embedding": embedding} for index, embedding in entries]
    return said({"data": data, "usage": {"prompt_tokens": 5}})


def embedded(scripted: Scripted, dialect: Any = "llama.cpp", **request: Any) -> Any:
    with remote_server(scripted) as server:
        engine = engine_at(server, dialect=dialect)
        try:
            found = engine.embed(EmbedRequest(**{"inputs": ("a", "b"), **request}))
        finally:
            engine.close()
        return found, server.asked[0]


def test_vectors_come_in_the_order_of_the_inputs_and_of_unit_length() -> None:
    found, asked = embedded(vectors((1, [0, 2]), (0, [3.0, 4.0])))
    assert found.vectors == ((0.6, 0.8), (0.0, 1.0))
    assert found.prompt_tokens == 5
    assert asked.path == "/v1/embeddings"
    assert asked.body == {"model": "m", "input": ["a", "b"], "encoding_format": "float"}


def test_vectors_as_the_model_made_them_are_only_to_be_had_where_servers_tell_them() -> None:
    found, asked = embedded(vectors((0, [3.0]), (1, [0.5])), normalise=False)
    assert found.vectors == ((3.0,), (0.5,))
    assert asked.body["embd_normalize"] == -1
    with pytest.raises(UnsupportedError, match="normalise"):
        embedded(vectors(), "vllm", normalise=False)
    with pytest.raises(UnsupportedError, match="mixed"):
        embedded(vectors(), "openai", inputs=("a", (1, 2)))


@pytest.mark.parametrize(
    "scripted",
    [
        vectors((0, [1.0])),
        vectors((0, [1.0]), (0, [1.0])),
        vectors((0, [1.0]), (7, [1.0])),
        vectors((0, [1.0]), (1, [1.0, 2.0])),
        vectors((0, [1.0]), (1, [])),
        vectors((0, [1.0]), (1, ["x"])),
        vectors((0, [1.0]), (1, [math.nan])),
        vectors((0, [1.0]), (1, [True])),
        said({"data": "x"}),
        said([]),
        Scripted((b"not json",), 200, JSON),
    ],
)
def test_vectors_that_are_none_are_a_typed_error(scripted: Scripted) -> None:
    with pytest.raises(RemoteEngineError, match="OpenAI-compatible"):
        embedded(scripted)


def test_embeddings_are_tried_again_and_counted() -> None:
    with remote_server(Scripted.error(503), vectors((0, [1.0])), answer(Fault.CUT)) as server:
        engine = engine_at(server)
        engine.embed(EmbedRequest(inputs=("a",)))
        with pytest.raises(RemoteEngineError) as raised:
            engine.embed(EmbedRequest(inputs=("a",)))
        # What the HTTP library raised held the request, and with it the key.
        assert (raised.value.__cause__, raised.value.__context__) == (None, None)
        assert len(server.asked) == 5
        stats = engine.stats()
        assert (stats.finished, stats.failed, stats.prompt_tokens, stats.running) == (1, 1, 5, 0)
        engine.close()
        with pytest.raises(EngineUnavailableError):
            engine.embed(EmbedRequest(inputs=("a",)))


def test_closing_ends_a_waiting_embedding() -> None:
    failures: list[AylluError] = []
    with remote_server(Scripted((Fault.SILENCE,), 200, JSON)) as server:
        engine = engine_at(server, max_open=1)

        def embed() -> None:
            try:
                engine.embed(EmbedRequest(inputs=("a",)))
            except AylluError as error:
                failures.append(error)

        thread = threading.Thread(target=embed)
        thread.start()
        wait_until(lambda: server.asked)
        with pytest.raises(OverloadedError):
            engine.submit(GenerateRequest(prompt=PROMPT))
        engine.close()
        thread.join(HANG_GUARD_S)
    assert [type(failure) for failure in failures] == [EngineUnavailableError]


@pytest.mark.parametrize(
    ("listing", "context", "reads_images"),
    [
        ({"data": [{"id": "x", "max_model_len": 9}, {"id": "m", "max_model_len": 4096}]}, 4096, True),
        (
            {
                "data": [
                    {
                        "id": "some.gguf",
                        "meta": {"n_ctx": 2048, "n_ctx_train": 8192},
                        "architecture": {"input_modalities": ["text"]},
                    }
                ]
            },
            2048,
            False,
        ),
        ({"data": [{"id": "m", "meta": {"n_ctx_train": 8192}}]}, 8192, True),
        ({"data": [{"id": "a", "max_model_len": 9}, {"id": "b", "max_model_len": 9}]}, None, True),
        ({"data": [{"id": "m", "max_model_len": "many"}]}, None, True),
        ({"data": [7]}, None, True),
        ([], None, True),
    ],
)
def test_the_context_is_what_the_server_tells(listing: Any, context: int | None, reads_images: bool) -> None:
    with remote_server(said(listing)) as server:
        engine = engine_at(server)
        info = engine.info
        assert (info.model, info.context, info.reads_images) == ("m", context, reads_images)
        assert engine.info is info
        assert [asked.path for asked in server.asked] == ["/v1/models"]
        engine.close()


def test_a_server_without_a_list_is_not_asked_twice_but_one_that_was_down_is() -> None:
    with remote_server(Scripted.error(404)) as server:
        engine = engine_at(server)
        assert engine.info.context is None
        assert engine.info.context is None
        assert len(server.asked) == 1
        engine.close()
    with remote_server(Scripted.error(503), said({"data": [{"id": "m", "max_model_len": 5}]})) as server:
        engine = engine_at(server)
        assert engine.info.context is None
        assert engine.info.context == 5
        engine.close()


def test_adapters_come_and_go_on_vllm() -> None:
    listing = {"data": [{"id": "base", "parent": None}, {"id": "poet", "parent": "base"}]}
    done = Scripted((b"Success",), 200, {"Content-Type": "text/plain"})
    script = (done, said(listing), answer(chunk("a"), Fault.SILENCE), done)
    with remote_server(*script) as server:
        engine = engine_at(server, dialect="vllm")
        engine.load_adapter("poet", Path("/adapters/poet"))
        assert engine.adapters() == ("poet",)
        stream = engine.submit(GenerateRequest(prompt=PROMPT, adapter="poet"))
        next(iter(stream))
        unloading = threading.Thread(target=engine.unload_adapter, args=("poet",))
        unloading.start()
        wait_until(lambda: engine._leaving)
        with pytest.raises(UnknownModelError):
            engine.submit(GenerateRequest(prompt=PROMPT, adapter="poet"))
        assert unloading.is_alive()
        stream.cancel()
        unloading.join(HANG_GUARD_S)
        engine.close()
    assert server.asked[0].path == "/v1/load_lora_adapter"
    assert server.asked[0].body == {"lora_name": "poet", "lora_path": "/adapters/poet"}
    assert server.asked[-1].path == "/v1/unload_lora_adapter"
    assert server.asked[2].body["model"] == "poet"


def test_adapter_refusals_are_typed() -> None:
    with remote_server(Scripted.error(404, "Not Found"), Scripted.error(400, "already loaded")) as server:
        engine = engine_at(server, dialect="vllm")
        with pytest.raises(UnknownModelError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            engine.load_adapter("poet", Path("/adapters/poet"))
        with pytest.raises(UsageError, match="already loaded"):
            engine.load_adapter("poet", Path("/adapters/poet"))
        engine.close()
        other = engine_at(server)
        assert other.adapters() == ()
        for change in (lambda: other.load_adapter("a", Path("a")), lambda: other.unload_adapter("a")):
            with pytest.raises(UnsupportedError):
                change()
        other.close()
