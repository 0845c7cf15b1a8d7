"""The engine's process dies, hangs, lies, is left alone: what was open ends typed, the rest goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

from ayllu.chat.messages import Message, ToolDefinition, user_message
from ayllu.chat.tokenizer import load_tokenizer
from ayllu.engine.events import (
    AnswerFinished,
    Done,
    Event,
    Failed,
    Started,
    TextDelta,
    ToolCallMade,
)
from ayllu.engine.launch import WORKER_COMMAND, Launched
from ayllu.engine.native import NativeEngine, open_engine
from ayllu.engine.options import EngineOptions
from ayllu.engine.parameters import Sampling
from ayllu.engine.protocol import Engine, Stream
from ayllu.engine.requests import ChatPrompt, EmbedRequest, GenerateRequest, TextPrompt, ToolUse
from ayllu.engine.supervisor import CrashHistory, RestartPolicy
from ayllu.errors import (
    AylluError,
    EngineCrashedError,
    EngineUnavailableError,
    GrammarError,
    ModelFileError,
    NoSpaceError,
    OverloadedError,
    RequestFailedError,
    UnknownModelError,
    UsageError,
)
from ayllu.weights.hf_save import save_folder
from tests.chat.small_vocabularies import write_tiktoken
from tests.engine.toy_engine import (
    PATIENT,
    TOY_WORKER,
    ask,
    open_toy,
    running,
    text_of,
    toy_folder,
    wait_until,
    words,
)
from tests.model.tiny import tiny_llama4
from tests.weights.small_checkpoints import random_checkpoint

TYPED_WITHIN_S = 2.0
"""How soon after a crash every open request must have its typed error."""

Make = Callable[..., NativeEngine]


@pytest.fixture
def make(tmp_path: Path):
    """Opens toy engines and closes them all."""
    opened: list[NativeEngine] = []

    def make_one(
        options: EngineOptions | None = None, policy: RestartPolicy = PATIENT, **settings: Any
    ) -> NativeEngine:
        opened.append(open_toy(toy_folder(tmp_path / "model", **settings), options, policy))
        return opened[-1]

    yield make_one
    for engine in opened:
        engine.close()


def kill(engine: NativeEngine) -> None:
    assert engine.process_id is not None
    os.kill(engine.process_id, signal.SIGKILL)


def wait_ready(engine: NativeEngine) -> None:
    wait_until(lambda: engine.status == "ready")


def failure(stream: Stream) -> AylluError:
    last = list(stream)[-1]
    assert isinstance(last, Failed), last
    return last.error


def test_it_is_an_engine_that_answers_embeds_and_counts(make: Make) -> None:
    engine: Engine = make()
    events = list(engine.submit(ask(3, n=2)))
    assert events[0] == Started(4)
    assert [text_of([e for e in events if getattr(e, "index", 0) == i]) for i in (0, 1)] == [words(3)] * 2
    assert [e for e in events if isinstance(e, AnswerFinished)] == [
        AnswerFinished(index, "length", 3) for index in (0, 1)
    ]
    assert events[-1] == Done(4, 6)
    vectors = engine.embed(EmbedRequest(inputs=("hello", (1, 2, 3)), normalise=False))
    assert vectors.vectors[1] == (3.0, 6.0, 0.0)
    assert vectors.prompt_tokens == 4 + 3
    assert engine.stats().blocks_free == {"global": 9}
    assert engine.info.facts["device"] == "toy"
    assert (engine.info.model, engine.info.context) == ("model", 1024)


def test_fifty_kills_under_eight_requests_end_typed_and_it_serves_again(make: Make) -> None:
    engine = make(step_s=0.001)
    random = Random(20)
    for round_number in range(50):
        streams = [engine.submit(ask(200, n=1 + index % 2)) for index in range(8)]
        ended: list[tuple[float, Event]] = []

        def read(stream: Stream, ended: list[tuple[float, Event]] = ended) -> None:
            last = list(stream)[-1]
            ended.append((time.monotonic(), last))

        readers = [threading.Thread(target=read, args=(stream,)) for stream in streams]
        for reader in readers:
            reader.start()
        time.sleep(random.uniform(0, 0.05))
        killed_at = time.monotonic()
        kill(engine)
        for reader in readers:
            reader.join(60)
        assert len(ended) == 8
        for moment, last in ended:
            assert isinstance(last, Failed) and type(last.error) is EngineCrashedError
            assert "SIGKILL" in last.error.problem
            assert moment - killed_at < TYPED_WITHIN_S
        assert text_of(list(engine.submit(ask(4)))) == words(4)
        assert engine.stats().restarts == round_number + 1


def test_after_more_crashes_than_allowed_it_stays_down_until_it_is_restarted(make: Make) -> None:
    engine = make(policy=RestartPolicy(max_crashes=3, first_delay_s=0.01, longest_delay_s=0.01))
    for crash in range(4):
        wait_ready(engine)
        stream = engine.submit(ask(tenant="exit"))
        assert "toy: out of marbles" in str(failure(stream))
        if crash < 3:
            wait_until(lambda count=crash + 1: engine.stats().restarts == count)
    wait_until(lambda: engine.status == "stopped")
    for attempt in (lambda: engine.submit(ask()), engine.stats, lambda: engine.load_adapter("a", Path("/"))):
        with pytest.raises(
            EngineUnavailableError, match=r"4 crashes, the last: exit code 3: toy: out of mar"
        ):
            attempt()
    engine.restart()
    assert engine.status == "ready"
    assert text_of(list(engine.submit(ask(2)))) == words(2)
    engine.restart()
    assert engine.stats().restarts == 4


def test_a_restart_by_hand_that_fails_says_why(make: Make, tmp_path: Path) -> None:
    engine = make(policy=RestartPolicy(max_crashes=0))
    toy_folder(tmp_path / "model", open="refuse")
    kill(engine)
    wait_until(lambda: engine.status == "stopped")
    with pytest.raises(EngineUnavailableError, match="The toy box is too small"):
        engine.restart()
    toy_folder(tmp_path / "model")
    engine.restart()
    assert text_of(list(engine.submit(ask(2)))) == words(2)


def test_crashes_are_counted_within_a_window_and_failed_starts_in_a_row() -> None:
    policy = RestartPolicy(max_crashes=3, window_s=60, first_delay_s=1, longest_delay_s=10)
    history = CrashHistory(policy)
    assert [history.delay_after_crash(now, was_ready=True) for now in (0, 10, 20)] == [1, 4, 10]
    assert history.delay_after_crash(61, was_ready=True) == 10
    assert history.delay_after_crash(62, was_ready=True) is None
    history.clear()
    slow_loading = [history.delay_after_crash(now, was_ready=False) for now in (0, 100, 200, 300)]
    assert slow_loading == [1, 4, 10, None]
    history.clear()
    assert [history.delay_after_crash(now, was_ready=True) for now in range(0, 1000, 100)] == [1] * 10


@pytest.mark.parametrize(
    ("tenant", "says"),
    [
        ("die", "signal SIGKILL"),
        ("exit", "exit code 3: toy: out of marbles"),
        ("bug in step", "exit code 1: ValueError: the toy broke"),
        ("garbage", "claims 4294967295 bytes"),
    ],
)
def test_every_way_to_die_is_told_to_all_and_not_to_the_terminal(
    make: Make, tenant: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = make(step_s=0.01)
    other = engine.submit(ask(200))
    killer = engine.submit(ask(tenant=tenant))
    for stream in (other, killer):
        error = failure(stream)
        assert type(error) is EngineCrashedError
        assert says in error.problem
    assert text_of(list(engine.submit(ask(2)))) == words(2)
    assert capfd.readouterr() == ("", "")


def hang(engine: NativeEngine, folder: Path) -> Stream:
    """A request whose computing has come to a stop."""
    stream = engine.submit(ask(tenant="hang"))
    wait_until((folder / "hanging").exists)
    return stream


def test_waiting_calls_end_with_the_crash(make: Make, tmp_path: Path) -> None:
    engine = make()
    hang(engine, tmp_path / "model")
    calls: list[Callable[[], object]] = [
        engine.stats,
        lambda: engine.embed(EmbedRequest(inputs=("a",))),
        lambda: engine.load_adapter("a", Path("/")),
    ]
    errors: list[BaseException] = []

    def call(one: Callable[[], object]) -> None:
        try:
            one()
        except AylluError as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(one,)) for one in calls]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(engine._open._questions) == 3)
    killed_at = time.monotonic()
    kill(engine)
    for thread in threads:
        thread.join(60)
    assert time.monotonic() - killed_at < TYPED_WITHIN_S
    assert [type(error) for error in errors] == [EngineCrashedError] * 3
    assert len({id(error) for error in errors}) == 3


def test_a_process_whose_channel_is_held_open_by_an_heir_is_found_dead(make: Make, tmp_path: Path) -> None:
    """The socket's end does not tell of a death when something the process started inherited it."""
    engine = make()
    stream = engine.submit(ask(tenant="heir"))
    wait_until((tmp_path / "model" / "heir").exists)
    killed_at = time.monotonic()
    kill(engine)
    assert type(failure(stream)) is EngineCrashedError
    assert time.monotonic() - killed_at < TYPED_WITHIN_S


