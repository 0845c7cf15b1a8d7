"""What is open at the engine's process and what waits for one: requests by their id, questions by a ticket.

All bookkeeping of the native engine is here, under one lock that is never held while anything is waited for
or told. A crash ends what had been sent with a typed error; what had not waits for the next process.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ayllu.engine.channel import MAX_FRAME_BYTES, ChannelError, Packed
from ayllu.engine.engine_process import EngineProcess
from ayllu.engine.events import TERMINAL, AnswerFinished, Done, Event, Failed
from ayllu.engine.messages import (
    Answered,
    Cancel,
    Embedded,
    Events,
    FromEngine,
    LoadAdapter,
    StatsTold,
    Submit,
    ToEngine,
    to_engine,
)
from ayllu.engine.options import EngineOptions
from ayllu.engine.preparation import Prepared, PublicEvents
from ayllu.engine.prepared import CoreFacts
from ayllu.engine.protocol import Stream
from ayllu.errors import (
    AylluError,
    EngineCrashedError,
    EngineUnavailableError,
    OverloadedError,
    UsageError,
    clip,
)

MAX_UNSENT_BYTES = 1 << 30
"""Bytes that may wait on their way to the engine's process: what it does not take must not fill memory."""


@dataclass(eq=False)
class _OpenRequest:
    stream: Stream
    public: PublicEvents
    prompt_tokens: int
    answers: int
    unfinished: int


class _Question:
    """Something asked, to be answered once. (A `Future` would have every program load `logging`.)"""

    def __init__(self) -> None:
        self._answered = threading.Event()
        self._answer: object = None

    def answer(self, answer: object) -> None:
        """Give the answer; an AylluError is raised where it is waited for."""
        self._answer = answer
        self._answered.set()

    def wait(self) -> Any:
        """Wait for the answer. Raises it if it is an error."""
        self._answered.wait()
        if isinstance(self._answer, AylluError):
            raise self._answer
        return self._answer


