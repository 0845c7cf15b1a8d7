"""One call to a model, from admission to its last event: the way that every endpoint's requests take.

The engine says its events in a thread of its own; here they come out in the event loop, as many at a time as
have come. Whoever leaves the block ends what is still computed for it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from itertools import chain, groupby
from typing import TYPE_CHECKING

from ayllu.engine.events import TERMINAL, AnswerFinished, Done, Event, Failed, TextDelta
from ayllu.engine.openai.requests import GenerateCall
from ayllu.engine.protocol import Engine, Stream
from ayllu.engine.requests import ChatPrompt, GenerateRequest, InfillPrompt, TextPrompt, TokenPrompt
from ayllu.errors import AylluError, EngineUnavailableError, OverloadedError
from ayllu.server.shapes import ServerEvent, Shape

if TYPE_CHECKING:
    from ayllu.server.access import Identity
    from ayllu.server.limits import Limiter, Ticket
    from ayllu.server.metrics import Metrics, Watch
    from ayllu.server.models import Lease, ModelPool
    from ayllu.server.telemetry import Telemetry

UNLIMITED_ANSWER = 1024
"""Tokens charged beforehand for an answer whose length nobody limited."""

CHARACTERS_PER_TOKEN = 3
IMAGE_TOKENS = 1024
GATHER_S = 0.005
MOST_GATHER_S = 0.05
"""Text of an answer waits so long for more, times the answers under way: with many, sending every token at
once would take more of the processor than a fifth of what computing it does."""


class Generation:
    """The events of one call under way. Iterate over it for what has come since the last time."""

    def __init__(
        self, call: GenerateCall, watches: Sequence[Watch], pace: Callable[[], float] = lambda: 0.0
    ) -> None:
        """pace: seconds for which text may be gathered now."""
        self.call = call
        self.prompt_tokens = self.new_tokens = self.cached_tokens = 0
        self.reasons: list[str] = []
        self._watches = watches
        self._pace = pace
        self._loop = asyncio.get_running_loop()
        self._pending: deque[tuple[int, Event]] = deque()
        self._arrival: asyncio.Future[None] | None = None
        self._notified = False
        self._open = len(call.requests)
        self._told_tokens = 0
        self.streams: list[Stream] = []

    def receiver(self, part: int) -> Callable[[Event], None]:
        """What takes the events of engine request `part`, from any thread."""

        def deliver(event: Event) -> None:
            self._pending.append((part, event))
            if not self._notified or isinstance(event, TERMINAL):
                self._notified = True
                with suppress(RuntimeError):  # the loop has ended, and with it whoever would read this
                    self._loop.call_soon_threadsafe(self._wake)

        return deliver

    def _wake(self) -> None:
        arrival = self._arrival
        if arrival is not None and not arrival.done():
            arrival.set_result(None)

    def used_tokens(self, asked: int) -> int:
        """Tokens read and made. What was left half-way counts as it was asked, or as what it told if that
        is more: an answer without a limit is asked for as a short one."""
        if not self._open:
            return self.prompt_tokens + self.new_tokens
        return max(asked, self._told_tokens) if self.streams else 0

    async def batches(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """Everything, in order; a failed part raises its error."""
        while self._open:
            while not self._pending:  # woken late, there may be nothing left
                self._arrival = self._loop.create_future()
                self._notified = False
                if not self._pending:
                    await self._arrival
                self._arrival = None
            taken = self._take()
            for place, (part, event) in enumerate(taken):
                self._watches[part].event(event)
                if isinstance(event, Failed):
                    if place:
                        yield taken[:place]
                    raise event.error
                if isinstance(event, Done):
                    self.prompt_tokens += event.prompt_tokens
                    self.new_tokens += event.new_tokens
                    self.cached_tokens += event.cached_tokens
                elif isinstance(event, TextDelta):
                    self._told_tokens += len(event.token_ids)
                elif isinstance(event, AnswerFinished):
                    self.reasons.append(event.reason)
                self._open -= isinstance(event, TERMINAL)
            yield taken
            if self._open and isinstance(taken[-1][1], TextDelta) and (pace := self._pace()):
                await self._pause(pace)

    async def _pause(self, pace: float) -> None:
        """Until the next beat, the same for all calls: one waking for all of them disturbs what computes less
        than one for each. The end of an answer does not wait."""
        self._arrival = self._loop.create_future()
        now = self._loop.time()
        beat = self._loop.call_at(now + pace - now % pace, self._wake)
        try:
            await self._arrival
        finally:
            beat.cancel()
            self._arrival = None

    def _take(self) -> list[tuple[int, Event]]:
        """All that waits; text that came in several pieces meanwhile, as for a slow reader, becomes one."""
        arrived = [self._pending.popleft() for _ in range(len(self._pending))]
        return [_joined(list(pieces)) for _, pieces in groupby(arrived, _place)]

    def fail(self, error: AylluError) -> None:
        """End the call with an error of the server's own."""
        self.receiver(0)(Failed(error))

    def cancel(self) -> None:
        """End what is still computed."""
        for stream in self.streams:
            stream.cancel()