def test_a_hung_step_is_ended_and_told(make: Make) -> None:
    engine = make(policy=RestartPolicy(step_limit_s=2.0, first_delay_s=0.01))
    time.sleep(3.0)
    assert engine.stats().restarts == 0, "an idle engine is no hung one"
    assert "no step finished in 2 s" in str(failure(engine.submit(ask(tenant="hang"))))
    assert text_of(list(engine.submit(ask(2)))) == words(2)


def test_long_steps_without_events_are_no_hang(make: Make) -> None:
    engine = make(policy=RestartPolicy(step_limit_s=5.0, first_delay_s=0.01), step_s=1.2)
    assert text_of(list(engine.submit(ask(2, tenant="quiet")))) == words(2)
    assert engine.stats().restarts == 0


def test_requests_during_a_restart_wait_for_it(make: Make) -> None:
    engine = make(EngineOptions(slots=1, waiting=2), open_s=0.5)
    kill(engine)
    wait_until(lambda: engine.status == "restarting")
    streams = [engine.submit(ask(2)) for _ in range(3)]
    with pytest.raises(OverloadedError, match="3 sequences are open"):
        engine.submit(ask(2))
    assert engine.stats().waiting == 3
    streams[1].cancel()
    assert list(streams[1]) == [AnswerFinished(0, "cancelled", 0), Done(4, 0)]
    assert engine.status == "restarting"
    for stream in (streams[0], streams[2]):
        assert text_of(list(stream)) == words(2)


