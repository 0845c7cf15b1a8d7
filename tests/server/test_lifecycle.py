"""Clients that leave, readers that crawl, engines that die, floods, and an orderly end: who pays for what."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ayllu.engine.native import NativeEngine, open_engine
from ayllu.engine.options import EngineOptions
from tests.engine.toy_engine import open_toy, toy_folder
from tests.server.running import Running, events_of, running, wait_until


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Iterator[Running]:
    """SmolLM2 on the native runner, without a prefix cache, so that every block comes back."""
    with running(
        tmp_path_factory.mktemp("real"),
        opener=open_engine,
        models=[("smollm2", smollm2_gguf)],
        options=lambda _: EngineOptions(slots=8, context=1024, prefix_cache=False, threads=1),
    ) as one:
        yield one


def engine_of(server: Running) -> NativeEngine:
    engine: Any = next(iter(server.services.models.engines().values()))
    return engine


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


def raw_request(server: Running, body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {server.user_key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def connect(server: Running) -> socket.socket:
    port = int(server.url.rsplit(":", 1)[1])
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def drop(connection: socket.socket, *, reset: bool) -> None:
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def blocks(server: Running) -> dict[str, int]:
    return engine_of(server).stats().blocks_free


def settled(server: Running) -> None:
    wait_until(lambda: (lambda s: s.running == 0 and s.waiting == 0)(engine_of(server).stats()))


def test_clients_that_leave_at_any_moment_leave_nothing_behind(real: Running) -> None:
    """R5: before the body, queued, in the prompt, after the first token, in the middle; streamed or not; by
    FIN or RST. Afterwards exactly as many blocks are free, nothing is open, and the limits are as before."""
    settled(real)
    before = blocks(real)
    generator = real.services.generator
    rng = random.Random(5)
    for number in range(300):
        body = chat(
            "Tell me a long story. " * rng.choice((1, 1, 30)), max_tokens=400, n=rng.choice((1, 1, 3))
        )
        body["stream"] = rng.random() < 0.6
        wire = raw_request(real, body)
        connection = connect(real)
        phase = number % 5
        if phase == 0:
            connection.sendall(wire[: rng.randrange(len(wire))])
        else:
            connection.sendall(wire)
        if phase >= 2 and body["stream"]:
            connection.recv(64 if phase == 2 else 4096)
        elif phase == 3:
            time.sleep(rng.random() * 0.02)
        drop(connection, reset=rng.random() < 0.5)
    wait_until(lambda: not generator.open)
    settled(real)
    assert blocks(real) == before
    assert real.services.models.listed()[0].open_requests == 0
    with real.client() as client:
        answer = client.post("/v1/chat/completions", json=chat("Say hi.", max_tokens=5, temperature=0))
        assert answer.status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_lost_client_ends_the_work_within_two_steps(tmp_path: Path, stream: bool) -> None:
    """Steps of the toy are slow enough to count."""
    folder = toy_folder(tmp_path / "toy", step_s=0.05)
    with running(tmp_path, opener=lambda path, *a, **k: open_toy(path), models=[("toy", folder)]) as server:
        connection = connect(server)
        connection.sendall(raw_request(server, chat("hello", max_tokens=900, stream=stream)))
        wait_until(lambda: engine_of(server).stats().running == 1)
        time.sleep(0.2)
        drop(connection, reset=True)
        wait_until(lambda: not server.services.generator.open)
        told = engine_of(server).stats().steps
        wait_until(lambda: engine_of(server).stats().running == 0)
        assert engine_of(server).stats().steps - told <= 3  # two, and the one under way


def test_an_engine_that_dies_is_seen_in_every_stream_and_comes_back(tmp_path: Path) -> None:
    """R2: at 50 moments. A stream that ends cleanly would pass half an answer for a whole one."""
    folder = toy_folder(tmp_path / "toy", step_s=0.002)
    rng = random.Random(7)
    with running(tmp_path, opener=lambda path, *a, **k: open_toy(path), models=[("toy", folder)]) as server:
        engine = engine_of(server)
        for _ in range(50):
            wait_until(lambda: engine.status == "ready")
            ended: list[list[Any]] = []

            def read(ended: list[list[Any]] = ended) -> None:
                with (
                    server.client() as client,
                    client.stream(
                        "POST", "/v1/chat/completions", json=chat("hello", max_tokens=900, stream=True)
                    ) as response,
                ):
                    ended.append(events_of(response))

            readers = [threading.Thread(target=read) for _ in range(3)]
            for reader in readers:
                reader.start()
            wait_until(lambda: engine.stats().running == 3)
            time.sleep(rng.random() * 0.05)
            process = engine.process_id
            assert process is not None
            os.kill(process, signal.SIGKILL)
            killed = time.monotonic()
            for reader in readers:
                reader.join(60)
            assert time.monotonic() - killed < 30
            assert len(ended) == 3
            for said in ended:
                assert said[-1] == "[DONE]"
                assert said[-2]["error"]["code"] == "engine_crashed"
                assert not any(c["finish_reason"] for chunk in said[:-2] for c in chunk["choices"])
        wait_until(lambda: engine.status == "ready")
        with server.client("") as client:
            assert client.get("/health").status_code == 200
        with server.client() as client:
            answer = client.post("/v1/chat/completions", json=chat("hello", max_tokens=3)).json()
            assert answer["choices"][0]["message"]["content"] == "w0 w1 w2 "


def test_a_dead_engine_shows_in_health_at_once(tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "toy")
    with running(tmp_path, opener=lambda path, *a, **k: open_toy(path), models=[("toy", folder)]) as server:
        engine = engine_of(server)
        assert engine.process_id is not None
        os.kill(engine.process_id, signal.SIGSTOP)
        os.kill(engine.process_id, signal.SIGKILL)
        with server.client("") as client:
            wait_until(lambda: client.get("/health").status_code == 503 or engine.stats().restarts > 0)
            wait_until(lambda: client.get("/health").status_code == 200)


def test_slow_readers_take_nothing_from_a_normal_one(tmp_path: Path) -> None:
    """R7: 64 clients that read nothing; the answer of another comes whole, and theirs wait within bounds."""
    folder = toy_folder(tmp_path / "toy", step_s=0.001)
    with running(
        tmp_path,
        opener=lambda path, *a, **k: open_toy(path, EngineOptions(slots=80, context=1024)),
        models=[("toy", folder)],
        concurrent_requests=100,
    ) as server:
        slow = [connect(server) for _ in range(64)]
        for connection in slow:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(raw_request(server, chat("hello", max_tokens=900, stream=True)))
        with (
            server.client() as client,
            client.stream(
                "POST", "/v1/chat/completions", json=chat("hello", max_tokens=500, stream=True)
            ) as response,
        ):
            said = events_of(response)
        text = "".join(
            choice["delta"].get("content") or "" for chunk in said[:-1] for choice in chunk["choices"]
        )
        assert text == "".join(f"w{number} " for number in range(500))
        for connection in slow:
            drop(connection, reset=True)
        wait_until(lambda: not server.services.generator.open)


def test_a_flood_is_refused_politely_and_work_goes_on(tmp_path: Path) -> None:
    """R6, in short: ten times what fits. Refusals are 429 with Retry-After and nothing else; what was taken
    is finished. The long form with figures is benchmarks/server_load.py."""
    folder = toy_folder(tmp_path / "toy", step_s=0.002)
    with running(
        tmp_path,
        opener=lambda path, *a, **k: open_toy(path, EngineOptions(slots=4, context=1024)),
        models=[("toy", folder)],
        queue_requests=8,
        concurrent_requests=100,
        requests_per_minute=100_000,
    ) as server:
        statuses: list[tuple[int, str | None]] = []
        lock = threading.Lock()

        def ask() -> None:
            with server.client() as client:
                for _ in range(5):
                    response = client.post("/v1/chat/completions", json=chat("hello", max_tokens=20))
                    with lock:
                        statuses.append((response.status_code, response.headers.get("retry-after")))
                    if response.status_code == 429:
                        assert response.json()["error"]["type"] == "rate_limit_error"

        threads = [threading.Thread(target=ask) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(statuses) == 200
        assert {status for status, _ in statuses} == {200, 429}
        assert all(
            after is not None and after.isdecimal() and int(after) >= 1
            for status, after in statuses
            if status == 429
        )
        with server.client() as client:
            assert client.post("/v1/chat/completions", json=chat("hello", max_tokens=3)).status_code == 200


def test_stopping_finishes_what_is_open_and_refuses_what_is_new(tmp_path: Path) -> None:
    """R4: 503 with Retry-After for the new, a whole answer for the old, an error for what takes too long."""
    folder = toy_folder(tmp_path / "toy", step_s=0.01)
    with running(
        tmp_path,
        opener=lambda path, *a, **k: open_toy(path),
        models=[("toy", folder)],
        stop_timeout_s=3.0,
    ) as server:
        answers: dict[str, list[Any]] = {}

        def read(name: str, tokens: int) -> None:
            with (
                server.client() as client,
                client.stream(
                    "POST", "/v1/chat/completions", json=chat("hello", max_tokens=tokens, stream=True)
                ) as response,
            ):
                answers[name] = events_of(response)

        readers = [
            threading.Thread(target=read, args=("short", 50)),
            threading.Thread(target=read, args=("long", 1000)),
        ]
        for reader in readers:
            reader.start()
        wait_until(lambda: engine_of(server).stats().running == 2)
        with server.client() as client:
            client.get("/health")
            server.loop.call_soon_threadsafe(server.server.stop)
            wait_until(lambda: server.services.stopping)
            refused = client.post("/v1/chat/completions", json=chat("hello"))
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert client.get("/health").status_code == 503
        for reader in readers:
            reader.join(60)
        assert answers["short"][-2]["choices"][0]["finish_reason"] == "length"
        assert "stopped" in answers["long"][-2]["error"]["message"]


def test_slow_and_endless_headers_hold_no_connection(real: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from ayllu.server import http_protocol

    monkeypatch.setattr(http_protocol, "HEADER_TIMEOUT_S", 0.3)
    with connect(real) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx-slow: ")
        assert connection.recv(100) == b""
    with connect(real) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx-long: " + b"a" * 17_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 431")
        with contextlib.suppress(ConnectionError):
            while connection.recv(1000):
                pass


def test_one_bad_request_costs_nobody_else_anything(real: Running) -> None:
    """R1: seven answers under way while an eighth is refused in every way there is; they are what they are
    alone."""
    asked = [chat(f"Count from {number}.", max_tokens=40, temperature=0) for number in range(7)]
    with real.client() as client:
        alone = [client.post("/v1/chat/completions", json=body).json()["choices"] for body in asked]
    together: list[Any] = [None] * 7

    def ask(number: int) -> None:
        with real.client() as client:
            together[number] = client.post("/v1/chat/completions", json=asked[number]).json()["choices"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(7)]
    for thread in threads:
        thread.start()
    bad: list[dict[str, Any]] = [
        chat("x" * 20_000, max_tokens=5),
        chat(
            "x",
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}},
            },
        ),
        chat("x", structured_outputs={"regex": "(" * 500}),
        chat("x", logit_bias={"99999999": 5}),
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
                }
            ]
        },
        chat("x", model="nothing"),
    ]
    with real.client() as client:
        for body in bad:
            assert client.post("/v1/chat/completions", json=body).status_code in (400, 404), body
    for thread in threads:
        thread.join(120)
    assert together == alone


def test_nothing_piles_up_over_many_requests_of_all_kinds(real: Running) -> None:
    """R19 in short: tasks, threads, files and blocks are what they were. The long form, with memory over half
    an hour, is benchmarks/server_load.py soak."""

    async def tasks() -> int:
        return len(asyncio.all_tasks())

    def everything() -> tuple[int, int, dict[str, int]]:
        settled(real)
        return real.call(tasks()), sum(1 for _ in Path("/proc/self/fd").iterdir()), blocks(real)

    def round_of(client: Any) -> None:
        client.post("/v1/chat/completions", json=chat("Hi.", max_tokens=3))
        client.post("/v1/chat/completions", json=chat("Hi.", max_tokens=3, stream=True))
        client.post("/v1/chat/completions", json=chat("Hi.", n=-1))
        client.post("/v1/responses", json={"input": "Hi.", "max_output_tokens": 3})
        client.post("/v1/messages", json={"max_tokens": 3, **chat("Hi.")})
        client.post("/v1/responses", json={"input": "Hi.", "max_output_tokens": 3, "background": True})
        client.get("/v1/models")
        with connect(real) as connection:
            connection.sendall(raw_request(real, chat("Tell me a story.", max_tokens=300, stream=True)))
            connection.recv(100)

    with real.client() as client:
        for _ in range(5):
            round_of(client)
        wait_until(lambda: real.services.runs.open == 0)
        before = everything()
        for _ in range(40):
            round_of(client)
        wait_until(lambda: real.services.runs.open == 0)
        wait_until(lambda: everything()[0] <= before[0] + 1)
        after = everything()
    assert after[2] == before[2]
    assert after[1] <= before[1] + 2
