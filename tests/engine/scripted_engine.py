"""An engine without a model, for tests of what stands above engines: its answers come from a function.

It keeps the promises of the protocol: a bounded queue, events from its own threads, one terminal event each.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from ayllu.engine.events import AnswerFinished, Done, Event, Failed, Started, TextDelta
from ayllu.engine.protocol import Embeddings, EngineInfo, EngineStats, Stream
from ayllu.engine.requests import ChatPrompt, EmbedRequest, GenerateRequest, InfillPrompt, TextPrompt
from ayllu.errors import AylluError, EngineUnavailableError, OverloadedError

Script = Callable[[GenerateRequest], Iterable[Event]]


def prompt_text(request: GenerateRequest) -> str:
    """What the request says: its last message, its text (with its gap as …), or its tokens as numbers."""
    if isinstance(request.prompt, ChatPrompt):
        return request.prompt.messages[-1].text
    if isinstance(request.prompt, InfillPrompt):
        return f"{request.prompt.prefix}…{request.prompt.suffix}"
    return request.prompt.text if isinstance(request.prompt, TextPrompt) else str(request.prompt.token_ids)


def shout(request: GenerateRequest) -> Iterable[Event]:
    """Answers with the prompt in capitals, a letter at a time; one token a letter."""
    text = prompt_text(request)
    yield Started(len(text))
    for index in range(request.n):
        for number, letter in enumerate(text.upper()):
            yield TextDelta(index, letter, (number,))
        yield AnswerFinished(index, "stop", len(text))
    yield Done(len(text), request.n * len(text), 1)


class ScriptedEngine:
    """`slots` requests at a time, `waiting` more in the queue. A script that raises fails its request."""

    def __init__(
        self, script: Script = shout, *, slots: int = 2, waiting: int = 64, model: str = "tiny"
    ) -> None:
        self.info = EngineInfo(model=model, context=None, facts={"device": "cpu", "slots": slots})
        self.notes = ()
        self.submitted: Counter[str] = Counter()
        self.most_open = 0
        self.loaded: dict[str, Path] = {}
        self.closed = False
        self._script = script
        self._room = slots + waiting
        self._open = 0
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[GenerateRequest, Stream, threading.Event]] = queue.SimpleQueue()
        for _ in range(slots):
            # Daemons: a script may wait for ever, and the program must end all the same.
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, request: GenerateRequest, deliver: Callable[[Event], None] | None = None) -> Stream:
        if self.closed:
            raise EngineUnavailableError("The engine is closed.", "Open it again.")
        with self._lock:
            if self._open + request.n > self._room:
                raise OverloadedError("The queue is full.", retry_after_s=0.01)
            self._open += request.n
            self.most_open = max(self.most_open, self._open)
            self.submitted[prompt_text(request)] += 1
        cancelled = threading.Event()
        stream = Stream(request.id, cancelled.set, deliver)
        self._queue.put((request, stream, cancelled))
        return stream

    def _work(self) -> None:
        while True:
            self._play(*self._queue.get())

    def _play(self, request: GenerateRequest, stream: Stream, cancelled: threading.Event) -> None:
        last: Event
        try:
            for event in self._script(request):
                if cancelled.is_set():
                    break
                if isinstance(event, Done | Failed):
                    last = event
                    break
                stream.put(event)
            if cancelled.is_set():
                last = Done(0, 0)
        except AylluError as error:
            last = Failed(error)
        with self._lock:
            self._open -= request.n
        stream.put(last)

    def embed(self, request: EmbedRequest) -> Embeddings:
        vectors = tuple((float(len(text)), 0.5) for text in request.inputs)
        return Embeddings(vectors, sum(map(len, request.inputs)))

    def stats(self) -> EngineStats:
        return EngineStats(running=self._open)

    def load_adapter(self, name: str, path: Path) -> None:
        self.loaded[name] = path

    def unload_adapter(self, name: str) -> None:
        del self.loaded[name]

    def adapters(self) -> tuple[str, ...]:
        return tuple(self.loaded)

    def close(self) -> None:
        self.closed = True
