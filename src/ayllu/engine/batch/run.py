"""Runs the requests of a batch through an engine: many at a time, never more than it will queue.

One thread reads lines, starts requests and writes answers; the engine's threads only drop events into its
queue. What is a request's own fault becomes its answer. What is the engine's is tried again, and ends the
batch before it can burn through the rest of the file: the next run goes on from there.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

from ayllu.engine.batch.file import Line
from ayllu.engine.batch.output import Output
from ayllu.engine.events import TERMINAL, Event
from ayllu.engine.openai.body import InvalidBodyError
from ayllu.engine.openai.requests import ENDPOINTS, Call, EmbedCall, GenerateCall, for_model
from ayllu.engine.openai.results import Collected, embeddings_body, error_body, response_body
from ayllu.engine.protocol import Embeddings, Engine, Stream
from ayllu.engine.requests import EmbedRequest, GenerateRequest, new_request_id
from ayllu.errors import (
    AccessError,
    AylluError,
    EngineCrashedError,
    EngineUnavailableError,
    OverloadedError,
    RemoteEngineError,
    RequestFailedError,
    UnknownModelError,
)

PATIENCE_S = 120.0
"""How long an engine with nothing to do for this batch may refuse its requests before the batch gives up."""

LEAST_PAUSE_S = 0.05

MOST_FAILURES_IN_A_ROW = 16
"""Requests that may fail one after the other by the engine's fault before the batch stops."""

SPARE_REQUESTS = 4


def most_in_flight(slots: int) -> int:
    """Sequences to keep open for an engine of so many slots: each slot's next one waits, and a few spare."""
    return 2 * slots + SPARE_REQUESTS


@dataclass
class Tally:
    """What a run has done so far. failed: answered with an error."""

    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0


@dataclass(eq=False)
class _Job:
    """A line under way: one request, or several prompts of one body."""

    line: Line
    call: Call
    created: int
    results: dict[int, Collected] = field(default_factory=dict)
    ended: bool = False


@dataclass(eq=False)
class _Part:
    """One request of a job. alone: it runs with nothing beside it, because it may have crashed the engine."""

    job: _Job
    position: int
    request: GenerateRequest | EmbedRequest
    alone: bool = False
    failures: int = 0
    stream: Stream | None = None

    @property
    def sequences(self) -> int:
        return self.request.n if isinstance(self.request, GenerateRequest) else len(self.request.inputs)


_News = tuple[_Part, Event | Embeddings | BaseException]


