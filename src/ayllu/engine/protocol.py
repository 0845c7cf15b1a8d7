"""The one thing upper rooms see of generation: an `Engine` takes requests and answers with typed events.

`native` runs a model in a process of its own here; `remote` speaks to any OpenAI-compatible server. Whoever
holds an `Engine` cannot tell which, and need not.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from ayllu.engine.events import TERMINAL, Event, Failed
from ayllu.engine.requests import EmbedRequest, GenerateRequest, PromptInput, ToolUse


class Stream:
    """The events of one request, in order, ending with `Done` or `Failed`. Iterate over it from one thread.

    An engine may be asked to call `deliver` with each event instead, from its own thread: that suits an event
    loop, which passes `loop.call_soon_threadsafe`. Then there is nothing to iterate over.
    """

    def __init__(self, request_id: str, cancel: Callable[[], None], deliver: Callable[[Event], None] | None):
        self.request_id = request_id
        self._cancel = cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._deliver = deliver or self._events.put
        self._lock = threading.Lock()
        self._ended = False

    def put(self, event: Event) -> None:
        """For engines: hand over an event. What comes after a terminal event is dropped."""
        with self._lock:
            if self._ended:
                return
            self._ended = isinstance(event, TERMINAL)
        self._deliver(event)

    @property
    def ended(self) -> bool:
        """Whether the terminal event has been handed over."""
        return self._ended

    def cancel(self) -> None:
        """End the request soon: open answers finish with the reason 'cancelled'. Idempotent."""
        if not self._ended:
            self._cancel()

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, TERMINAL):
                return

    def results(self) -> Iterator[Event]:
        """As iterating, but a `Failed` raises its error."""
        for event in self:
            if isinstance(event, Failed):
                raise event.error
            yield event


@dataclass(frozen=True)
class Embeddings:
    """One vector per input, in order, and the tokens that were read."""

    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int


@dataclass(frozen=True)
class EngineInfo:
    """What an engine is. context: tokens of prompt and answer together (None: not told). kind: what it can
    do. facts: names and values to show to a person (device, precision, memory plan)."""

    model: str
    context: int | None
    generates: bool = True
    embeds: bool = True
    reads_images: bool = False
    facts: dict[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineStats:
    """Counts at one moment, and totals since the engine started. Block counts are per kind of layer. drafted:
    tokens that were computed before they were drawn; accepted: those of them that were then drawn."""

    waiting: int = 0
    running: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    new_tokens: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    preempted: int = 0
    steps: int = 0
    retried_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    restarts: int = 0
    blocks_total: dict[str, int] = field(default_factory=dict)
    blocks_free: dict[str, int] = field(default_factory=dict)
    blocks_cached: dict[str, int] = field(default_factory=dict)


class Engine(Protocol):
    """Generates, embeds, tells how it is doing. Every method may be called from any thread."""

    @property
    def info(self) -> EngineInfo: ...

    def submit(self, request: GenerateRequest, deliver: Callable[[Event], None] | None = None) -> Stream:
        """Start a request. What can be refused at once (impossible, too large, overloaded) is raised here;
        what goes wrong later is a `Failed` event."""

    def embed(self, request: EmbedRequest) -> Embeddings:
        """Vectors of texts; waits for them."""

    def stats(self) -> EngineStats: ...

    def load_adapter(self, name: str, path: Path) -> None:
        """Make a LoRA adapter available to requests by name, while serving."""

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter once the requests that use it have ended."""

    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""

    def close(self) -> None:
        """End the engine; open requests fail with EngineUnavailableError. Idempotent."""


@runtime_checkable
class TokenCounter(Protocol):
    """What an engine can do besides where it has the model's vocabulary; see `openai.tokenize`."""

    def token_ids(
        self,
        prompt: PromptInput,
        tool_use: ToolUse | None = None,
        *,
        add_special_tokens: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The prompt as the model would read it, rendered by its chat format where it is a conversation.

        add_special_tokens: with what the model wants around a text (BOS). add_generation_prompt: with the
        opening of an answer. It may be longer than the context. Raises as `Engine.submit`.
        """

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token. Raises UsageError for an id outside the vocabulary."""

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of the tokens in a row, control tokens by their names. Raises as `token_bytes`."""
