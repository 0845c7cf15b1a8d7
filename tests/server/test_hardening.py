"""What one request could do to others, or to the truth: each of these was once possible."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from ayllu.engine.events import AnswerFinished, Done, Event, Failed, Started, TextDelta
from ayllu.engine.openai.requests import chat_call
from ayllu.engine.protocol import Embeddings
from ayllu.engine.requests import EmbedRequest, GenerateRequest
from ayllu.errors import EngineUnavailableError
from ayllu.server import event_stream, http_protocol
from ayllu.server.event_stream import EventStream
from ayllu.server.generation import Generation
from ayllu.server.runs import MOST_RUNS_OF_A_USER
from ayllu.server.shapes import ServerEvent
from ayllu.server.state import runs, users
from tests.engine.scripted_engine import ScriptedEngine, prompt_text
from tests.server.running import Running, events_of, running, wait_until

GATE = threading.Event()
PASSWORD_HASH = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQxMjM0NTY3OA$" + "A" * 43


def play(request: GenerateRequest) -> Iterable[Event]:
    """'wait' says a word and waits; 'long' says 5,000 words; anything else is said back."""
    text = prompt_text(request)
    yield Started(5)
    if text == "wait":
        yield TextDelta(0, "one ", (1,))
        GATE.wait(60)
    for number in range(5000 if text == "long" else 1):
        yield TextDelta(0, f"{text} ", (number,))
    yield AnswerFinished(0, "stop", 1)
    yield Done(5, 1)


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("hardening")
    with running(folder, script=play, requests_per_minute=100_000, concurrent_requests=1000) as one:
        yield one


@contextmanager
def one_writes(server: Running) -> Iterator[None]:
    """While somebody's long transaction holds the turn to write."""
    began, release = threading.Event(), threading.Event()

    def write(db: Any) -> None:
        began.set()
        release.wait(60)

    thread = threading.Thread(target=server.database.now, args=(write,))
    thread.start()
    began.wait(60)
    try:
        yield
    finally:
        release.set()
        thread.join()


def test_the_form_of_a_sign_in_link_is_sent_with_its_origin(server: Running) -> None:
    """By the Fetch standard a page of `no-referrer` sends its forms with `Origin: null`: refused."""
    with server.client("") as client:
        assert client.get("/sign-in?token=x").headers["referrer-policy"] == "same-origin"


@pytest.mark.parametrize("path", ["responses", "conversation"])
def test_what_looks_things_up_holds_up_nobody(server: Running, path: str) -> None:
    """Small bodies are read in the event loop: not those for which the database is asked."""
    with server.client() as client, server.client() as other, ThreadPoolExecutor() as threads:
        before = client.post("/v1/responses", json={"input": "hello"}).json()["id"]
        conversation = client.post("/api/conversations", json={}).json()["id"]
        asked = {
            "responses": ("/v1/responses", {"input": "x", "previous_response_id": before}),
            "conversation": (f"/api/conversations/{conversation}/runs", {"content": "x"}),
        }[path]
        with one_writes(server):
            answer = threads.submit(client.post, asked[0], json=asked[1])
            time.sleep(0.3)
            assert other.get("/version").status_code == 200
        assert answer.result().is_success


def test_a_run_ends_though_its_conversation_is_gone(server: Running) -> None:
    GATE.clear()
    with server.client() as client:
        conversation = client.post("/api/conversations", json={}).json()["id"]
        made = client.post(f"/api/conversations/{conversation}/runs", json={"content": "wait"}).json()
        wait_until(lambda: "one" in json.dumps(client.get(f"/api/runs/{made['run_id']}").json()["output"]))
        client.delete(f"/api/conversations/{conversation}")
        GATE.set()
        with client.stream("GET", f"/api/runs/{made['run_id']}/events") as response:
            assert events_of(response)[-1]["type"] == "response.completed"  # type: ignore[index]
        wait_until(lambda: server.services.runs.open == 0)
        assert client.get(f"/api/runs/{made['run_id']}").json()["status"] == "completed"


def test_cancelling_a_run_that_is_being_stored_waits_for_its_end(server: Running) -> None:
    GATE.clear()
    with server.client() as client, ThreadPoolExecutor() as threads:
        made = client.post("/v1/responses", json={"input": "wait", "background": True}).json()
        wait_until(lambda: bool(client.get(f"/v1/responses/{made['id']}").json()["output"]))
        live = server.services.runs._live[made["id"]]
        with one_writes(server):
            GATE.set()
            wait_until(lambda: live.closing.is_set())
            cancelled = threads.submit(client.post, f"/v1/responses/{made['id']}/cancel")
            time.sleep(0.2)
            assert not cancelled.done()
        assert cancelled.result().json()["status"] == "completed"


