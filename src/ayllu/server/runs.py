"""Runs: answers that belong to the server. Whoever asked may leave, come back and read on from any event.

A run's events are numbered. They are kept in memory while it runs and stored as they come, so that readers
resume here, on another connection, or after the server was killed; its last event is told only once it is
stored, so nothing that a client took for finished can be lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ayllu.errors import AylluError, ConflictError, NotFoundError, RequestFailedError
from ayllu.server.generation import Generator, streamed
from ayllu.server.responses.bodies import ResponsesCall
from ayllu.server.responses.shape import ResponseShape, partial_response
from ayllu.server.shapes import ServerEvent
from ayllu.server.state import conversations
from ayllu.server.state import runs as stored
from ayllu.server.state.records import Run, RunStatus

if TYPE_CHECKING:
    from ayllu.server.access import Identity
    from ayllu.server.limits import Ticket
    from ayllu.server.metrics import Metrics
    from ayllu.server.state.database import Database

STORE_EVERY_S = 0.25
PAGE = 500
MOST_RUNS_OF_A_USER = 64
"""Runs of one user under way at a time."""

FINAL = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")
_log = logging.getLogger("ayllu.server")


@dataclass
class LiveRun:
    """A run under way, and what it has said. refusal: why it never began."""

    id: str
    user_id: str
    shape: ResponseShape
    durable: bool
    ticket: Ticket | None = None
    events: list[ServerEvent] = field(default_factory=list)
    stored: int = 0
    ended: bool = False
    task: asyncio.Task[None] | None = None
    cancelled: bool = False
    refusal: AylluError | None = None
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)

    def give_back(self) -> None:
        """The place of a run that never got to use it."""
        if self.ticket is not None:
            self.ticket.settle(0)
            self.ticket.release()

    def say(self, events: Iterable[ServerEvent]) -> None:
        self.events.extend(events)
        self.wake()

    def wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()

    async def follow(self, after: int) -> AsyncGenerator[list[ServerEvent]]:
        """Events with numbers above `after`, as they come, to the last."""
        position = after + 1
        while True:
            if position < len(self.events):
                batch = self.events[position:]
                position += len(batch)
                yield batch
            elif self.ended:
                return
            else:
                waiter = asyncio.get_running_loop().create_future()
                self._waiting.append(waiter)
                await waiter


class Runs:
    """All runs of this server."""

    def __init__(self, database: Database, generator: Generator, metrics: Metrics) -> None:
        self._database = database
        self._generator = generator
        self._metrics = metrics
        self._live: dict[str, LiveRun] = {}

    @property
    def open(self) -> int:
        """Runs under way."""
        return len(self._live)

    async def recover(self) -> list[Run]:
        """After a start: what ran when the server ended is marked so, with what it had said."""
        return await self._database.run(_recovered)

    async def start(
        self,
        identity: Identity,
        call: ResponsesCall,
        shape: ResponseShape,
        *,
        run_id: str,
        kind: str,
        model: str,
        request: dict[str, Any],
        durable: bool,
        store: bool = True,
    ) -> LiveRun:
        """Start a run. durable: it is stored before it begins and as it goes, and outlives its connection.

        kind 'message': its answer becomes a message of the conversation that `request` names.
        """
        self._generator.require_running()
        if sum(run.user_id == identity.user_id for run in self._live.values()) >= MOST_RUNS_OF_A_USER:
            raise ConflictError(
                f"{MOST_RUNS_OF_A_USER} runs of this user are under way.", "Wait for one, or cancel one."
            )
        # What is to be stored is let in before: a refusal leaves nothing behind.
        ticket = self._generator.admit_call(identity, call.generate) if durable else None
        live = LiveRun(run_id, identity.user_id, shape, durable, ticket=ticket)
        # Before anything is waited for: many requests at once would all find room otherwise.
        self._live[run_id] = live
        if durable:
            try:
                await self._database.run(
                    lambda db: stored.create(
                        db, user_id=identity.user_id, kind=kind, model=model, request=request, id=run_id
                    )
                )
            except BaseException:
                del self._live[run_id]
                live.give_back()
                raise
        self._metrics.runs_open(len(self._live))
        record = _Record(kind, model, request, store or durable)
        live.task = asyncio.create_task(self._drive(live, identity, call, record), name=f"run {run_id}")
        return live

    async def follow(self, run_id: str, user_id: str, after: int) -> AsyncGenerator[list[ServerEvent]]:
        """A run's events with numbers above `after`: of one under way, or as stored. Raises NotFoundError."""
        live = self._live_of(run_id, user_id)
        if live is not None:
            return live.follow(after)
        await self._database.run(lambda db: stored.get(db, run_id, user_id), read=True)
        return self._stored(run_id, user_id, after)

    async def _stored(self, run_id: str, user_id: str, after: int) -> AsyncGenerator[list[ServerEvent]]:
        while True:
            page = await self._database.run(
                partial(stored.events, run_id=run_id, user_id=user_id, after=after, limit=PAGE), read=True
            )
            if not page:
                return
            after = page[-1][0]
            yield [ServerEvent.of(event, event.get("type")) for _, event in page]

    async def get(self, run_id: str, user_id: str) -> dict[str, Any]:
        """The response as far as it is. Raises NotFoundError."""
        live = self._live_of(run_id, user_id)
        if live is not None:
            return live.shape.snapshot("in_progress")
        run = await self._database.run(lambda db: stored.get(db, run_id, user_id), read=True)
        if run.result is None:
            raise NotFoundError("There is no such response.", "Check its id.")
        return run.result

    async def cancel(self, run_id: str, user_id: str) -> dict[str, Any]:
        """End a run, and wait until it has ended. One that has ended already stays as it is."""
        live = self._live_of(run_id, user_id)
        if live is not None:
            await self.stop(live)
        return await self.get(run_id, user_id)

    async def stop(self, live: LiveRun) -> None:
        """End a run that is under way."""
        live.cancelled = True
        if live.task is not None and not live.task.done():
            live.task.cancel()
            await asyncio.wait((live.task,))

    async def delete(self, run_id: str, user_id: str) -> None:
        """Forget a run, ended first if it is under way. Raises NotFoundError."""
        live = self._live_of(run_id, user_id)
        if live is not None:
            await self.stop(live)
        await self._database.run(lambda db: stored.delete(db, run_id, user_id))

    async def close(self, within_s: float) -> None:
        """Let runs under way end for so long, then end them; they are marked as interrupted."""
        tasks = [run.task for run in self._live.values() if run.task is not None]
        if tasks and within_s > 0:
            await asyncio.wait(tasks, timeout=within_s)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _live_of(self, run_id: str, user_id: str) -> LiveRun | None:
        live = self._live.get(run_id)
        if live is None:
            return None
        if live.user_id != user_id:
            raise NotFoundError("There is no such response.", "Check its id.")
        return live

    async def _drive(self, live: LiveRun, identity: Identity, call: ResponsesCall, record: _Record) -> None:
        storing = asyncio.create_task(self._store_as_it_goes(live)) if live.durable else None
        status: RunStatus = "completed"
        last: list[ServerEvent] = []
        error: dict[str, Any] | None = None
        try:
            events = streamed(self._generator, identity, call.generate, live.shape, live.ticket)
            async with contextlib.aclosing(events):
                async for batch in events:
                    if batch and batch[-1].name in FINAL:
                        last = list(batch)
                    else:
                        live.say(batch)
        except asyncio.CancelledError:
            status = "cancelled" if live.cancelled else "interrupted"
            last = last or [*live.shape.cancelled()]
        except AylluError as failure:
            status, error = "failed", {"message": str(failure), "type": type(failure).__name__}
            live.refusal = None if live.events or last else failure
            last = last or [*live.shape.failed(failure)]
        except Exception:
            _log.exception("run %s failed", live.id)
            status, failed = "failed", RequestFailedError("The run failed.", "This is an error in ayllu.")
            error = {"message": str(failed), "type": "RequestFailedError"}
            last = [*live.shape.failed(failed)]
        # Whatever cancels from here on must not keep the end from being stored.
        # Nor may this task end before it: whoever stopped the run waits for this one, and reads it then.
        ending = asyncio.create_task(self._end(live, record, storing, status, error, last))
        while not ending.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(ending)

    async def _end(
        self,
        live: LiveRun,
        record: _Record,
        storing: asyncio.Task[None] | None,
        status: RunStatus,
        error: dict[str, Any] | None,
        last: Sequence[ServerEvent],
    ) -> None:
        live.closing.set()
        live.give_back()
        try:
            if storing is not None:
                await storing
            result = _response_in(last) or live.shape.snapshot("failed")
            if status == "completed" and result.get("status") in ("incomplete", "cancelled"):
                status = result["status"]
            if record.store and (live.durable or live.refusal is None):
                await self._store_end(live, record, status, result, error, last)
        except Exception:
            # Whatever it was: readers must not wait for ever.
            _log.exception("the end of run %s could not be stored", live.id)
        live.ended = True
        live.say(last)
        self._live.pop(live.id, None)
        self._metrics.runs_open(len(self._live))

    async def _store_end(
        self,
        live: LiveRun,
        record: _Record,
        status: RunStatus,
        result: dict[str, Any],
        error: dict[str, Any] | None,
        last: Sequence[ServerEvent],
    ) -> None:
        first = live.stored
        unstored = [*live.events[first:], *last]

        def store(db: Any) -> None:
            if not live.durable:
                stored.create(
                    db,
                    user_id=live.user_id,
                    kind=record.kind,
                    model=record.model,
                    request=record.request,
                    id=live.id,
                )
            _append(db, live.id, first, unstored)
            stored.finish(db, live.id, status, result, error)
            if record.kind == "message":
                _answer(db, live.id, live.user_id, record.request, result)

        await self._database.run(store)

    async def _store_as_it_goes(self, live: LiveRun) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(live.closing.wait(), STORE_EVERY_S)
            if live.closing.is_set():
                return
            first = live.stored
            fresh = live.events[first:]
            if not fresh:
                continue
            try:
                await self._database.run(partial(_append, run_id=live.id, first=first, events=fresh))
            except AylluError:
                _log.exception("events of run %s could not be stored yet", live.id)
                continue
            live.stored = first + len(fresh)