class BatchRun:
    """One pass over the requests of a batch.

    models: names that mean the engine's model, the first of them the one shown in answers; adapters: names of
    loaded adapters. limit: most sequences in flight; a single larger request runs by itself. progress is
    called with the tally after each answer.
    """

    def __init__(
        self,
        engine: Engine,
        output: Output,
        *,
        models: Collection[str],
        adapters: Collection[str] = (),
        limit: int,
        progress: Callable[[Tally], None] = lambda tally: None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.tally = Tally()
        self._engine = engine
        self._output = output
        self._models = tuple(models)
        self._adapters = tuple(adapters)
        self._limit = limit
        self._progress = progress
        self._patience_s = patience_s
        self._news: queue.SimpleQueue[_News] = queue.SimpleQueue()
        self._ready: deque[_Part] = deque()
        self._open: set[_Part] = set()
        self._not_before = 0.0
        self._refused_since: float | None = None
        self._failures_in_a_row = 0

    def run(self, lines: Iterable[Line]) -> Tally:
        """Answer all `lines`; those that are done already must not be among them.

        Raises what ends the batch: EngineUnavailableError, AccessError or UnknownModelError of a server,
        EngineCrashedError or RemoteEngineError when they do not end, and what `Output.write` raises. Whatever
        it raises, open requests are cancelled.
        """
        remaining = iter(lines)
        try:
            while self._start_what_fits(remaining) or self._open or self._ready:
                self._take_news()
        finally:
            for part in self._open:
                if part.stream is not None:
                    part.stream.cancel()
        return self.tally

    def _start_what_fits(self, lines: Iterator[Line]) -> bool:
        """Start requests while there is room; whether lines may remain."""
        while time.monotonic() >= self._not_before:
            if not self._ready:
                if self._in_flight >= self._limit:
                    return True
                line = next(lines, None)
                if line is None:
                    return False
                self._admit(line)
            elif self._has_room_for(self._ready[0]):
                self._start(self._ready.popleft())
            else:
                break
        return True

    @property
    def _in_flight(self) -> int:
        return sum(part.sequences for part in self._open)

    def _has_room_for(self, part: _Part) -> bool:
        if not self._open:
            return True
        if part.alone or any(other.alone for other in self._open):
            return False
        return self._in_flight + part.sequences <= self._limit

    def _admit(self, line: Line) -> None:
        """Understand a line and put its requests in order, or answer it with what is wrong with it."""
        try:
            if line.error is not None:
                raise line.error
            call = for_model(ENDPOINTS[line.url](line.body), self._models, self._adapters)
            if isinstance(call, GenerateCall) and call.stream:
                raise InvalidBodyError(
                    "A batch is not streamed.",
                    "Leave stream out.",
                    param="stream",
                    code="unsupported_parameter",
                )
        except AylluError as error:
            self._answer(line, error.http_status, new_request_id(), error_body(error))
            return
        job = _Job(line, call, int(time.time()))
        requests: list[GenerateRequest | EmbedRequest] = (
            [call.request] if isinstance(call, EmbedCall) else [*call.requests]
        )
        self._ready += [_Part(job, position, request) for position, request in enumerate(requests)]

    def _start(self, part: _Part) -> None:
        if part.job.ended:
            return
        request = part.request
        self._open.add(part)
        if isinstance(request, EmbedRequest):
            threading.Thread(target=self._embed, args=(part, request), daemon=True).start()
            return
        part.job.results[part.position] = Collected(request)
        try:
            part.stream = self._engine.submit(request, lambda event: self._news.put((part, event)))
        except AylluError as error:
            self._open.remove(part)
            self._fail(part, error)

    def _embed(self, part: _Part, request: EmbedRequest) -> None:
        try:
            self._news.put((part, self._engine.embed(request)))
        except BaseException as error:  # handed to the thread that can act on it
            self._news.put((part, error))

    def _take_news(self) -> None:
        """Wait for an event, or until what the engine asked to wait for is over; and act on it."""
        pause = self._not_before - time.monotonic()
        try:
            part, news = (
                self._news.get(timeout=pause) if pause > 0 else self._news.get(block=bool(self._open))
            )
        except queue.Empty:
            return
        if isinstance(news, Embeddings):
            self._open.remove(part)
            self._embedded(part, news)
        elif isinstance(news, AylluError):
            self._open.remove(part)
            self._fail(part, news)
        elif isinstance(news, BaseException):
            raise news
        else:
            self._heard(part, news)

    def _heard(self, part: _Part, event: Event) -> None:
        result = part.job.results[part.position]
        if part.job.ended and not isinstance(event, TERMINAL):
            return
        result.add(event)
        if not isinstance(event, TERMINAL):
            return
        self._open.remove(part)
        if result.error is not None:
            self._fail(part, result.error)
            return
        job = part.job
        self._moved()
        assert isinstance(job.call, GenerateCall)
        parts = [job.results.get(position) for position in range(len(job.call.requests))]
        if job.ended or any(other is None or other.done is None for other in parts):
            return
        whole = [other for other in parts if other is not None]
        body = response_body(job.call, whole, model=self._model_of(job), created=job.created)
        self.tally.prompt_tokens += body["usage"]["prompt_tokens"]
        self.tally.new_tokens += body["usage"]["completion_tokens"]
        job.ended = True
        self._answer(job.line, 200, whole[0].request.id, body)

    def _embedded(self, part: _Part, made: Embeddings) -> None:
        job = part.job
        assert isinstance(job.call, EmbedCall)
        try:
            body = embeddings_body(job.call, made, model=self._model_of(job))
        except (InvalidBodyError, RequestFailedError) as error:
            self._give_up(part, error)
            return
        self._moved()
        job.ended = True
        self.tally.prompt_tokens += made.prompt_tokens
        self._answer(job.line, 200, job.call.request.id, body)

    def _model_of(self, job: _Job) -> str:
        return job.call.model or self._models[0]

    def _moved(self) -> None:
        self._refused_since = None
        self._failures_in_a_row = 0

    def _fail(self, part: _Part, error: AylluError) -> None:
        """Decide what becomes of a request that failed: again later, again alone, answered, or the end."""
        if part.job.ended:
            return
        if isinstance(error, AccessError | UnknownModelError):
            # The server refuses the key, or does not have the model: every request would hear the same.
            raise error
        if isinstance(error, OverloadedError | EngineUnavailableError):
            self._wait(part, error)
        elif isinstance(error, EngineCrashedError | RemoteEngineError) and part.failures == 0:
            # What was open when the engine crashed is tried one by one: so the one that crashes it again
            # takes nobody along.
            part.alone = isinstance(error, EngineCrashedError)
            part.failures += 1
            self._again(part)
        else:
            self._give_up(part, error)

    def _wait(self, part: _Part, error: OverloadedError | EngineUnavailableError) -> None:
        pause = error.retry_after_s if isinstance(error, OverloadedError) else 1.0
        now = time.monotonic()
        if self._open or self._refused_since is None:
            # What is open will end some time and make room, however long it takes.
            self._refused_since = now
        if now - self._refused_since < self._patience_s:
            pause = min(max(pause, LEAST_PAUSE_S), self._patience_s)
            self._not_before = max(self._not_before, now + pause)
            self._again(part)
        elif isinstance(error, OverloadedError):
            self._give_up(part, error)
        else:
            raise error

    def _again(self, part: _Part) -> None:
        part.request = replace(part.request, id=new_request_id())
        part.stream = None
        self._ready.appendleft(part)

    def _give_up(self, part: _Part, error: AylluError) -> None:
        part.job.ended = True
        for other in self._open:
            if other.job is part.job and other.stream is not None:
                other.stream.cancel()
        self._answer(part.job.line, error.http_status, part.request.id, error_body(error))
        if not isinstance(error, EngineCrashedError | RemoteEngineError):
            return
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= MOST_FAILURES_IN_A_ROW:
            raise error

    def _answer(self, line: Line, status: int, request_id: str, body: dict[str, object]) -> None:
        self._output.write(line, status, request_id, body)
        self.tally.answered += 1
        self.tally.failed += status >= 400
        self._progress(self.tally)