def test_requests_that_wait_for_a_restart_fail_typed_when_it_fails(make: Make, tmp_path: Path) -> None:
    engine = make(open_s=0.3)
    toy_folder(tmp_path / "model", open="refuse", open_s=0.3)
    kill(engine)
    wait_until(lambda: engine.status == "restarting")
    error = failure(engine.submit(ask()))
    assert type(error) is EngineCrashedError
    assert "while starting again (The toy box is too small.)" in error.problem
    toy_folder(tmp_path / "model")
    wait_ready(engine)
    assert text_of(list(engine.submit(ask(2)))) == words(2)


def test_adapters_are_there_again_after_a_restart_and_lost_ones_are_told(make: Make, tmp_path: Path) -> None:
    engine = make()
    for name in ("kept", "lost", "unloaded"):
        (tmp_path / name).touch()
        engine.load_adapter(name, tmp_path / name)
    engine.unload_adapter("unloaded")
    assert engine.adapters() == ("kept", "lost")
    with pytest.raises(UnknownModelError):
        engine.unload_adapter("unloaded")
    with pytest.raises(ModelFileError, match="no such adapter") as raised:
        engine.load_adapter("nothing", tmp_path / "nothing")
    assert raised.value.field == "name"
    (tmp_path / "lost").unlink()
    kill(engine)
    assert type(failure(engine.submit(ask(adapter="unloaded")))) in (EngineCrashedError, UnknownModelError)
    wait_ready(engine)
    assert text_of(list(engine.submit(ask(2, adapter="kept")))) == words(2)
    assert type(failure(engine.submit(ask(adapter="lost")))) is UnknownModelError
    assert engine.adapters() == ("kept",)
    assert any("lost" in note and "no such adapter" in note for note in engine.notes)


@pytest.mark.parametrize(
    ("opening", "kind", "says"),
    [
        ("refuse", NoSpaceError, "The toy box is too small. Buy a bigger one."),
        ("bug", EngineCrashedError, "while opening the model (exit code 1: KeyError: 'no toy')"),
        ("die", EngineCrashedError, "signal SIGKILL"),
    ],
)
def test_what_goes_wrong_at_opening_is_raised(make: Make, opening: str, kind: type, says: str) -> None:
    with pytest.raises(kind) as raised:
        make(open=opening)
    assert says in str(raised.value)


