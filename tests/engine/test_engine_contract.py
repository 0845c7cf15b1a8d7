"""What every engine promises, asked of each: the same requests, the same order of events, the same errors.

"remote" speaks to a real llama.cpp server, "native" runs the model here; where they may differ (which tokens,
how text is cut into pieces, what is refused at once and what later), nothing is asked.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ayllu.chat.messages import Message, ToolCall, ToolDefinition, user_message
from ayllu.chat.tokenizer import Tokenizer, tokenizer_from_gguf
from ayllu.engine.events import (
    TERMINAL,
    AnswerFinished,
    Done,
    Event,
    Failed,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallMade,
)
from ayllu.engine.options import EngineOptions
from ayllu.engine.parameters import Sampling
from ayllu.engine.protocol import Engine
from ayllu.engine.remote.endpoint import RemoteEndpoint
from ayllu.engine.remote.engine import RemoteEngine
from ayllu.engine.requests import (
    ChatPrompt,
    ChoiceStructure,
    EmbedRequest,
    GenerateRequest,
    JsonStructure,
    TextPrompt,
    TokenPrompt,
    ToolUse,
)
from ayllu.errors import (
    AylluError,
    ContextOverflowError,
    EngineUnavailableError,
    UnknownModelError,
    UnsupportedError,
    UsageError,
)
from ayllu.weights.checkpoint import open_checkpoint
from tests.engine.llama_server import MODEL, SLOT_CONTEXT, SLOTS, llama_server

HANG_GUARD_S = 120.0
GREEDY = Sampling(temperature=0.0, top_p=1.0)
CHAT = ChatPrompt((user_message("What is the capital of France?"),))
COUNTING = TextPrompt("1, 2, 3, 4, 5, 6, 7, 8,")

OpenEngine = Callable[[], Engine]


@pytest.fixture(scope="module", params=["remote", "native"])
def open_engine(request: pytest.FixtureRequest, smollm2_gguf: Path) -> Iterator[OpenEngine]:
    """Opens one more engine of the kind in turn; all are closed at the end."""
    with ExitStack() as closing:
        if request.param == "remote":
            address = closing.enter_context(llama_server(smollm2_gguf))
            endpoint = RemoteEndpoint(base_url=address, model=MODEL, dialect="llama.cpp")

            def open_one() -> Engine:
                return RemoteEngine(endpoint)

        else:
            native = pytest.importorskip("ayllu.engine.native")

            def open_one() -> Engine:
                options = EngineOptions(context=SLOT_CONTEXT, slots=SLOTS)
                engine: Engine = native.open_engine(smollm2_gguf, options)
                return engine

        def open_and_close_later() -> Engine:
            engine = open_one()
            closing.callback(engine.close)
            return engine

        yield open_and_close_later


@pytest.fixture(scope="module")
def engine(open_engine: OpenEngine) -> Engine:
    return open_engine()


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return tokenizer_from_gguf(open_checkpoint(smollm2_gguf).metadata, smollm2_gguf)


def ask(engine: Engine, **fields: Any) -> list[Event]:
    """The events of a request, checked for their order; a refusal at once counts as one at the end."""
    request = GenerateRequest(**{"prompt": CHAT, "sampling": GREEDY, "max_new_tokens": 24, **fields})
    try:
        events = list(engine.submit(request))
    except AylluError as error:
        return [Failed(error)]
    check_order(events, request.n)
    return events


def check_order(events: list[Event], n: int) -> None:
    """`Started`; per answer pieces and then its end; `Done`. A failure may cut it short anywhere."""
    assert isinstance(events[-1], TERMINAL), events
    if isinstance(events[-1], Failed):
        events = events[:-1]
    else:
        assert isinstance(events[0], Started)
        assert [type(event) for event in events].count(AnswerFinished) == n
    ended: set[int] = set()
    calls: dict[int, int] = {}
    for event in events[1:]:
        assert not isinstance(event, Started | Failed)
        if isinstance(event, TextDelta | ToolCallMade | AnswerFinished):
            assert 0 <= event.index < n
            assert event.index not in ended
        if isinstance(event, ToolCallMade):
            assert event.call_index == calls.get(event.index, 0)
            calls[event.index] = event.call_index + 1
        if isinstance(event, AnswerFinished):
            ended.add(event.index)


def text_of(events: list[Event], index: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta) and event.index == index)


def ends_of(events: list[Event]) -> list[AnswerFinished]:
    ends = [event for event in events if isinstance(event, AnswerFinished)]
    return sorted(ends, key=lambda end: end.index)


def error_of(events: list[Event]) -> AylluError:
    last = events[-1]
    assert isinstance(last, Failed), events
    return last.error


def test_a_greedy_answer_is_the_same_every_time(engine: Engine) -> None:
    # Not the capital of France: "The" and "L'" are within 0.1 of each other there, less than rounding moves.
    first, second = (ask(engine, prompt=COUNTING) for _ in range(2))
    assert text_of(first).startswith(" 9, 10")
    assert text_of(first) == text_of(second)
    done = first[-1]
    assert isinstance(done, Done)
    assert done.prompt_tokens > 5
    assert done.new_tokens == ends_of(first)[0].new_tokens > 0


def test_the_limit_ends_an_answer_with_the_reason_length(engine: Engine) -> None:
    events = ask(engine, max_new_tokens=5, ignore_stop_tokens=True)
    assert [(end.reason, end.new_tokens) for end in ends_of(events)] == [("length", 5)]


def test_a_stop_string_is_cut_off_and_reported(engine: Engine) -> None:
    events = ask(engine, prompt=COUNTING, stop=("never seen", "11"))
    assert text_of(events) == " 9, 10, "
    assert [(end.reason, end.stop) for end in ends_of(events)] == [("stop", "11")]


def test_text_and_tokens_of_a_prompt_are_the_same_prompt(engine: Engine, tokenizer: Tokenizer) -> None:
    tokens = tuple(tokenizer.encode(COUNTING.text))
    by_text = ask(engine, prompt=COUNTING, max_new_tokens=6)
    by_tokens = ask(engine, prompt=TokenPrompt(tokens), max_new_tokens=6)
    assert text_of(by_text) == text_of(by_tokens) == " 9, 10"
    done = by_tokens[-1]
    assert isinstance(done, Done)
    assert done.prompt_tokens == len(tokens)


def test_several_answers_to_one_prompt(engine: Engine) -> None:
    events = ask(engine, n=3, sampling=Sampling(temperature=1.5, seed=3), max_new_tokens=12)
    assert [end.index for end in ends_of(events)] == [0, 1, 2]
    assert len({text_of(events, index) for index in range(3)}) > 1
    done = events[-1]
    assert isinstance(done, Done)
    assert done.new_tokens == sum(end.new_tokens for end in ends_of(events))


def test_a_seed_fixes_the_draws(engine: Engine) -> None:
    def drawn(seed: int) -> str:
        return text_of(ask(engine, sampling=Sampling(temperature=1.2, seed=seed), max_new_tokens=10))

    assert drawn(5) == drawn(5)
    assert len({drawn(seed) for seed in range(10, 15)}) > 1


def test_log_probabilities_with_the_likeliest_others(engine: Engine) -> None:
    events = ask(engine, logprobs=3, max_new_tokens=6, prompt=COUNTING)
    deltas = [event for event in events if isinstance(event, TextDelta)]
    tokens: list[TokenLogprob] = [token for delta in deltas for token in delta.logprobs]
    assert len(tokens) == 6
    assert b"".join(token.token_bytes for token in tokens).decode() == text_of(events)
    for token in tokens:
        assert token.logprob <= 0.0
        assert 1 <= len(token.alternatives) <= 3
        assert all(left.logprob >= right.logprob for left, right in pairwise(token.alternatives))
        # Drawn greedily, the token is the likeliest one.
        assert token.alternatives[0].token_bytes == token.token_bytes
        assert math.isclose(token.alternatives[0].logprob, token.logprob, abs_tol=1e-4)
    alone = ask(engine, logprobs=0, max_new_tokens=2, prompt=COUNTING)
    singles = [token for event in alone if isinstance(event, TextDelta) for token in event.logprobs]
    assert [token.alternatives for token in singles] == [(), ()]


def test_an_answer_follows_its_json_schema(engine: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "large": {"type": "boolean"}},
        "required": ["city", "large"],
        "additionalProperties": False,
    }
    events = ask(engine, structure=JsonStructure(schema), max_new_tokens=80)
    value = json.loads(text_of(events))
    assert set(value) == {"city", "large"}
    assert isinstance(value["large"], bool)


def test_an_answer_is_one_of_the_choices(engine: Engine) -> None:
    choices = ('"Rome"\n', "C:\\Ñandú", "Oslo")
    assert text_of(ask(engine, structure=ChoiceStructure(choices))) in choices


def test_a_demanded_tool_call_is_made(engine: Engine) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = (ToolDefinition("weather", "The weather of a city.", parameters), ToolDefinition("time"))
    earlier = [
        message
        for city in ("Rome", "Oslo", "Lima")
        for message in (
            user_message(f"Weather in {city}?"),
            Message("assistant", "", (ToolCall("weather", {"city": city}, f"call{city}"),)),
        )
    ]
    prompt = ChatPrompt((*earlier, user_message("Weather in Paris?")))
    events = ask(engine, prompt=prompt, tool_use=ToolUse(tools, "weather", parallel=False), max_new_tokens=80)
    calls = [event.call for event in events if isinstance(event, ToolCallMade)]
    assert [call.name for call in calls] == ["weather"]
    assert set(calls[0].arguments) == {"city"}
    assert calls[0].id
    assert ends_of(events)[0].reason == "tool_calls"


def test_a_cancelled_request_ends_with_what_it_has(engine: Engine) -> None:
    before = engine.stats().cancelled
    stream = engine.submit(
        GenerateRequest(prompt=CHAT, sampling=GREEDY, max_new_tokens=1500, ignore_stop_tokens=True)
    )
    events: list[Event] = []
    for event in stream:
        events.append(event)
        if isinstance(event, TextDelta) and event.text:
            stream.cancel()
    check_order(events, 1)
    assert isinstance(events[-1], Done)
    (end,) = ends_of(events)
    assert end.reason == "cancelled"
    assert 0 < end.new_tokens < 1500
    assert engine.stats().cancelled == before + 1


def test_an_unknown_adapter_is_refused(engine: Engine) -> None:
    refusals = (UnknownModelError, UnsupportedError, UsageError)
    assert isinstance(error_of(ask(engine, adapter="nobody loaded this")), refusals)


def test_an_empty_prompt_is_refused(engine: Engine) -> None:
    assert isinstance(error_of(ask(engine, prompt=TextPrompt(""))), UsageError)


def test_a_prompt_longer_than_the_context_is_refused(engine: Engine) -> None:
    context = engine.info.context
    assert context == SLOT_CONTEXT
    too_long = TokenPrompt((20,) * (context + 1))
    assert isinstance(error_of(ask(engine, prompt=too_long)), ContextOverflowError)


def test_streams_of_many_threads_do_not_mix(engine: Engine) -> None:
    words = [f"word number {number}" for number in range(3 * SLOTS)]
    with ThreadPoolExecutor(len(words)) as threads:
        answers = threads.map(lambda word: text_of(ask(engine, structure=ChoiceStructure((word,)))), words)
        assert list(answers) == words


def test_events_can_be_delivered_instead(engine: Engine) -> None:
    delivered: list[Event] = []
    ended = threading.Event()

    def deliver(event: Event) -> None:
        delivered.append(event)
        if isinstance(event, TERMINAL):
            ended.set()

    engine.submit(GenerateRequest(prompt=CHAT, sampling=GREEDY, max_new_tokens=24), deliver)
    assert ended.wait(HANG_GUARD_S)
    check_order(delivered, 1)
    assert text_of(delivered) == text_of(ask(engine))


def test_embeddings_have_unit_length_and_are_equal_for_equal_texts(engine: Engine) -> None:
    made = engine.embed(EmbedRequest(inputs=("a red house", "a red house", "stock prices fell")))
    first, second, other = made.vectors
    assert made.prompt_tokens > 6
    assert {len(vector) for vector in made.vectors} == {576}
    for vector in made.vectors:
        assert math.isclose(math.hypot(*vector), 1.0, abs_tol=1e-4)
    assert math.isclose(dot(first, second), 1.0, abs_tol=1e-4)
    assert dot(first, other) < 0.999


def dot(left: tuple[float, ...], right: tuple[float, ...]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def test_statistics_count_what_was_done(engine: Engine) -> None:
    before = engine.stats()
    events = ask(engine, max_new_tokens=4, ignore_stop_tokens=True)
    done = events[-1]
    assert isinstance(done, Done)
    after = engine.stats()
    assert after.finished == before.finished + 1
    assert after.new_tokens == before.new_tokens + 4
    assert after.prompt_tokens == before.prompt_tokens + done.prompt_tokens
    assert (after.running, after.waiting) == (0, 0)


def test_a_closed_engine_fails_what_is_open_and_takes_no_more(open_engine: OpenEngine) -> None:
    engine = open_engine()
    request = GenerateRequest(prompt=CHAT, sampling=GREEDY, max_new_tokens=1500, ignore_stop_tokens=True)
    stream = engine.submit(request)
    events = iter(stream)
    seen = [next(events)]
    engine.close()
    engine.close()
    seen += list(events)
    check_order(seen, 1)
    assert isinstance(error_of(seen), EngineUnavailableError)
    with pytest.raises(EngineUnavailableError):
        engine.submit(GenerateRequest(prompt=CHAT))