class OpenRequests:
    """The `Listener` of a native engine's supervisor. Every method may be called from any thread; only `ask`
    waits. notes: what a person should know of restarts."""

    def __init__(self, options: EngineOptions) -> None:
        self.notes: tuple[str, ...] = ()
        self._most_waiting = options.waiting
        self._slots = 0
        self._lock = threading.Lock()
        self._process: EngineProcess | None = None
        self._unavailable: EngineUnavailableError | None = None
        self._closed = False
        self._requests: dict[str, _OpenRequest] = {}
        self._questions: dict[str | int, _Question] = {}
        self._backlog: dict[str | int, Packed] = {}
        # Given up here, while the process has not said its last word of them: their ids are not free yet.
        self._ending: set[str | int] = set()
        self._adapters: dict[str, Path] = {}
        self._loading_again: dict[int, str] = {}
        self._tickets = itertools.count()

    def require_room(self, sequences: int) -> None:
        """Raises EngineUnavailableError, or OverloadedError if so many more would be too many."""
        with self._lock:
            self._require_room(sequences)

    def submit(self, prepared: Prepared, stream: Stream) -> None:
        """Open a request. Raises as `require_room`, and UsageError."""
        request = prepared.request
        message = _packed(Submit.of(request))
        with self._lock:
            self._require_room(request.n, message.nbytes)
            self._require_new(request.id)
            self._requests[request.id] = _OpenRequest(
                stream, prepared.public, len(request.token_ids), request.n, request.n
            )
            self._send(request.id, message)

    def ask(self, key: str | int, message: ToEngine) -> Any:
        """Send a message and wait for what answers it. Raises its error, or that of the engine's end."""
        packed, question = _packed(message), _Question()
        with self._lock:
            self._require_room(0, packed.nbytes)
            self._require_new(key)
            self._questions[key] = question
            self._send(key, packed)
        try:
            return question.wait()
        finally:
            # Left early, by Ctrl-C, it is a question that nobody asks any more.
            with self._lock:
                if self._questions.pop(key, None) is not None and isinstance(key, str):
                    self._give_up(key)

    def ticket(self) -> int:
        """A number for a question."""
        return next(self._tickets)

    def cancel(self, request_id: str) -> None:
        """End a request soon, if it is open."""
        with self._lock:
            request = self._requests.get(request_id)
            if request is None:
                return
            if request_id not in self._backlog:
                if self._process is not None:
                    self._process.send(_packed(Cancel(request_id)))
                return
            del self._backlog[request_id], self._requests[request_id]
        for index in range(request.answers):
            _put(request.stream, AnswerFinished(index, "cancelled", 0))
        _put(request.stream, Done(request.prompt_tokens, 0))

    def waiting(self) -> int | None:
        """Sequences that wait for a process; None while there is one."""
        with self._lock:
            if self._process is not None:
                return None
            if self._unavailable is not None:
                raise _again(self._unavailable)
            return sum(request.answers for request in self._requests.values())

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that every new process loads."""
        return tuple(self._adapters)

    def note_adapter(self, name: str, path: Path | None) -> None:
        """Remember which adapters are to be loaded into every new process; None forgets one."""
        with self._lock:
            if path is None:
                self._adapters.pop(name, None)
            else:
                self._adapters[name] = path

    def reopen(self) -> None:
        """Take requests again: another process is on its way."""
        with self._lock:
            if not self._closed:
                self._unavailable = None

    def close(self) -> None:
        """Refuse what comes, and end what is open."""
        with self._lock:
            self._closed = True
        self.gave_up(EngineUnavailableError("The engine is closed.", "Open it again."))

    @property
    def has_open_work(self) -> bool:
        """See `Listener`."""
        return bool(self._requests or self._questions or self._loading_again)

    def started(self, process: EngineProcess, facts: CoreFacts) -> None:
        """See `Listener`. What waited goes out, after the adapters that were there before."""
        with self._lock:
            if self._closed:
                return
            self._slots = facts.slots
            self._process = process
            self._unavailable = None
            for name, path in self._adapters.items():
                ticket = self.ticket()
                self._loading_again[ticket] = name
                process.send(_packed(LoadAdapter.of(ticket, name, path)))
            for message in self._backlog.values():
                process.send(message)
            self._backlog.clear()

    def received(self, message: FromEngine) -> None:
        """See `Listener`."""
        match message:
            case Events(events):
                for event in events:
                    self._take_event(event.request_id, event.event)
            case Embedded(request_id, vectors):
                self._answer(request_id, vectors)
            case StatsTold(ticket, stats):
                self._answer(ticket, stats)
            case Answered(ticket, report):
                error = None if report is None else report.error()
                if ticket in self._loading_again:
                    self._loaded_again(ticket, error)
                else:
                    self._answer(ticket, error)

    def lost(self, error: EngineCrashedError, *, was_ready: bool) -> None:
        """See `Listener`. What had not been sent waits for the next process, unless none came to be ready."""
        with self._lock:
            self._process = None
            self._loading_again.clear()
            self._ending.clear()
            if not was_ready:
                self._backlog.clear()
            ended = self._take_all_but(self._backlog)
        _fail(ended, error)

    def gave_up(self, error: EngineUnavailableError) -> None:
        """See `Listener`."""
        with self._lock:
            self._process = None
            self._unavailable = error
            self._backlog.clear()
            ended = self._take_all_but(())
        _fail(ended, error)

    def _require_room(self, sequences: int, nbytes: int = 0) -> None:
        if self._unavailable is not None:
            raise _again(self._unavailable)
        taken = sum(request.unfinished for request in self._requests.values())
        if sequences and taken + sequences > self._slots + self._most_waiting:
            raise OverloadedError(
                f"The queue is full: {taken} sequences are open, "
                f"{self._slots} are computed together and {self._most_waiting} may wait."
            )
        if nbytes > MAX_FRAME_BYTES:
            raise UsageError(
                f"The request has {nbytes} bytes, at most {MAX_FRAME_BYTES} are possible.",
                "Send fewer images at once.",
            )
        waiting = self._backlog.values()
        unsent = sum(m.nbytes for m in waiting) if self._process is None else self._process.unsent_bytes
        if unsent and unsent + nbytes > MAX_UNSENT_BYTES:
            raise OverloadedError(f"{unsent} bytes of requests are still on their way to the engine.")

    def _require_new(self, key: str | int) -> None:
        if key in self._requests or key in self._questions or key in self._ending:
            raise UsageError(f"A request {clip(key)} is open already.", "Give each request its own id.")

    def _send(self, key: str | int, message: Packed) -> None:
        if self._process is None:
            self._backlog[key] = message
        else:
            self._process.send(message)

    def _give_up(self, key: str) -> None:
        """Under the lock: have no more of a request that was taken off the lists."""
        if self._backlog.pop(key, None) is None and self._process is not None:
            self._ending.add(key)
            self._process.send(_packed(Cancel(key)))

    def _take_event(self, request_id: str, event: Event) -> None:
        last = isinstance(event, TERMINAL)
        with self._lock:
            request = self._requests.get(request_id)
            if request_id in self._ending and last:
                self._ending.remove(request_id)
        if request is None:
            if isinstance(event, Failed):
                self._answer(request_id, event.error)
            return
        try:
            said = request.public.of(event)
            failed = False
        except AylluError as error:
            # The answer is of no use: what is left of it need not be computed.
            said, failed = [Failed(error)], True
        with self._lock:
            request.unfinished -= sum(isinstance(public, AnswerFinished) for public in said)
            if last or failed:
                self._requests.pop(request_id, None)
            if failed and not last:
                self._give_up(request_id)
        if not all(_put(request.stream, public) for public in said):
            with self._lock:
                if self._requests.pop(request_id, None) is not None:
                    self._give_up(request_id)

    def _answer(self, key: str | int, answer: object) -> None:
        with self._lock:
            question = self._questions.pop(key, None)
            self._ending.discard(key)
        if question is not None:
            question.answer(answer)

    def _loaded_again(self, ticket: int, error: AylluError | None) -> None:
        with self._lock:
            name = self._loading_again.pop(ticket)
            if error is not None:
                self._adapters.pop(name, None)
                self.notes += (f"The adapter {name} is lost since a restart: {error.problem}",)

    def _take_all_but(self, kept: Container[str | int]) -> list[_OpenRequest | _Question]:
        requests = [self._requests.pop(key) for key in list(self._requests) if key not in kept]
        questions = [self._questions.pop(key) for key in list(self._questions) if key not in kept]
        return [*requests, *questions]


def _fail(ended: list[_OpenRequest | _Question], error: EngineCrashedError | EngineUnavailableError) -> None:
    for one in ended:
        if isinstance(one, _Question):
            one.answer(_again(error))
        else:
            _put(one.stream, Failed(_again(error)))


def _packed(message: ToEngine) -> Packed:
    try:
        return to_engine().pack(message)
    except ChannelError as error:
        raise UsageError(f"The request cannot be passed on: {clip(error)}.", "Send valid text.") from error


def _put(stream: Stream, event: Event) -> bool:
    """Hand an event over. False where whoever asked cannot take it: a closed event loop, for example."""
    try:
        stream.put(event)
    except Exception:
        return False
    return True


def _again(error: EngineCrashedError | EngineUnavailableError) -> AylluError:
    """A copy, as one exception raised in several threads would mix their tracebacks."""
    return type(error)(error.problem, error.fix)