def _place(arrived: tuple[int, Event]) -> object:
    """What text that follows in the same answer has in common; anything else has nothing."""
    part, event = arrived
    return (part, event.index) if isinstance(event, TextDelta) else object()


def _joined(pieces: list[tuple[int, Event]]) -> tuple[int, Event]:
    """Pieces of one text as one, all at once: a slow reader's are many."""
    if len(pieces) == 1:
        return pieces[0]
    texts = [event for _, event in pieces if isinstance(event, TextDelta)]
    whole = TextDelta(
        texts[0].index,
        "".join([one.text for one in texts]),
        tuple(chain.from_iterable([one.token_ids for one in texts])),
        tuple(chain.from_iterable([one.logprobs for one in texts])),
    )
    return pieces[0][0], whole


class Generator:
    """Takes calls: who asks, may they, which model, and then the engine."""

    def __init__(
        self,
        models: ModelPool,
        limiter: Limiter,
        metrics: Metrics,
        telemetry: Telemetry,
        threads: Executor,
    ) -> None:
        self.models = models
        self.stopping = False
        self.open: set[Generation] = set()
        self._limiter = limiter
        self._metrics = metrics
        self._telemetry = telemetry
        self._threads = threads

    @asynccontextmanager
    async def generate(
        self, identity: Identity, call: GenerateCall, held: Ticket | None = None
    ) -> AsyncIterator[Generation]:
        """The call under way. Raises what refuses it: UnknownModelError, OverloadedError, as the engine.

        held: what `admit_call` gave for it before.
        """
        self.require_running()
        self.models.resolve(call.model)
        answers = sum(one.n for one in call.requests)
        cost = _cost(call)
        arrived = time.monotonic()
        ticket = self.admit_call(identity, call) if held is None else held
        with ExitStack() as ending:
            ending.callback(ticket.release)
            ending.callback(ticket.settle, 0)  # for what was refused; what began is settled before this
            async with self.models.lease(call.model) as lease:
                call = replace(
                    call, requests=tuple(replace(one, adapter=lease.adapter) for one in call.requests)
                )
                with self._telemetry.chat(
                    lease.name,
                    operation="chat" if call.kind == "chat" else "text_completion",
                    max_tokens=call.requests[0].max_new_tokens,
                    answers=answers,
                ) as span:
                    async with self._computing(lease, call, arrived) as generation:
                        try:
                            yield generation
                        finally:
                            ticket.settle(generation.used_tokens(cost))
                            span.ended(
                                prompt_tokens=generation.prompt_tokens,
                                new_tokens=generation.new_tokens,
                                cached_tokens=generation.cached_tokens,
                                finish_reasons=generation.reasons,
                            )

    @asynccontextmanager
    async def _computing(self, lease: Lease, call: GenerateCall, arrived: float) -> AsyncIterator[Generation]:
        """The call, handed to the engine; whoever leaves the block ends what is still computed."""
        watches = [
            self._metrics.started(
                lease.name, params_n=one.n, params_max_tokens=one.max_new_tokens, arrived=arrived
            )
            for one in call.requests
        ]
        generation = Generation(call, watches, self._gather_s)
        self.open.add(generation)
        outcome: str | AylluError = "abort"
        try:
            for part, one in enumerate(call.requests):
                await self._submit(lease.engine, generation, part, one)
            yield generation
            outcome = "stop"
        except AylluError as error:
            outcome = error
            raise
        finally:
            self.open.discard(generation)
            generation.cancel()
            for watch in watches:
                watch.ended(outcome)

    def _gather_s(self) -> float:
        return min(GATHER_S * (len(self.open) - 1), MOST_GATHER_S)

    def fail_all(self, error: AylluError) -> None:
        """End everything that is open with `error`."""
        for generation in list(self.open):
            generation.fail(error)

    def require_running(self) -> None:
        """Raises EngineUnavailableError once the server is about to stop."""
        if self.stopping:
            raise EngineUnavailableError("The server is stopping.", "Try again when it has started again.")

    def admit_call(self, identity: Identity, call: GenerateCall) -> Ticket:
        """A place for `call`, to be released by whoever takes it. Raises OverloadedError."""
        return self._admit(identity, _cost(call), sum(one.n for one in call.requests))

    @contextmanager
    def admitted(self, identity: Identity, tokens: int, answers: int = 1) -> Iterator[Ticket]:
        """A place among those that are served. Raises OverloadedError."""
        ticket = self._admit(identity, tokens, answers)
        try:
            yield ticket
        finally:
            ticket.release()

    def _admit(self, identity: Identity, tokens: int, answers: int) -> Ticket:
        key = identity.key
        try:
            return self._limiter.admit(
                identity.user_id,
                None if key is None else key.id,
                tokens=tokens,
                own=identity.user.limits,
                key_own={} if key is None else key.limits,
                answers=answers,
            )
        except OverloadedError:
            self._metrics.refused("limit")
            raise

    async def _submit(
        self, engine: Engine, generation: Generation, part: int, request: GenerateRequest
    ) -> None:
        """In a thread: rendering, tokenising and checking a grammar take their time."""
        submitting = asyncio.get_running_loop().run_in_executor(
            self._threads, engine.submit, request, generation.receiver(part)
        )
        try:
            generation.streams.append(await asyncio.shield(submitting))
        except asyncio.CancelledError:
            submitting.add_done_callback(_cancel_late)
            raise
        except OverloadedError:
            self._metrics.refused("engine")
            raise