def test_a_worker_that_cannot_be_started_is_told(tmp_path: Path) -> None:
    with pytest.raises(EngineCrashedError, match="cannot be started: No such file"):
        open_engine(toy_folder(tmp_path / "model"), worker_command=[str(tmp_path / "nothing")])


def test_files_the_front_cannot_open_end_the_process(make: Make, tmp_path: Path) -> None:
    (toy_folder(tmp_path / "model", open_s=100) / "tokenizer.json").write_text("no", encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        open_toy(tmp_path / "model")


def test_a_process_that_is_under_way_is_taken_and_no_other_started(tmp_path: Path) -> None:
    launched = Launched(TOY_WORKER)
    with open_toy(toy_folder(tmp_path / "model"), launched=launched) as engine:
        assert engine.process_id == launched.popen.pid
        assert text_of(list(engine.submit(ask(2)))) == words(2)
        launched.discard()  # of no effect on what was taken
        os.kill(launched.popen.pid, signal.SIGKILL)
        wait_until(lambda: engine.process_id not in (None, launched.popen.pid))
        assert text_of(list(engine.submit(ask(2)))) == words(2)
        assert engine.stats().restarts == 1


def test_a_process_that_nobody_takes_is_gone_when_discarded() -> None:
    launched = Launched()
    launched.discard()
    assert not running(launched.popen.pid)


def test_loading_shows_its_progress(tmp_path: Path) -> None:
    shown: list[object] = []

    class Recorder:
        @contextmanager
        def task(self, label: str, total: int | None, unit: str = "bytes"):
            shown.append((label, total, unit))
            yield self
            shown.append("left")

        def advance(self, amount: int) -> None:
            shown.append(amount)

    with open_toy(toy_folder(tmp_path / "model"), progress=Recorder()):
        assert shown[0] == ("Loading toys", 100, "toys")
        assert sum(amount for amount in shown if isinstance(amount, int)) == 100
        assert shown[-1] == "left"


@pytest.mark.parametrize(
    ("tenant", "kind", "says"),
    [
        ("fail", GrammarError, "The toy dislikes this. Be nice."),
        ("refuse", OverloadedError, "The toy is full."),
        ("bug in submit", RequestFailedError, "ZeroDivisionError: toy"),
    ],
)
def test_one_failed_request_harms_no_other(make: Make, tenant: str, kind: type, says: str) -> None:
    engine = make(step_s=0.01)
    other = engine.submit(ask(20))
    error = failure(engine.submit(ask(tenant=tenant)))
    assert type(error) is kind
    assert says in str(error)
    assert text_of(list(other)) == words(20)
    assert engine.stats().restarts == 0
    if tenant != "fail":
        with pytest.raises(kind, match=says.replace(".", r"\.")):
            engine.embed(EmbedRequest(inputs=("a",), tenant=tenant))


def test_sixteen_threads_submit_at_once(make: Make) -> None:
    engine = make(EngineOptions(slots=4, waiting=1000))
    wrong: list[object] = []

    def talk(number: int) -> None:
        for turn in range(10):
            count = 1 + (number + turn) % 5
            said = text_of(list(engine.submit(ask(count))))
            if said != words(count):
                wrong.append(said)
            if turn % 3 == 0:
                vector = engine.embed(EmbedRequest(inputs=((number, turn),))).vectors[0]
                if vector != (2.0, number + turn, 1.0):
                    wrong.append(vector)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert wrong == []


def test_a_cancelled_request_ends_soon_and_alone(make: Make) -> None:
    engine = make(step_s=0.005)
    other = engine.submit(ask(30))
    stream = engine.submit(ask(250, n=2))
    events = iter(stream)
    while not isinstance(next(events), TextDelta):
        pass
    stream.cancel()
    stream.cancel()
    rest = list(events)
    assert [event.reason for event in rest if isinstance(event, AnswerFinished)] == ["cancelled"] * 2
    assert isinstance(rest[-1], Done) and rest[-1].new_tokens < 2 * 250
    stream.cancel()
    assert text_of(list(other)) == words(30)


def test_a_slow_reader_does_not_stop_the_others(make: Make) -> None:
    engine = make()
    unread = engine.submit(ask(200))
    for _ in range(3):
        assert text_of(list(engine.submit(ask(50)))) == words(50)
    wait_until(lambda: unread.ended)
    assert text_of(list(unread)) == words(200)


def test_a_receiver_that_breaks_ends_its_request_alone(make: Make) -> None:
    engine = make(step_s=0.005)
    heard: list[Event] = []

    def deliver(event: Event) -> None:
        heard.append(event)
        if len(heard) == 3:
            raise RuntimeError("Event loop is closed")

    engine.submit(ask(250), deliver)
    assert text_of(list(engine.submit(ask(10)))) == words(10)
    wait_until(lambda: engine.stats().running == 0)
    assert len(heard) == 3


def test_events_may_be_delivered_instead_of_read(make: Make) -> None:
    events: list[Event] = []
    stream = make().submit(ask(3), events.append)
    wait_until(lambda: stream.ended)
    assert text_of(events) == words(3)


def test_too_many_requests_are_refused_before_they_are_prepared(make: Make) -> None:
    engine = make(EngineOptions(slots=2, waiting=3), step_s=0.01)
    streams = [engine.submit(ask(100)) for _ in range(3)] + [engine.submit(ask(100, n=2))]
    with pytest.raises(OverloadedError, match="5 sequences are open, 2 are computed together and 3 may wait"):
        engine.submit(ask())
    for stream in streams:
        stream.cancel()
        list(stream)
    assert text_of(list(engine.submit(ask(2)))) == words(2)


def test_an_id_is_open_once_at_a_time(make: Make) -> None:
    engine = make(step_s=0.01)
    stream = engine.submit(ask(100, id="same"))
    with pytest.raises(UsageError, match="same is open already"):
        engine.submit(ask(id="same"))
    stream.cancel()
    list(stream)
    assert text_of(list(engine.submit(ask(2, id="same")))) == words(2)


def test_closing_ends_open_requests_typed_and_the_process(make: Make) -> None:
    engine = make(step_s=0.005)
    process_id = engine.process_id
    streams = [engine.submit(ask(250)) for _ in range(3)]
    next(iter(streams[0]))
    engine.close()
    for stream in streams:
        assert type(failure(stream)) is EngineUnavailableError
    assert process_id is not None and not running(process_id)
    engine.close()
    assert engine.status == "closed"
    for attempt in (lambda: engine.submit(ask()), engine.stats, engine.restart):
        with pytest.raises(EngineUnavailableError, match="closed"):
            attempt()


def test_closing_ends_a_process_that_hangs(make: Make, tmp_path: Path) -> None:
    engine = make()
    process_id = engine.process_id
    stream = hang(engine, tmp_path / "model")
    engine.close()
    assert type(failure(stream)) is EngineUnavailableError
    assert process_id is not None and not running(process_id)


def test_closing_within_a_delivered_event_does_not_lock_up(make: Make) -> None:
    engine = make()
    closed = threading.Event()

    def deliver(event: Event) -> None:
        if isinstance(event, Started):
            engine.close()
            closed.set()

    engine.submit(ask(100), deliver)
    assert closed.wait(60)


def test_an_engine_that_is_forgotten_ends_its_process(tmp_path: Path) -> None:
    engine = open_toy(toy_folder(tmp_path / "model"))
    process_id = engine.process_id
    assert process_id is not None
    # What is still read from it keeps it.
    stream = engine.submit(ask(20))
    del engine
    gc.collect()
    assert text_of(list(stream)) == words(20)
    del stream
    gc.collect()
    wait_until(lambda: not running(process_id))


def links() -> int:
    """Sockets and pipes of this process."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += str(entry.readlink()).startswith(("socket:", "pipe:"))
    return count


def engine_threads() -> int:
    return sum(thread.name.startswith("ayllu-engine") for thread in threading.enumerate())


def test_nothing_is_left_behind_by_crashes_and_closing(make: Make) -> None:
    # What other tests left to end by itself may still be there.
    wait_until(lambda: engine_threads() == 0)
    before = links()
    engine = make()
    for _ in range(3):
        wait_ready(engine)
        wait_until(lambda: (links(), engine_threads()) == (before + 2, 4))
        stream = engine.submit(ask(250))
        kill(engine)
        failure(stream)
    wait_until(lambda: engine.stats().restarts == 3)
    engine.close()
    wait_until(lambda: (links(), engine_threads()) == (before, 0))


def test_tool_calls_of_an_answer_become_events(make: Make) -> None:
    answer = '{"name": "add", "parameters": {"a": 1}}'
    engine = make(answer=answer)
    tools = ToolUse((ToolDefinition("add"),))
    request = GenerateRequest(
        prompt=ChatPrompt((Message("user", "1 + 1?"),)), tool_use=tools, max_new_tokens=len(answer)
    )
    events = list(engine.submit(request))
    calls = [event for event in events if isinstance(event, ToolCallMade)]
    assert [(made.call_index, made.call.name, made.call.arguments) for made in calls] == [
        (0, "add", {"a": 1})
    ]
    assert text_of(events) == ""
    assert sum(len(event.token_ids) for event in events if isinstance(event, TextDelta)) == len(answer)
    assert events[-2] == AnswerFinished(0, "tool_calls", len(answer))


def test_a_fault_in_reading_an_answer_ends_that_request_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ayllu.chat.toolcalls import ToolCallParser

    def broken(self: ToolCallParser, text: str) -> list[object]:
        raise IndexError("parser")

    engine = make(step_s=0.005)
    monkeypatch.setattr(ToolCallParser, "push", broken)
    other = engine.submit(ask(20))
    prompt = ChatPrompt((Message("user", "1 + 1?"),))
    tools = ToolUse((ToolDefinition("add"),))
    faulty = GenerateRequest(prompt=prompt, tool_use=tools, max_new_tokens=100, id="same")
    error = failure(engine.submit(faulty))
    assert type(error) is RequestFailedError and "IndexError: parser" in error.problem
    # What the process still says of it is no answer to whoever asks next under its id.
    wait_until(lambda: "same" not in engine._open._ending)
    assert text_of(list(engine.submit(ask(5, id="same")))) == words(5)
    assert text_of(list(other)) == words(20)
    wait_until(lambda: engine.stats().running == 0)


SCRIPT = """
import json, os, signal, sys, threading, time
from pathlib import Path
from tests.engine.toy_engine import ask, open_toy, text_of, words
{body}
"""


def start(body: str, folder: Path, **more: Any) -> subprocess.Popen[str]:
    code = SCRIPT.format(body=textwrap.dedent(body))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
        **more,
    )


@pytest.mark.parametrize(
    "busy", ["", "stream = engine.submit(ask(200))", 'engine.submit(ask(tenant="hang"))']
)
def test_the_process_dies_with_its_parent(tmp_path: Path, busy: str) -> None:
    body = f"""
        engine = open_toy(Path(sys.argv[1]))
        {busy}
        print(engine.process_id, flush=True)
        time.sleep(1000)
    """
    with start(body, toy_folder(tmp_path / "model", step_s=0.01)) as parent:
        assert parent.stdout is not None
        process_id = int(parent.stdout.readline())
        assert running(process_id)
        parent.kill()
        wait_until(lambda: not running(process_id))


def test_a_program_that_ends_without_closing_is_not_kept_waiting(tmp_path: Path) -> None:
    body = """
        engine = open_toy(Path(sys.argv[1]))
        engine.submit(ask(tenant="hang"))
        print(engine.process_id, flush=True)
    """
    with start(body, toy_folder(tmp_path / "model")) as parent:
        assert parent.stdout is not None
        process_id = int(parent.stdout.readline())
        assert parent.wait(60) == 0
        wait_until(lambda: not running(process_id))


def test_a_program_without_standard_streams_has_an_engine_too(tmp_path: Path) -> None:
    """Its sockets get the numbers 0 to 2, which the process's own standard streams would replace."""
    body = """
        from ayllu.engine.engine_process import EngineProcess
        from ayllu.engine.messages import Open, Ready, to_engine
        from ayllu.engine.options import EngineOptions
        from tests.engine.toy_engine import TOY_WORKER
        heard, ended = [], threading.Event()
        opening = to_engine().pack(Open.of(Path(sys.argv[1]), EngineOptions()))
        for number in range(3):
            os.close(number)
        process = EngineProcess(TOY_WORKER, lambda _, message: heard.append(message), ended.set)
        process.send(opening)
        process.stop(60)
        process.how_it_ended()
        os._exit(7 if isinstance(heard[-1], Ready) else 8)
    """
    with start(body, toy_folder(tmp_path / "model")) as program:
        assert program.wait(120) == 7


def test_ctrl_c_reaches_the_parent_alone_from_the_first_moment_on(tmp_path: Path) -> None:
    """A terminal sends SIGINT to every process it started: also while the engine's is just beginning."""
    body = """
        interrupts = []
        signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))
        done = threading.Event()
        def press():
            while not done.wait(0.002):
                os.killpg(os.getpgid(0), signal.SIGINT)
        threading.Thread(target=press).start()
        engine = open_toy(Path(sys.argv[1]))
        assert text_of(list(engine.submit(ask(50)))) == words(50)
        done.set()
        assert engine.stats().restarts == 0
        assert len(interrupts) > 5
        engine.close()
        print("well")
    """
    folder = toy_folder(tmp_path / "model", step_s=0.002)
    with start(body, folder, start_new_session=True) as parent:
        assert parent.communicate(timeout=120)[0] == "well\n"


def test_the_process_may_be_started_from_a_thread_that_ends(make: Make) -> None:
    """Linux kills a child that asked to die with its parent when the thread that started it ends."""
    engines: list[NativeEngine] = []
    thread = threading.Thread(target=lambda: engines.append(make()))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert text_of(list(engines[0].submit(ask(2)))) == words(2)
    assert engines[0].stats().restarts == 0


def test_the_folder_where_a_person_is_cannot_replace_our_modules(tmp_path: Path) -> None:
    assert "-P" in WORKER_COMMAND and "-P" in TOY_WORKER
    (tmp_path / "ayllu").mkdir()
    (tmp_path / "ayllu" / "__init__.py").write_text("raise SystemExit('replaced')", encoding="utf-8")
    result = subprocess.run(
        [*WORKER_COMMAND, "0"], input="", cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "replaced" not in result.stderr


def llama4_folder(folder: Path) -> Path:
    """A small Llama 4 of random numbers that sees."""
    tokenizer = load_tokenizer(write_tiktoken(folder / "vocabulary"))
    config = dataclasses.replace(tiny_llama4(vision=True), vocab_size=tokenizer.vocab_size)
    assert config.vision is not None
    vision = dataclasses.replace(config.vision, patch_token_id=tokenizer.special_id("<|patch|>"))
    save_folder(random_checkpoint(dataclasses.replace(config, vision=vision), seed=2), folder / "model")
    return write_tiktoken(folder / "model")


def test_a_real_model_sees_embeds_and_comes_back_after_a_kill(tmp_path: Path) -> None:
    """The one test here that runs the worker of every day."""
    picture = io.BytesIO()
    Image.new("RGB", (112, 112), "red").save(picture, "PNG")
    prompt = ChatPrompt((user_message("what?", [picture.getvalue()]),))
    greedy = Sampling(temperature=0)
    options = EngineOptions(dtype="float32", slots=2)
    with open_engine(llama4_folder(tmp_path), options, restart_policy=PATIENT) as engine:
        answers = []
        for _ in range(2):
            request = GenerateRequest(
                prompt=prompt, sampling=greedy, max_new_tokens=8, ignore_stop_tokens=True
            )
            events = list(engine.submit(request))
            assert isinstance(events[-1], Done), events[-1]
            answers.append([event.token_ids for event in events if isinstance(event, TextDelta)])
            kill(engine)
            wait_until(lambda: engine.status == "restarting")
        assert answers[0] == answers[1]
        vectors = engine.embed(EmbedRequest(inputs=("hello", "world")))
        assert len(vectors.vectors) == 2 and engine.stats().restarts == 2
        assert engine.info.reads_images and engine.info.generates


def test_an_encoder_has_an_engine_that_embeds_and_does_not_answer(minilm_folder: Path) -> None:
    with open_engine(minilm_folder) as engine:
        near, same, far = engine.embed(EmbedRequest(inputs=("a cat", "a cat", "stock prices"))).vectors
        assert near == same
        assert sum(a * b for a, b in zip(near, far, strict=True)) < 0.5
        assert not engine.info.generates
        for attempt in (lambda: engine.submit(ask()), lambda: engine.files):
            with pytest.raises(UsageError, match="does not answer"):
                attempt()


def test_plain_text_and_conversations_reach_the_same_core(make: Make) -> None:
    engine = make()
    chat = GenerateRequest(prompt=ChatPrompt((Message("user", "hi"),)), max_new_tokens=2)
    plain = GenerateRequest(prompt=TextPrompt("hi"), max_new_tokens=2)
    assert text_of(list(engine.submit(chat))) == text_of(list(engine.submit(plain))) == words(2)