def test_what_a_killed_server_had_said_is_in_the_conversation(tmp_path: Path) -> None:
    GATE.clear()
    with running(tmp_path, script=play) as server, server.client() as client:
        conversation = client.post("/api/conversations", json={}).json()["id"]
        made = client.post(f"/api/conversations/{conversation}/runs", json={"content": "wait"}).json()

        def stored() -> int:
            return server.database.now(lambda db: runs.get(db, made["run_id"], server.user.id)).events

        wait_until(lambda: stored() >= 6)
        # As after a kill: the next server finds the run under way.
        for _ in range(2):
            server.call(server.services.runs.recover())
        kept = client.get(f"/api/conversations/{conversation}").json()["messages"]
        assert [(one["role"], one["content"][0]["text"]) for one in kept] == [
            ("user", "wait"),
            ("assistant", "one "),
        ]
        GATE.set()


def test_many_runs_at_once_find_no_more_room_than_one_after_another(server: Running) -> None:
    GATE.set()

    def ask(_: int) -> int:
        with server.client() as own:
            return own.post("/v1/responses", json={"input": "wait", "background": True}).status_code

    with ThreadPoolExecutor(MOST_RUNS_OF_A_USER + 8) as threads:
        with one_writes(server):
            asked = [threads.submit(ask, number) for number in range(MOST_RUNS_OF_A_USER + 8)]
            wait_until(lambda: sum(one.done() for one in asked) >= 8)
            assert {one.result() for one in asked if one.done()} == {409}
            assert server.services.runs.open == MOST_RUNS_OF_A_USER
        assert sorted(one.result() for one in asked) == [200] * MOST_RUNS_OF_A_USER + [409] * 8
    wait_until(lambda: server.services.runs.open == 0)


@in_a_loop
async def test_a_reader_who_stops_while_nothing_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keep-alive is what does not get through then; that must not be the end of all watching."""
    monkeypatch.setattr(event_stream, "KEEP_ALIVE_S", 0.04)
    monkeypatch.setattr(event_stream, "STALL_S", 0.1)
    closed = False

    async def events() -> Any:
        nonlocal closed
        try:
            yield [ServerEvent("1")]
            await asyncio.sleep(3600)
        finally:
            closed = True

    async def send(message: Any) -> None:
        if b"keep-alive" in message.get("body", b""):
            await asyncio.sleep(3600)

    async def receive() -> Any:
        await asyncio.sleep(3600)

    await asyncio.wait_for(EventStream(events())({}, receive, send), 30)
    assert closed


def test_who_reads_nothing_is_cut_off(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a finished answer nor a closing connection may wait for ever to be read."""
    monkeypatch.setattr(http_protocol, "UNREAD_TIMEOUT_S", 0.3)
    connections = server.server.server_state.connections
    port = int(server.url.rsplit(":", 1)[1])
    before = len(connections)
    idle = []
    for end in ("keep-alive", "close"):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", port))
        request = f"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: {end}\r\n\r\n"
        one.sendall(request.encode() * (8 if end == "keep-alive" else 1))
        idle.append(one)
    wait_until(lambda: len(connections) > before)
    wait_until(lambda: len(connections) <= before)
    for one in idle:
        one.close()


