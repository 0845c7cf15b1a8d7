"""The whole of it on SmolLM2 and a small embedding model: what only real weights can show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ayllu.engine.native import open_engine
from ayllu.engine.options import EngineOptions
from ayllu.weights.checkpoint import open_checkpoint
from tests.engine.small_adapters import write_adapter
from tests.server.running import Running, running


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path, minilm_folder: Path
) -> Iterator[Running]:
    with running(
        tmp_path_factory.mktemp("real"),
        opener=open_engine,
        models=[("smollm2", smollm2_gguf), ("minilm", minilm_folder)],
        options=lambda _: EngineOptions(slots=4, context=1024, threads=1),
    ) as one:
        yield one


ASKED = {"messages": [{"role": "user", "content": "What is the capital of Japan?"}], "temperature": 0}


def test_an_adapter_is_registered_asked_by_name_and_forgotten(server: Running, smollm2_gguf: Path) -> None:
    folder = server.services.settings.data / "adapters" / "legal"
    write_adapter(folder, open_checkpoint(smollm2_gguf).config, seed=3)
    with server.client(server.admin_key) as client:
        body = ASKED | {"max_tokens": 12}
        plain = client.post("/v1/chat/completions", json=body | {"model": "smollm2"}).json()
        for wrong in ({"folder": "../legal"}, {"folder": "nothing"}, {"model": "nothing"}, {"name": "a/b"}):
            asked = {"name": "legal", "model": "smollm2", "folder": "legal"} | wrong
            assert client.post("/api/adapters", json=asked).status_code in (400, 404), wrong
        made = client.post("/api/adapters", json={"name": "legal", "model": "smollm2", "folder": "legal"})
        assert made.status_code == 201
        assert "legal" in [one["id"] for one in client.get("/v1/models").json()["data"]]
        adapted = client.post("/v1/chat/completions", json=body | {"model": "legal"}).json()
        assert adapted["model"] == "legal"
        assert adapted["choices"][0]["message"] != plain["choices"][0]["message"]
        assert client.delete("/api/adapters/legal").status_code == 200
        assert client.post("/v1/chat/completions", json=body | {"model": "legal"}).status_code == 404


def test_one_context_holds_for_models_that_take_less(server: Running) -> None:
    """1,024 was asked for; the encoder takes 256 and must load all the same."""
    with server.client() as client:
        made = client.post(
            "/v1/embeddings", json={"model": "minilm", "input": ["京都", "Kyoto"], "dimensions": 8}
        )
        assert [len(one["embedding"]) for one in made.json()["data"]] == [8, 8]
        known = {one["id"]: one["max_model_len"] for one in client.get("/v1/models").json()["data"]}
        assert known["smollm2"] == 1024
        refused = client.post("/v1/chat/completions", json=ASKED | {"model": "minilm"})
        assert refused.status_code == 400


def test_the_conversations_prefix_is_found_again(server: Running) -> None:
    """Complaint 7: a prompt that only grows is computed once. Another user's is not used."""
    turns = [{"role": "user", "content": "Tell me about the mountains of Peru. " * 8}]
    with server.client() as client:
        first = client.post("/v1/chat/completions", json={"messages": turns, "max_tokens": 8}).json()
        said = first["choices"][0]["message"]["content"]
        turns += [{"role": "assistant", "content": said}, {"role": "user", "content": "And the lakes?"}]
        second = client.post("/v1/chat/completions", json={"messages": turns, "max_tokens": 2}).json()
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64
    with server.client(server.admin_key) as other:
        again = other.post("/v1/chat/completions", json={"messages": turns, "max_tokens": 2}).json()
        # Nothing but the beginning that the admin's own requests share.
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] < 32


def test_what_does_not_fit_is_refused_with_the_numbers(server: Running) -> None:
    with server.client() as client:
        long = client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "word " * 3000}]}
        )
        assert long.status_code == 400
        error = long.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "1024" in error["message"]


def test_tokens_are_counted_alike_in_every_dialect(server: Running) -> None:
    with server.client() as client:
        body = {"model": "smollm2", "messages": ASKED["messages"]}
        told = client.post("/v1/chat/completions", json=body | {"max_tokens": 1}).json()["usage"]
        assert told["prompt_tokens"] == client.post("/tokenize", json=body).json()["count"]
        counted = client.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
        assert counted == told["prompt_tokens"]
        asked = {"model": "smollm2", "input": ASKED["messages"]}
        assert client.post("/v1/responses/input_tokens", json=asked).json()["input_tokens"] == counted
        tokens = client.post("/tokenize", json={"model": "smollm2", "prompt": "日本語のテキスト"}).json()[
            "tokens"
        ]
        text = client.post("/detokenize", json={"model": "smollm2", "tokens": tokens}).json()["prompt"]
        assert text == "日本語のテキスト"
