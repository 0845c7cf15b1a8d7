"""A batch through an engine: nothing lost, nothing twice, never more in flight than the engine queues."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ayllu.engine.batch import run as batch_run
from ayllu.engine.batch.file import Ids, read_lines, survey
from ayllu.engine.batch.output import Output
from ayllu.engine.batch.run import BatchRun, Tally, most_in_flight
from ayllu.engine.events import AnswerFinished, Done, Event, TextDelta
from ayllu.engine.protocol import Embeddings
from ayllu.engine.requests import EmbedRequest, GenerateRequest
from ayllu.errors import (
    AccessError,
    AylluError,
    ContextOverflowError,
    EngineCrashedError,
    EngineUnavailableError,
    OverloadedError,
    RemoteEngineError,
    RequestFailedError,
    UnknownModelError,
)
from tests.engine.scripted_engine import ScriptedEngine, prompt_text, shout
from tests.engine.test_batch_file import request, write


class Batch:
    """A batch in a folder: write lines, run them, read the answers."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "in.jsonl"
        self.target = folder / "out.jsonl"

    def run(self, engine: ScriptedEngine, *lines: object, limit: int = 8, **options: Any) -> Tally:
        if lines:
            write(self.source, *lines)
        ids = Ids()
        survey(self.source, ids)
        with Output(self.target, self.source, ids) as output:
            run = BatchRun(engine, output, models=["tiny"], limit=limit, **options)
            return run.run(line for line in read_lines(self.source) if not ids.is_done(line.key))

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.target.read_bytes().splitlines()]

    @property
    def answers(self) -> dict[str, dict[str, Any]]:
        found = {record["custom_id"]: record["response"] for record in self.records}
        assert len(found) == len(self.records)
        return found

    def error(self, custom_id: str | None) -> tuple[int, str]:
        response = self.answers[custom_id]
        return response["status_code"], response["body"]["error"]["message"]


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


def completion(custom_id: str, prompt: object, **fields: Any) -> dict[str, Any]:
    return request(custom_id, url="/v1/completions", body={"prompt": prompt, **fields})


def embedding(custom_id: str, text: object) -> dict[str, Any]:
    return request(custom_id, url="/v1/embeddings", body={"input": text})


def test_the_three_endpoints_are_answered(batch: Batch) -> None:
    tally = batch.run(
        ScriptedEngine(),
        request("a", "hi"),
        completion("b", ["x", "y"], n=2),
        embedding("c", ["one", "three"]),
    )
    assert tally == Tally(answered=3, failed=0, prompt_tokens=2 + 2 + 8, new_tokens=2 + 4)
    chat, text, vectors = (batch.answers[name]["body"] for name in "abc")
    assert chat["choices"][0]["message"]["content"] == "HI"
    assert (chat["model"], chat["object"]) == ("tiny", "chat.completion")
    assert [choice["text"] for choice in text["choices"]] == ["X", "X", "Y", "Y"]
    assert [choice["index"] for choice in text["choices"]] == [0, 1, 2, 3]
    assert [item["embedding"] for item in vectors["data"]] == [[3.0, 0.5], [5.0, 0.5]]
    assert {answer["status_code"] for answer in batch.answers.values()} == {200}
    assert len({answer["request_id"] for answer in batch.answers.values()}) == 3


def test_a_bad_line_is_answered_with_400_and_stops_nothing(batch: Batch) -> None:
    tally = batch.run(
        ScriptedEngine(),
        b"oops\n",
        request("url", url="/v1/images"),
        request("field", body={"messages": [{"role": "user", "content": "x"}], "temprature": 1}),
        request("stream", body={"messages": [{"role": "user", "content": "x"}], "stream": True}),
        request("model", body={"messages": [{"role": "user", "content": "x"}], "model": "gpt-9"}),
        request("good", "hi"),
    )
    assert (tally.answered, tally.failed) == (6, 5)
    assert batch.error(None)[0] == 400
    assert batch.error("url")[0] == 400 and "/v1/images" in batch.error("url")[1]
    assert "Did you mean temperature?" in batch.error("field")[1]
    assert "not streamed" in batch.error("stream")[1]
    assert batch.error("model")[0] == 404 and "tiny" in batch.error("model")[1]
    assert batch.answers["good"]["status_code"] == 200
    assert batch.answers["model"]["body"]["error"]["code"] == "model_not_found"


def test_an_adapter_is_named_by_its_requests(batch: Batch) -> None:
    seen: list[str | None] = []

    def script(asked: GenerateRequest) -> Iterable[Event]:
        seen.append(asked.adapter)
        return shout(asked)

    body = {"messages": [{"role": "user", "content": "x"}], "model": "lora"}
    batch.run(ScriptedEngine(script), request("a", body=body), adapters=["lora"])
    assert seen == ["lora"]
    assert batch.answers["a"]["body"]["model"] == "lora"