def test_an_error_of_ours_is_counted_and_answered_as_one(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(server.services.models, "listed", broken)
    with server.client() as client:
        answer = client.get("/v1/models", headers={"x-request-id": "mine"})
        assert answer.status_code == 500
        assert answer.headers["x-request-id"] == "mine"
        assert answer.headers["x-content-type-options"] == "nosniff"
    with server.client(server.admin_key) as client:
        lines = client.get("/metrics").text.splitlines()
    assert any("/v1/models" in line and '"500"' in line for line in lines)
    assert not any("/v1/models" in line and '"499"' in line for line in lines)


@pytest.mark.parametrize("origin", ["http://[", "null", "http://", "://", "http://[::1"])
def test_origins_that_are_none_are_refused(server: Running, origin: str) -> None:
    with server.client() as client:
        assert client.post("/v1/responses", json={}, headers={"origin": origin}).status_code == 403


def test_behind_a_proxy_its_own_pages_and_its_visitors_are_told_apart(tmp_path: Path) -> None:
    """The proxy may ask by another name, and everybody comes from its address."""
    own = {"origin": "https://ayllu.example.com"}
    wrong = {"name": "someone", "password": "wrong"}
    with (
        running(tmp_path, script=play, public_url="https://ayllu.example.com/") as server,
        server.client("") as client,
    ):
        for _ in range(12):
            headers = {**own, "x-forwarded-for": "192.0.2.9, 198.51.100.1"}
            last = client.post("/api/sign-in", json={**wrong, "name": "nobody"}, headers=headers)
        assert last.status_code == 429
        headers = {**own, "x-forwarded-for": "198.51.100.1, 203.0.113.5"}
        assert client.post("/api/sign-in", json=wrong, headers=headers).status_code == 401
        assert (
            client.post("/api/sign-in", json=wrong, headers={"origin": "https://x.test"}).status_code == 403
        )


def test_many_wrong_passwords_at_once_are_no_more_than_one_after_another(tmp_path: Path) -> None:
    with running(tmp_path, script=play) as server, ThreadPoolExecutor(40) as threads:
        server.database.now(lambda db: users.update(db, server.user.id, password_hash=PASSWORD_HASH))

        def try_one(number: int) -> int:
            with server.client("") as client:
                return client.post("/api/sign-in", json={"name": "someone", "password": "x"}).status_code

        answers = list(threads.map(try_one, range(40)))
    assert answers.count(401) == 10
    assert answers.count(429) == 30


def test_a_client_that_leaves_within_its_body_is_no_error_of_ours(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    for path, kind in (
        ("/v1/chat/completions", "application/json"),
        ("/v1/files", "multipart/form-data; boundary=x"),
    ):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(
                f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {server.user_key}\r\n"
                f"content-type: {kind}\r\ncontent-length: 100\r\n\r\n{{".encode()
            )
            time.sleep(0.1)
    with server.client() as client:
        client.get("/version")
    time.sleep(0.3)
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


def test_embeddings_that_take_long_hold_up_no_answers(tmp_path: Path) -> None:
    started, release = threading.Semaphore(0), threading.Event()

    class Embedding(ScriptedEngine):
        def embed(self, request: EmbedRequest) -> Embeddings:
            started.release()
            release.wait(60)
            return Embeddings(((1.0,),), 1)

    with (
        running(tmp_path, opener=lambda *_, **__: Embedding(play, slots=8)) as server,
        ThreadPoolExecutor(16) as threads,
    ):

        def embed(_: int) -> int:
            with server.client() as client:
                return client.post("/v1/embeddings", json={"input": "x"}).status_code

        asked = [threads.submit(embed, number) for number in range(12)]
        for _ in range(12):
            assert started.acquire(timeout=60)
        with server.client() as client:
            chat = {"messages": [{"role": "user", "content": "hello"}]}
            assert client.post("/v1/chat/completions", json=chat).status_code == 200
        release.set()
        assert {one.result() for one in asked} == {200}


def generation(**more: Any) -> Generation:
    call = chat_call({"messages": [{"role": "user", "content": "x"}], **more})

    class Watch:
        def event(self, event: Event) -> None:
            pass

    return Generation(call, [Watch()])  # type: ignore[list-item]


@in_a_loop
async def test_what_was_said_before_a_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    one = generation()
    say = one.receiver(0)
    say(TextDelta(0, "a", (1,)))
    say(TextDelta(0, "b", (2,)))
    say(Failed(EngineUnavailableError("It died.", "Again.")))
    told = []
    with pytest.raises(EngineUnavailableError):
        async for batch in one.batches():
            told += batch
    assert told == [(0, TextDelta(0, "ab", (1, 2)))]


@in_a_loop
async def test_a_late_wake_up_with_nothing_to_tell_tells_nothing() -> None:
    one = generation()
    say = one.receiver(0)
    told: list[Any] = []

    async def read() -> None:
        told.extend([batch async for batch in one.batches()])

    reading = asyncio.create_task(read())
    await asyncio.sleep(0)
    one._wake()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not reading.done()
    say(Done(1, 1))
    await reading
    assert told == [[(0, Done(1, 1))]]


@in_a_loop
async def test_a_slow_readers_text_is_joined_in_time_that_grows_with_it() -> None:
    def seconds(pieces: int) -> float:
        one = generation()
        say = one.receiver(0)
        for number in range(pieces):
            say(TextDelta(0, "word " * 8, (number, number)))
        started = time.perf_counter()
        (taken,) = one._take()
        assert isinstance(taken[1], TextDelta)
        assert len(taken[1].token_ids) == 2 * pieces
        return time.perf_counter() - started

    few, many = (min(seconds(count) for _ in range(3)) for count in (2_000, 32_000))
    assert many < 60 * few  # 16 times as much; squared it would be 256 times


def spent(server: Running) -> float:
    account = server.services.limiter._accounts["user", server.user.id]
    return account.tokens.spent(time.monotonic())


def test_leaving_before_the_end_of_an_answer_without_a_limit_is_charged(tmp_path: Path) -> None:
    def endless(request: GenerateRequest) -> Iterable[Event]:
        yield Started(5)
        for number in range(100_000):
            yield TextDelta(0, "word ", (number,))
            if number > 5000:
                time.sleep(0.01)

    with running(tmp_path, script=endless) as server, server.client() as client:
        chat = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=chat) as response:
            read = 0
            for line in response.iter_lines():
                read += line.count("word")
                if read >= 4000:
                    break
        wait_until(lambda: server.services.limiter.held == 0)
        assert spent(server) > 3900


def test_what_the_engine_refuses_costs_no_tokens(tmp_path: Path) -> None:
    class Full(ScriptedEngine):
        def submit(self, *_: Any, **__: Any) -> Any:
            raise EngineUnavailableError("No.", "Later.")

    with running(tmp_path, opener=lambda *_, **__: Full(play)) as server, server.client() as client:
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 10_000}
        assert client.post("/v1/chat/completions", json=chat).status_code == 503
        assert spent(server) < 1