@dataclass(frozen=True)
class _Record:
    kind: str
    model: str
    request: dict[str, Any]
    store: bool


def _response_in(events: Sequence[ServerEvent]) -> dict[str, Any] | None:
    if not events or events[-1].name not in FINAL:
        return None
    response: dict[str, Any] = json.loads(events[-1].data)["response"]
    return response


def _answer(db: Any, run_id: str, user_id: str, request: dict[str, Any], result: dict[str, Any]) -> None:
    """Put an answer into its conversation, as far as it went: in the very transaction that ends the run, so
    that there are never one and a half."""
    content = [
        part
        for item in result.get("output", [])
        if item.get("type") == "message"
        for part in item.get("content", [])
    ]
    if not content and result.get("status") != "completed":
        return
    conversation_id, parent_id = request["conversation_id"], request["parent_id"]
    # The conversation may be gone by now, or full: the run has ended all the same.
    with contextlib.suppress(NotFoundError, ConflictError):
        message = conversations.add_message(
            db, conversation_id, user_id, parent_id, "assistant", content, run_id
        )
        conversations.update(db, conversation_id, user_id, head_id=message.id)


def _append(db: Any, run_id: str, first: int, events: Sequence[ServerEvent]) -> None:
    stored.append(db, run_id, first, [json.loads(event.data) for event in events])


def _recovered(db: Any) -> list[Run]:
    interrupted = stored.interrupt_all(db, lambda run: _said(db, run))
    for run in interrupted:
        if run.kind == "message" and run.result is not None:
            _answer(db, run.id, run.user_id, run.request, run.result)
    return interrupted


def _said(db: Any, run: Run) -> dict[str, Any] | None:
    events: list[dict[str, Any]] = []
    after = -1
    while page := stored.events(db, run.id, run.user_id, after, PAGE):
        events += [event for _, event in page]
        after = page[-1][0]
    if not events or "response" not in events[0]:
        return None
    return partial_response(events[0]["response"], events, "incomplete")