def test_what_the_engine_refuses_is_the_lines_own_answer(batch: Batch) -> None:
    class Refusing(ScriptedEngine):
        def submit(self, asked: GenerateRequest, deliver: Callable[[Event], None] | None = None):
            if "long" in prompt_text(asked):
                raise ContextOverflowError("The conversation has 9 tokens; 8 fit.", "Shorten it.")
            return super().submit(asked, deliver)

    def script(asked: GenerateRequest) -> Iterable[Event]:
        if "broken" in prompt_text(asked):
            yield TextDelta(0, "bro")
            raise RequestFailedError("It broke.", "Try another.")
        yield from shout(asked)

    batch.run(Refusing(script), request("a", "long"), request("b", "broken"), request("c", "fine"))
    assert batch.error("a") == (400, "The conversation has 9 tokens; 8 fit. Shorten it.")
    assert batch.answers["a"]["body"]["error"]["code"] == "context_length_exceeded"
    assert batch.error("b") == (500, "It broke. Try another.")
    assert batch.answers["c"]["status_code"] == 200


def test_no_more_is_in_flight_than_was_agreed(batch: Batch) -> None:
    engine = ScriptedEngine(slots=2, waiting=100)
    lines = [completion(f"r{n}", [f"{n}"] * (n % 3 + 1), n=n % 4 + 1) for n in range(40)]
    batch.run(engine, *lines, limit=most_in_flight(2))
    assert len(batch.answers) == 40
    assert engine.most_open <= most_in_flight(2)


def test_a_request_larger_than_the_limit_runs_by_itself(batch: Batch) -> None:
    engine = ScriptedEngine(slots=2, waiting=100)
    batch.run(engine, request("a"), completion("b", "x", n=12), request("c"), limit=4)
    assert len(batch.answers) == 3
    assert engine.most_open == 12


def test_an_engine_that_is_full_is_waited_for(batch: Batch) -> None:
    engine = ScriptedEngine(slots=1, waiting=1)
    batch.run(engine, *(request(f"r{n}", f"{n}") for n in range(30)), limit=20)
    assert {answer["status_code"] for answer in batch.answers.values()} == {200}
    assert len(batch.answers) == 30


def test_a_server_that_says_full_later_is_asked_again(batch: Batch) -> None:
    refusals = iter([True, True, False] * 100)

    def script(asked: GenerateRequest) -> Iterable[Event]:
        if next(refusals):
            raise OverloadedError("Full.", retry_after_s=0.001)
        return shout(asked)

    batch.run(ScriptedEngine(script, slots=1), *(request(f"r{n}") for n in range(10)))
    assert {answer["status_code"] for answer in batch.answers.values()} == {200}


def test_an_engine_that_stays_full_costs_its_request_and_no_more(batch: Batch) -> None:
    engine = ScriptedEngine(slots=1, waiting=3)
    batch.run(engine, completion("huge", "x", n=9), request("small"), limit=4, patience_s=0.2)
    assert batch.error("huge")[0] == 429
    assert batch.answers["small"]["status_code"] == 200


def crashing(poison: str, crashed: list[str], engine_of: Callable[[], CrashingEngine]):
    def script(asked: GenerateRequest) -> Iterable[Event]:
        yield TextDelta(0, "ha")
        if poison in prompt_text(asked):
            engine_of().crash()
        if engine_of().crashed_since(asked):
            crashed.append(prompt_text(asked))
            raise EngineCrashedError("The engine crashed (SIGSEGV).", "It starts again by itself.")
        yield TextDelta(0, "lf")
        yield AnswerFinished(0, "stop", 2)
        yield Done(1, 2)

    return script


class CrashingEngine(ScriptedEngine):
    """A crash ends all that is open, as in a real engine."""

    def __init__(self, poison: str, slots: int) -> None:
        self.crashed: list[str] = []
        self.doomed: set[str] = set()
        self.open_ids: set[str] = set()
        self.beside: list[int] = []
        super().__init__(crashing(poison, self.crashed, lambda: self), slots=slots)

    def submit(self, asked: GenerateRequest, deliver: Callable[[Event], None] | None = None):
        assert deliver is not None
        self.open_ids.add(asked.id)

        def closing(event: Event) -> None:
            if not isinstance(event, TextDelta | AnswerFinished):
                self.open_ids.discard(asked.id)
            deliver(event)

        return super().submit(asked, closing)

    def crash(self) -> None:
        self.beside.append(len(self.open_ids) - 1)
        self.doomed |= self.open_ids

    def crashed_since(self, asked: GenerateRequest) -> bool:
        return asked.id in self.doomed


