"""`RemoteEngine`: the `Engine` protocol over any OpenAI-compatible server (vLLM, SGLang, llama.cpp, Azure,
another ayllu), for models that are too large for this machine or served by a cluster.

The same requests, events and errors as the native engine's; what a server cannot express is refused when the
request is submitted (see `request`). Nothing is retried once anything has been said.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import TracebackType

from ayllu.engine.events import TERMINAL, Done, Event, Failed
from ayllu.engine.protocol import Embeddings, EngineInfo, EngineStats, Stream
from ayllu.engine.remote.answer import AnswerReader
from ayllu.engine.remote.endpoint import RemoteEndpoint
from ayllu.engine.remote.errors import WorthRetrying, bare, error_in_stream, not_an_openai_server
from ayllu.engine.remote.line import MAX_ERROR_BYTES, RemoteLine, Running, closed, read_all
from ayllu.engine.remote.lists import adapters_of, embeddings_of, info_of
from ayllu.engine.remote.request import Call, embed_call, generate_call
from ayllu.engine.remote.sse import SseReader
from ayllu.engine.requests import EmbedRequest, GenerateRequest
from ayllu.errors import (
    AccessError,
    AylluError,
    OverloadedError,
    RemoteEngineError,
    RequestFailedError,
    UnknownModelError,
    UnsupportedError,
    UsageError,
    clip,
)

MAX_STREAM_BYTES = 1 << 30
MAX_EMBEDDING_BYTES = 1 << 28
MAX_LIST_BYTES = 16 << 20
_LIST_PATIENCE_S = 10.0
_DRAIN_S = 1.0


class _OpenRequest:
    """A request between its submission and its last event."""

    def __init__(
        self, request: GenerateRequest, endpoint: RemoteEndpoint, put: Callable[[Event], None]
    ) -> None:
        self.request = request
        self.put = put
        self.reader = AnswerReader(request, endpoint, put)
        self.running: Running | None = None
        self.cancel_asked = False


class RemoteEngine:
    """One model on one server. Opening it does not speak to the server; the first request does. Also a
    context manager.

    Events are delivered on the engine's one thread: a `deliver` that blocks holds up every stream.
    """

    def __init__(self, endpoint: RemoteEndpoint) -> None:
        self._endpoint = endpoint
        self._line = RemoteLine(endpoint)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._open: set[_OpenRequest] = set()
        self._embedding = 0
        self._leaving: set[str] = set()
        self._totals: Counter[str] = Counter()
        self._info: EngineInfo | None = None
        self._closed = False
        # Nobody has to close an engine for its thread to end.
        self._abandoned = weakref.finalize(self, self._line.abandon)
        self._abandoned.atexit = False

    @property
    def info(self) -> EngineInfo:
        """What the server says of the model (GET /models), asked once it is needed and until it answers.
        What it does not tell is taken to be possible: it refuses for itself."""
        if self._info is None and not self._closed and not self._line.is_own_thread:
            with contextlib.suppress(AylluError):
                # Azure lists what could be deployed, not what is.
                listed = None if self._endpoint.dialect == "azure" else self._line.call(self._models())
                self._info = info_of(self._endpoint, listed)
        return self._info or info_of(self._endpoint, None)

    def submit(self, request: GenerateRequest, deliver: Callable[[Event], None] | None = None) -> Stream:
        """Start a request; what comes of it over the network comes as events.

        Raises UnsupportedError for what the dialect cannot express, OverloadedError when too many requests
        are open, EngineUnavailableError when the engine is closed, UsageError and its kin for the impossible.
        """
        call = generate_call(request, self._endpoint)
        stream = Stream(request.id, lambda: self._cancel(opened), deliver)
        opened = _OpenRequest(request, self._endpoint, lambda event: self._put(opened, stream, event))
        with self._lock:
            if self._closed:
                raise closed()
            self._admit()
            if request.adapter in self._leaving:
                raise UnknownModelError(f"The adapter {request.adapter} is being unloaded.", "Load it again.")
            opened.running = self._line.start(
                self._generate(opened, call), lambda task: self._ended(opened, task)
            )
            self._open.add(opened)
        return stream

    def embed(self, request: EmbedRequest) -> Embeddings:
        """Vectors of texts; waits for them. Raises what a request over the network can come to."""
        call = embed_call(request, self._endpoint)
        with self._lock:
            if self._closed:
                raise closed()
            self._admit()
            self._embedding += 1
        try:
            found = self._line.call(self._embed(request, call))
        except AylluError:
            self._count(failed=1)
            raise
        finally:
            self._count(embedding=-1)
        self._count(finished=1, prompt_tokens=found.prompt_tokens)
        return found

    def stats(self) -> EngineStats:
        """Counts of this client, not of the server: waiting until the first piece of an answer."""
        with self._lock:
            running = sum(opened.reader.started for opened in self._open)
            return EngineStats(
                waiting=len(self._open) - running,
                running=running + self._embedding,
                prompt_tokens=self._totals["prompt_tokens"],
                cached_prompt_tokens=self._totals["cached_prompt_tokens"],
                new_tokens=self._totals["new_tokens"],
                finished=self._totals["finished"],
                failed=self._totals["failed"],
                cancelled=self._totals["cancelled"],
            )

    def load_adapter(self, name: str, path: Path) -> None:
        """Have vLLM load a LoRA adapter from `path` on its own disk (it must run with
        VLLM_ALLOW_RUNTIME_LORA_UPDATING=1). Raises UnsupportedError for other servers."""
        self._need_adapters()
        if not name:
            raise UsageError("The adapter has no name.", "Give one.")
        change = {"lora_name": name, "lora_path": str(path)}
        self._line.call(self._change_adapter("load_lora_adapter", change))

    def unload_adapter(self, name: str) -> None:
        """Have vLLM forget an adapter once this engine's requests that use it have ended; waits for them."""
        self._need_adapters()
        if self._line.is_own_thread:
            raise UsageError(
                "An adapter cannot be unloaded from a delivery of events.", "Use another thread."
            )
        with self._changed:
            self._leaving.add(name)
            self._changed.wait_for(
                lambda: not any(opened.request.adapter == name for opened in self._open) or self._closed
            )
        try:
            self._line.call(self._change_adapter("unload_lora_adapter", {"lora_name": name}))
        finally:
            with self._lock:
                self._leaving.discard(name)

    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters the server lists; none for servers other than vLLM."""
        if self._endpoint.dialect != "vllm":
            return ()
        return adapters_of(self._line.call(self._models()))

    def close(self) -> None:
        """Close the connections; open requests fail with EngineUnavailableError. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._abandoned.detach()
        self._line.close()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _admit(self) -> None:
        """Raises OverloadedError when no more may be open. Call it under the lock."""
        if len(self._open) + self._embedding >= self._endpoint.max_open:
            raise OverloadedError(
                f"{self._endpoint.max_open} requests to {self._endpoint.address} are open already.",
                "Wait for some to end, or raise max_open.",
            )

    def _put(self, opened: _OpenRequest, stream: Stream, event: Event) -> None:
        # Counted before it is delivered: whoever has seen the end of a request finds it in the statistics.
        if isinstance(event, TERMINAL) and not stream.ended:
            with self._changed:
                self._open.discard(opened)
                if isinstance(event, Done):
                    outcome = "cancelled" if opened.reader.was_cancelled else "finished"
                    self._totals[outcome] += 1
                    self._totals["prompt_tokens"] += event.prompt_tokens
                    self._totals["cached_prompt_tokens"] += event.cached_tokens
                    self._totals["new_tokens"] += event.new_tokens
                else:
                    self._totals["failed"] += 1
                self._changed.notify_all()
        stream.put(event)

    def _count(self, **changes: int) -> None:
        with self._lock:
            self._embedding += changes.pop("embedding", 0)
            self._totals.update(changes)

    def _cancel(self, opened: _OpenRequest) -> None:
        opened.cancel_asked = True
        if opened.running is not None:
            opened.running.cancel()

    def _ended(self, opened: _OpenRequest, task: asyncio.Task[None]) -> None:
        """The request's coroutine is over: what remains to be said. Runs on the line's thread."""
        # A `deliver` that raises ends its own request; there is nobody left to tell.
        with contextlib.suppress(Exception):
            if task.cancelled():
                if self._closed and not opened.cancel_asked:
                    opened.put(Failed(closed()))
                else:
                    opened.reader.cancelled()
                return
            error = task.exception()
            if isinstance(error, AylluError):
                bare(error)
                opened.put(Failed(error))
            elif error is not None:
                opened.put(
                    Failed(
                        RequestFailedError(f"A remote request failed inside ayllu: {error!r}.", "Report it.")
                    )
                )

    async def _generate(self, opened: _OpenRequest, call: Call) -> None:
        reader = opened.reader
        await self._line.attempts(
            lambda: self._stream_once(reader, call), may_retry=lambda: not reader.started
        )

    async def _stream_once(self, reader: AnswerReader, call: Call) -> None:
        try:
            async with self._line.response(call.path, call.body) as (response, pieces):
                await self._refuse_other_than_stream(response.headers.get("content-type", ""), pieces)
                await self._read(reader, pieces)
        except (WorthRetrying, RemoteEngineError):
            # Nothing is missing when the connection breaks between the last answer's end and "[DONE]".
            if not reader.is_complete:
                raise
        if not reader.started:
            empty = RemoteEngineError(f"{self._endpoint.address} sent an empty stream.", "Look at its log.")
            raise WorthRetrying(empty)
        reader.end()

    async def _refuse_other_than_stream(self, content_type: str, pieces: AsyncIterator[bytes]) -> None:
        kind = content_type.partition(";")[0].strip().lower()
        if kind == "text/event-stream":
            return
        body = await read_all(pieces, MAX_ERROR_BYTES)
        if body is not None and b'"error"' in body:
            raise error_in_stream(self._endpoint, body.decode("utf-8", errors="replace"))
        raise not_an_openai_server(self._endpoint, f"it sends {clip(kind, 40) or 'no type'} for a stream")

    async def _read(self, reader: AnswerReader, pieces: AsyncIterator[bytes]) -> None:
        """The stream up to its end, or until the server says that it is over."""
        events, received = SseReader(self._endpoint.max_event_bytes), 0
        async for piece in pieces:
            received += len(piece)
            if received > MAX_STREAM_BYTES:
                raise not_an_openai_server(self._endpoint, f"a stream of more than {MAX_STREAM_BYTES} bytes")
            for event in events.feed(piece):
                if event.kind == "error":
                    raise error_in_stream(self._endpoint, event.data)
                reader.take(event.data)
                if reader.ended:
                    # Once the end of the transfer is read, too, the connection can be used again.
                    with contextlib.suppress(Exception):
                        async with asyncio.timeout(_DRAIN_S):
                            await read_all(pieces, MAX_ERROR_BYTES)
                    return

    async def _embed(self, request: EmbedRequest, call: Call) -> Embeddings:
        async def once() -> bytes | None:
            async with self._line.response(call.path, call.body) as (_, pieces):
                return await read_all(pieces, MAX_EMBEDDING_BYTES)

        return embeddings_of(await self._line.attempts(once), request, self._endpoint)

    async def _models(self) -> bytes | None:
        """The server's list of models, or None when it has none to show."""
        try:
            async with asyncio.timeout(_LIST_PATIENCE_S):
                async with self._line.response("models") as (_, pieces):
                    return await read_all(pieces, MAX_LIST_BYTES)
        except (UsageError, UnsupportedError, AccessError):
            return None
        except WorthRetrying as failure:
            raise failure.error from None
        except TimeoutError:
            raise RemoteEngineError(
                f"{self._endpoint.address} does not list its models within {_LIST_PATIENCE_S:g} s.",
                "Try again, or look at its log.",
            ) from None

    async def _change_adapter(self, path: str, change: dict[str, str]) -> None:
        try:
            async with self._line.response(path, json.dumps(change).encode()) as (_, pieces):
                await read_all(pieces, MAX_ERROR_BYTES)
        except WorthRetrying as failure:
            raise failure.error from None
        except UnknownModelError as error:
            raise UnknownModelError(
                error.problem, "Load the adapter, and start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."
            ) from None

    def _need_adapters(self) -> None:
        if self._endpoint.dialect != "vllm":
            raise UnsupportedError(
                f"Adapters cannot be changed on a server of the dialect {self._endpoint.dialect!r}.",
                "Load them when the server starts.",
            )