def _cancel_late(submitting: asyncio.Future[Stream]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()


def _cost(call: GenerateCall) -> int:
    """Tokens that the call may take, before anything is tokenised."""
    return sum(
        _prompt_tokens(one) + one.n * (UNLIMITED_ANSWER if one.max_new_tokens is None else one.max_new_tokens)
        for one in call.requests
    )


def _prompt_tokens(request: GenerateRequest) -> int:
    match request.prompt:
        case ChatPrompt(messages):
            images = sum(len(message.parts) for message in messages) - len(messages)
            characters = sum(len(message.text) for message in messages)
            return characters // CHARACTERS_PER_TOKEN + max(images, 0) * IMAGE_TOKENS + 8 * len(messages)
        case TextPrompt(text):
            return len(text) // CHARACTERS_PER_TOKEN + 1
        case TokenPrompt(token_ids):
            return len(token_ids)
        case InfillPrompt(prefix, suffix):
            return (len(prefix) + len(suffix)) // CHARACTERS_PER_TOKEN + 1


async def streamed(
    generator: Generator, identity: Identity, call: GenerateCall, shape: Shape, held: Ticket | None = None
) -> AsyncGenerator[list[ServerEvent]]:
    """What goes to the client of a streamed call. What refuses the call is raised before the first batch, so
    that it can still become an error status; a later error becomes the stream's end."""
    async with generator.generate(identity, call, held) as generation:
        yield [*shape.opening()]
        try:
            async for batch in generation.batches():
                said = [event for part, one in batch for event in shape.add(part, one)]
                if said:
                    yield said
            yield [*shape.closing()]
        except AylluError as error:
            yield [*shape.failed(error)]
            raise


async def collected(generator: Generator, identity: Identity, call: GenerateCall, shape: Shape) -> None:
    """Take everything into `shape`, whose `result` is then valid."""
    async with generator.generate(identity, call) as generation:
        for _ in shape.opening():
            pass
        async for batch in generation.batches():
            for part, event in batch:
                for _ in shape.add(part, event):
                    pass
        for _ in shape.closing():
            pass
