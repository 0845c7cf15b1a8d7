"""Answers that belong to the server: left, resumed, cancelled, and found again after a restart."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from ayllu.chat.messages import ToolCall
from ayllu.engine.events import AnswerFinished, Done, Event, Started, TextDelta, ToolCallMade
from ayllu.engine.requests import ChatPrompt, GenerateRequest
from ayllu.errors import RequestFailedError
from ayllu.server.state import runs as stored
from tests.engine.scripted_engine import prompt_text
from tests.server.running import Running, events_of, running, wait_until

GATES: dict[str, threading.Event] = {}


def play(request: GenerateRequest) -> Iterable[Event]:
    """'gate NAME' says two words and waits; 'fail' fails; 'tool' calls; else the question."""
    text = prompt_text(request)
    yield Started(5, 2)
    if text.startswith("gate"):
        yield TextDelta(0, "one ", (1,))
        yield TextDelta(0, "two ", (2,))
        GATES[text].wait(60)
        yield TextDelta(0, "three", (3,))
    elif text == "fail":
        yield TextDelta(0, "half", (1,))
        raise RequestFailedError("It broke.", "Send it again.")
    elif text == "tool":
        yield ToolCallMade(0, 0, ToolCall("look", {"q": "x"}, "call_1"))
        yield AnswerFinished(0, "tool_calls", 4)
        yield Done(5, 4, 2)
        return
    else:
        assert isinstance(request.prompt, ChatPrompt)
        said = " | ".join(f"{one.role}:{one.text}" for one in request.prompt.messages)
        for word in said.split(" "):
            yield TextDelta(0, word + " ", (1,))
    yield AnswerFinished(0, "stop", 4)
    yield Done(5, 4, 2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("runs"), script=play) as one:
        yield one


def gate(name: str) -> threading.Event:
    GATES[f"gate {name}"] = threading.Event()
    return GATES[f"gate {name}"]


def stream(client: httpx2.Client, path: str, **more: Any) -> list[dict[str, Any]]:
    with client.stream("GET", path, **more) as response:
        assert response.status_code == 200, response.read()
        return [event for event in events_of(response) if isinstance(event, dict)]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


def test_a_response_is_kept_found_and_forgotten(server: Running) -> None:
    with server.client() as client:
        made = client.post("/v1/responses", json={"model": "tiny", "input": "hello"}).json()
        assert made["status"] == "completed"
        assert client.get(f"/v1/responses/{made['id']}").json() == made
        items = client.get(f"/v1/responses/{made['id']}/input_items").json()["data"]
        assert items[0]["content"][0]["text"] == "hello"
        next_one = client.post(
            "/v1/responses", json={"model": "tiny", "input": "and?", "previous_response_id": made["id"]}
        ).json()
        text = next_one["output"][0]["content"][0]["text"]
        assert "user:hello" in text
        assert "assistant:user:hello" in text
        assert "user:and?" in text
        assert client.delete(f"/v1/responses/{made['id']}").json()["deleted"]
        assert client.get(f"/v1/responses/{made['id']}").status_code == 404
        unkept = client.post("/v1/responses", json={"model": "tiny", "input": "x", "store": False}).json()
        assert client.get(f"/v1/responses/{unkept['id']}").status_code == 404


def test_what_is_refused_is_an_error_and_leaves_nothing(server: Running) -> None:
    with server.client() as client:
        before = len(client.get("/api/runs").json()["runs"])
        refused = client.post("/v1/responses", json={"model": "nothing", "input": "x"})
        assert refused.status_code == 404
        missing = client.post(
            "/v1/responses", json={"model": "tiny", "input": "x", "previous_response_id": "resp_none"}
        )
        assert missing.json()["error"]["param"] == "previous_response_id"
        assert len(client.get("/api/runs").json()["runs"]) == before


@pytest.mark.parametrize("kind", ["background", "conversation"])
def test_a_reader_resumes_after_any_event(server: Running, kind: str) -> None:
    """Left after the first words, the run goes on; read again from every number, live and stored, it is one
    stream without a gap or a repetition."""
    with server.client() as client:
        opened = gate(kind)
        if kind == "background":
            body = {"model": "tiny", "input": f"gate {kind}", "background": True, "stream": True}
            with client.stream("POST", "/v1/responses", json=body) as response:
                first = next(line for line in response.iter_lines() if line.startswith("data: "))
            run_id = json.loads(first[6:])["response"]["id"]
            events = f"/v1/responses/{run_id}"
            resume = "starting_after"
        else:
            conversation = client.post("/api/conversations", json={"settings": {"model": "tiny"}}).json()
            begun = client.post(
                f"/api/conversations/{conversation['id']}/runs", json={"content": f"gate {kind}"}
            ).json()
            run_id = begun["run_id"]
            events = f"/api/runs/{run_id}/events"
            resume = "after"
        live: list[dict[str, Any]] = []

        def read() -> None:
            with server.client() as other:
                live.extend(stream(other, events, params={"stream": True}))

        reader = threading.Thread(target=read)
        reader.start()
        wait_until(
            lambda: server.services.runs.open > 0 and len(server.services.runs._live[run_id].events) > 4
        )
        opened.set()
        reader.join(60)
        assert [event["sequence_number"] for event in live] == list(range(len(live)))
        assert text_of(live) == "one two three"
        assert live[-1]["type"] == "response.completed"
        for after in range(-1, len(live)):
            again = stream(client, events, params={"stream": True, resume: after})
            assert again == live[after + 1 :]


def test_a_cancelled_run_keeps_what_it_said_and_frees_the_engine(server: Running) -> None:
    with server.client() as client:
        opened = gate("cancel")
        begun = client.post(
            "/v1/responses", json={"model": "tiny", "input": "gate cancel", "background": True}
        ).json()
        assert begun["status"] in ("queued", "in_progress")
        wait_until(lambda: len(server.services.runs._live[begun["id"]].events) > 4)
        ended = client.post(f"/v1/responses/{begun['id']}/cancel").json()
        assert ended["status"] == "cancelled"
        assert ended["output"][0]["content"][0]["text"] == "one two "
        assert not server.services.generator.open
        assert client.post(f"/v1/responses/{begun['id']}/cancel").json() == ended
        opened.set()


def test_a_failure_is_told_and_kept(server: Running) -> None:
    with server.client() as client:
        begun = client.post(
            "/v1/responses", json={"model": "tiny", "input": "fail", "background": True}
        ).json()
        wait_until(lambda: begun["id"] not in server.services.runs._live)
        kept = client.get(f"/v1/responses/{begun['id']}").json()
        assert kept["status"] == "failed"
        assert "It broke." in kept["error"]["message"]


def test_a_conversation_is_a_tree_whose_branches_are_answered_apart(server: Running) -> None:
    with server.client() as client:
        conversation = client.post(
            "/api/conversations", json={"title": "京都", "settings": {"model": "tiny"}}
        ).json()
        path = f"/api/conversations/{conversation['id']}"

        def answered(**body: Any) -> dict[str, Any]:
            begun = client.post(f"{path}/runs", json=body).json()
            wait_until(lambda: begun["run_id"] not in server.services.runs._live)
            messages = client.get(path).json()["messages"]
            return next(one for one in messages if one["run_id"] == begun["run_id"])

        first = answered(content="first question")
        second = answered(content="second question", parent_id=first["id"])
        assert "assistant:user:first question" in second["content"][0]["text"]
        branch = answered(content="another question", parent_id=first["id"])
        assert "second question" not in branch["content"][0]["text"]
        again = answered(parent_id=branch["parent_id"])
        assert again["parent_id"] == branch["parent_id"]
        assert client.get(path).json()["head_id"] == again["id"]
        assert client.get("/api/conversations", params={"query": "京都"}).json()["conversations"]
        assert not client.get("/api/conversations", params={"query": "大阪"}).json()["conversations"]
        assert client.post(f"{path}/runs", json={"parent_id": first["id"]}).status_code == 400
        assert client.delete(path).status_code == 200
        assert client.get(path).status_code == 404


def test_what_ran_when_the_server_ended_is_marked_and_keeps_what_it_said(tmp_path: Path) -> None:
    gate("restart")
    with running(tmp_path, script=play) as one, one.client() as client:
        begun = client.post(
            "/v1/responses", json={"model": "tiny", "input": "gate restart", "background": True}
        ).json()
        wait_until(lambda: one.database.now(lambda db: stored.get(db, begun["id"], one.user.id)).events > 4)
        one.database.now(lambda db: stored.set_status(db, begun["id"], "running"))
        live = one.services.runs._live[begun["id"]]
        # As a kill would: nothing more is written.
        one.services.runs._store_end = _forgotten  # type: ignore[method-assign]
        del live
    with running(tmp_path, script=play) as one, one.client(one.new_key(one.user)) as client:
        kept = client.get(f"/v1/responses/{begun['id']}").json()
        assert kept["status"] == "incomplete"
        assert kept["output"][0]["content"][0]["text"].startswith("one two")
    GATES["gate restart"].set()


async def _forgotten(*_: Any) -> None:
    return None