def test_counting_a_long_text_takes_room_in_the_queue(tmp_path: Path) -> None:
    with running(tmp_path, script=play, queue_tokens=1000) as server, server.client() as client:
        long = "word " * 2000
        assert client.post("/tokenize", json={"prompt": long}).status_code == 400
        messages = [{"role": "user", "content": long}]
        counted = client.post("/v1/messages/count_tokens", json={"model": "tiny", "messages": messages})
        assert counted.status_code == 400
        assert "queue_tokens" in counted.text
        assert server.services.limiter.held == 0


@pytest.mark.parametrize("path", ["responses", "conversation"])
def test_a_run_that_is_refused_is_not_stored(tmp_path: Path, path: str) -> None:
    with running(tmp_path, script=play, requests_per_minute=1) as server, server.client() as client:
        conversation = client.post("/api/conversations", json={}).json()["id"]
        url, body = {
            "responses": ("/v1/responses", {"input": "x", "background": True}),
            "conversation": (f"/api/conversations/{conversation}/runs", {"content": "x"}),
        }[path]
        assert client.post(url, json=body).is_success
        refused = client.post(url, json=body)
        assert refused.status_code == 429
        assert "retry-after" in refused.headers
        assert len(client.get("/api/runs").json()["runs"]) == 1
        wait_until(lambda: server.services.limiter.held == 0)
        assert server.services.limiter.held_tokens == 0


def test_a_key_revokes_itself_and_no_other(tmp_path: Path) -> None:
    """A key that leaked must not be able to end the work of all others."""
    with running(tmp_path, load=False) as server:
        lost, other = server.new_key(server.user), server.new_key(server.user)
        with server.client(lost) as client:
            ids = {one["prefix"]: one["id"] for one in client.get("/api/keys").json()["keys"]}
            of = {
                key: next(i for prefix, i in ids.items() if key.startswith(prefix)) for key in (lost, other)
            }
            assert client.delete(f"/api/keys/{of[other]}").status_code == 403
            assert client.delete(f"/api/keys/{of[lost]}").status_code == 200
            assert client.get("/v1/models").status_code == 401
        with server.client(other) as client:
            assert client.get("/v1/models").status_code == 200


def test_a_hundred_thousand_wrong_messages_are_refused_at_the_first(tmp_path: Path) -> None:
    """Looking through all of them held everybody up for seconds."""
    with running(tmp_path) as server, server.client() as client:
        for path, more in (
            ("/v1/chat/completions", {}),
            ("/v1/messages", {"model": "tiny", "max_tokens": 1}),
        ):
            refused = client.post(path, json={"messages": [{}] * 90_000, **more})
            assert refused.status_code == 400
            assert refused.json()["error"]["message"].startswith("messages.0.")