def test_a_crash_costs_the_request_that_caused_it_and_no_other(batch: Batch) -> None:
    engine = CrashingEngine("poison", slots=4)
    lines = [request(f"r{n}", "poison" if n == 5 else f"fine {n}") for n in range(12)]
    batch.run(engine, *lines)
    assert batch.error("r5")[0] == 503
    assert [name for name, answer in batch.answers.items() if answer["status_code"] != 200] == ["r5"]
    assert engine.submitted["poison"] == 2
    assert engine.beside[1] == 0, "the second try ran beside others"
    assert batch.answers["r1"]["body"]["choices"][0]["message"]["content"] == "half"


def test_a_server_out_of_reach_is_tried_twice_and_then_ends_the_batch(batch: Batch) -> None:
    def script(asked: GenerateRequest) -> Iterable[Event]:
        raise RemoteEngineError("https://gpu:8000 cannot be reached.", "Start it.")
        yield

    engine = ScriptedEngine(script)
    with pytest.raises(RemoteEngineError):
        batch.run(engine, *(request(f"r{n}", f"{n}") for n in range(100)))
    assert len(batch.answers) == batch_run.MOST_FAILURES_IN_A_ROW
    assert max(engine.submitted.values()) == 2
    batch.run(ScriptedEngine())
    assert len(batch.answers) == 100


def test_requests_that_fail_by_themselves_never_end_the_batch(batch: Batch) -> None:
    def script(asked: GenerateRequest) -> Iterable[Event]:
        raise RequestFailedError("The answer is not what was promised.", "")
        yield

    tally = batch.run(ScriptedEngine(script), *(request(f"r{n}") for n in range(40)))
    assert (tally.answered, tally.failed) == (40, 40)


def test_a_single_failure_of_a_server_is_forgiven(batch: Batch) -> None:
    failed: set[str] = set()

    def script(asked: GenerateRequest) -> Iterable[Event]:
        if prompt_text(asked) not in failed:
            failed.add(prompt_text(asked))
            raise RemoteEngineError("It timed out.", "Try again.")
        return shout(asked)

    batch.run(ScriptedEngine(script), *(request(f"r{n}", f"{n}") for n in range(40)))
    assert {answer["status_code"] for answer in batch.answers.values()} == {200}


@pytest.mark.parametrize("kind", [AccessError, UnknownModelError])
def test_a_refused_key_or_model_ends_the_batch_before_it_burns_the_file(batch: Batch, kind) -> None:
    def script(asked: GenerateRequest) -> Iterable[Event]:
        raise kind("The server knows no such thing.", "Set another.")
        yield

    with pytest.raises(kind):
        batch.run(ScriptedEngine(script), *(request(f"r{n}") for n in range(10)))
    assert batch.answers == {}


def test_an_engine_that_is_gone_ends_the_batch_and_the_next_run_goes_on(batch: Batch) -> None:
    engine = ScriptedEngine(slots=1)
    closing = threading.Event()

    def script(asked: GenerateRequest) -> Iterable[Event]:
        if prompt_text(asked) == "3":
            engine.closed = True
            closing.set()
        if closing.is_set():
            raise EngineUnavailableError("The engine is closed.", "Open it again.")
        return shout(asked)

    engine._script = script
    with pytest.raises(EngineUnavailableError):
        batch.run(engine, *(request(f"r{n}", f"{n}") for n in range(10)), patience_s=0.05)
    assert {"r0", "r1", "r2"} >= set(batch.answers)
    batch.run(ScriptedEngine())
    assert len(batch.answers) == 10


def test_an_engine_that_starts_again_is_waited_for(batch: Batch) -> None:
    class Starting(ScriptedEngine):
        refusals = 3

        def submit(self, asked: GenerateRequest, deliver: Callable[[Event], None] | None = None):
            if self.refusals:
                self.refusals -= 1
                raise EngineUnavailableError("The engine starts again.", "Wait.")
            return super().submit(asked, deliver)

    batch.run(Starting(), request("a"))
    assert batch.answers["a"]["status_code"] == 200


def test_one_failed_prompt_fails_its_body_once_and_stops_the_others(batch: Batch) -> None:
    def script(asked: GenerateRequest) -> Iterable[Event]:
        if prompt_text(asked) == "bad":
            raise RequestFailedError("It broke.", "")
        return shout(asked)

    engine = ScriptedEngine(script, slots=1)
    batch.run(engine, completion("a", ["ok", "bad", *(f"x{n}" for n in range(20))]), request("b"), limit=3)
    assert batch.error("a") == (500, "It broke.")
    assert batch.answers["b"]["status_code"] == 200
    assert sum(engine.submitted.values()) < 10


def test_too_many_dimensions_are_that_requests_mistake(batch: Batch) -> None:
    wide = request("a", url="/v1/embeddings", body={"input": "x", "dimensions": 3})
    batch.run(ScriptedEngine(), wide, embedding("b", "y"))
    assert {name: answer["status_code"] for name, answer in batch.answers.items()} == {"a": 400, "b": 200}


def test_embeddings_fail_as_requests_do(batch: Batch) -> None:
    class Moody(ScriptedEngine):
        calls = 0

        def embed(self, asked: EmbedRequest) -> Embeddings:
            self.calls += 1
            if asked.inputs == ("no",):
                raise RequestFailedError("No.", "")
            if asked.inputs == ("nan",):
                return Embeddings(((float("nan"),),), 1)
            if self.calls == 1:
                raise EngineCrashedError("Crashed.", "")
            return super().embed(asked)

    batch.run(Moody(), embedding("a", "x"), embedding("b", "no"), embedding("c", "nan"), embedding("d", "y"))
    assert batch.answers["a"]["status_code"] == batch.answers["d"]["status_code"] == 200
    assert batch.error("b")[0] == batch.error("c")[0] == 500


def test_a_bug_in_an_engine_is_not_hidden(batch: Batch) -> None:
    class Buggy(ScriptedEngine):
        def embed(self, asked: EmbedRequest) -> Embeddings:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        batch.run(Buggy(), embedding("a", "x"))


def test_an_interrupt_cancels_what_is_open_and_keeps_what_is_done(batch: Batch) -> None:
    cancelled: list[str] = []
    waiting = threading.Event()

    class Patient(ScriptedEngine):
        def submit(self, asked: GenerateRequest, deliver: Callable[[Event], None] | None = None):
            stream = super().submit(asked, deliver)
            inner = stream._cancel

            def cancel() -> None:
                cancelled.append(prompt_text(asked))
                waiting.set()
                inner()

            stream._cancel = cancel
            return stream

    def script(asked: GenerateRequest) -> Iterable[Event]:
        if prompt_text(asked) == "slow":
            waiting.wait()
        yield from shout(asked)

    def interrupt(tally: Tally) -> None:
        if tally.answered == 3:
            raise KeyboardInterrupt

    lines = [request("s", "slow"), *(request(f"r{n}", f"{n}") for n in range(8))]
    with pytest.raises(KeyboardInterrupt):
        batch.run(Patient(script, slots=2), *lines, progress=interrupt)
    assert "slow" in cancelled
    assert len(batch.answers) == 3
    batch.run(ScriptedEngine())
    assert len(batch.answers) == 9


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.data())
def test_whatever_goes_wrong_each_request_is_answered_exactly_once(
    tmp_path: Path, data: st.DataObject
) -> None:
    batch = Batch(tmp_path)
    batch.target.unlink(missing_ok=True)
    kinds = data.draw(st.lists(st.sampled_from(["chat", "many", "embed", "bad"]), min_size=1, max_size=12))
    errors = [
        None,
        OverloadedError("Full.", retry_after_s=0.0),
        EngineCrashedError("Crashed.", ""),
        RequestFailedError("Broke.", ""),
        RemoteEngineError("Gone.", ""),
    ]
    plan = iter(data.draw(st.lists(st.sampled_from(errors), max_size=30)))

    def script(asked: GenerateRequest) -> Iterable[Event]:
        error: AylluError | None = next(plan, None)
        if error is not None:
            raise error
        return shout(asked)

    made = {
        "chat": lambda name: request(name, name),
        "many": lambda name: completion(name, ["x", "y", "z"], n=2),
        "embed": lambda name: embedding(name, "x"),
        "bad": lambda name: request(name, url="/no"),
    }
    lines = [made[kind](f"r{number}") for number, kind in enumerate(kinds)]
    engine = ScriptedEngine(script, slots=data.draw(st.integers(1, 3)), waiting=data.draw(st.integers(1, 6)))
    tally = batch.run(engine, *lines, limit=data.draw(st.integers(1, 9)))
    assert sorted(batch.answers) == sorted(f"r{number}" for number in range(len(kinds)))
    assert tally.answered == len(kinds)
    assert tally.failed == sum(answer["status_code"] >= 400 for answer in batch.answers.values())
    for number, kind in enumerate(kinds):
        answer = batch.answers[f"r{number}"]
        assert (answer["status_code"] == 400) == (kind == "bad")
