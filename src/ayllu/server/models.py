"""The models that a server has in memory: loaded when asked for, several at once, within a budget of bytes.

Room for one is made by unloading those that nobody uses, longest unused first; what is in use stays. A load
is shared by all who wait for it, and survives them. What fails to load is not tried again at every request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ayllu.engine.native import open_engine
from ayllu.engine.options import EngineOptions
from ayllu.engine.protocol import Engine
from ayllu.errors import (
    AylluError,
    ConflictError,
    EngineUnavailableError,
    UsageError,
)
from ayllu.server.model_memory import FIXED_BYTES, Estimate, MemoryEstimate
from ayllu.server.model_names import KnownModel, ModelNames, ResolvedModel
from ayllu.server.model_room import MemoryRoom, RoomError
from ayllu.server.model_slot import (
    LoadAbortedError,
    Loading,
    Opener,
    Slot,
    SlotStatus,
    in_daemon_thread,
    load_error,
    twin,
)
from ayllu.weights.installed import UNKNOWN_LICENCE, stated_licence
from ayllu.weights.store import Store

__all__ = ["Lease", "ModelPool", "ModelStatus", "ResolvedModel"]

CLOSE_WAIT_S = 10.0
"""Seconds that `close` waits for a load to notice."""

TICK_S, SHORTEST_TICK_S = 1.0, 0.1
"""Seconds between looks at what is idle and what is down."""

_log = logging.getLogger("ayllu.server")


@dataclass(frozen=True, kw_only=True)
class ModelStatus:
    """One model that is here. needs_bytes: what it takes of the budget when loaded, as far as is known.
    memory_bytes: what it takes now. What only an engine can tell is None until it was loaded once. Times in
    seconds since 1970; progress of loading from 0 to 1."""

    name: str
    status: SlotStatus
    size_bytes: int
    memory_bytes: int
    needs_bytes: int
    context: int | None
    reads_images: bool | None
    embeds: bool | None
    generates: bool | None
    loaded_at: float | None
    last_used_at: float | None
    open_requests: int
    progress: float | None
    error: str | None
    licence: str
    created: float | None
    facts: Mapping[str, str | int | float]
    adapters: tuple[str, ...]


@dataclass(frozen=True)
class Lease:
    """An engine that stays loaded as long as this is held."""

    engine: Engine
    name: str
    adapter: str | None = None


class ModelPool:
    """All models of one server. Used from one event loop; nothing is started before the first load.

    keep_alive_s: seconds that an unused model stays loaded, may be changed at any time.
    """

    def __init__(
        self,
        store: Store,
        *,
        options: Callable[[str], EngineOptions],
        budget_bytes: int,
        keep_alive_s: float,
        default_model: str | None = None,
        pinned: Sequence[tuple[str, Path]] = (),
        opener: Opener = open_engine,
        estimate: Estimate | None = None,
    ) -> None:
        self.keep_alive_s = keep_alive_s
        self._names = ModelNames(store, default_model, pinned)
        self._opener = opener
        self._slots: dict[str, Slot] = {}
        self._room = MemoryRoom(
            budget_bytes, self._slots, options, estimate or MemoryEstimate(), self._begin_closing
        )
        self._keeper: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def default_model(self) -> str | None:
        """What requests mean that name no model."""
        return self._names.default

    @property
    def budget_bytes(self) -> int:
        """Memory that all models may take together."""
        return self._room.budget_bytes

    @property
    def reserved_bytes(self) -> int:
        """What is taken of it."""
        return self._room.reserved_bytes

    def resolve(self, name: str | None) -> ResolvedModel:
        """What `name` means; loads nothing. Raises UnknownModelError; UsageError where a name is needed."""
        return self._names.resolve(name)

    def set_adapters(self, adapters: Mapping[str, tuple[str, Path]]) -> None:
        """The adapters that requests may name from now on: name -> model and folder."""
        self._names.set_adapters(adapters)
        for slot in self._slots.values():
            stale = [name for name in slot.adapters if name not in adapters]
            if slot.engine is not None and stale:
                self._in_background(self._unload_adapters(slot, stale))

    def engines(self) -> dict[str, Engine]:
        """The engines that are loaded, by the model's name."""
        return {name: slot.engine for name, slot in self._slots.items() if slot.engine is not None}

    def listed(self) -> list[ModelStatus]:
        """Every model that is here, by name."""
        return [self._status(model, self._slots.get(model.name)) for model in self._names.known()]

    @asynccontextmanager
    async def lease(self, name: str | None) -> AsyncIterator[Lease]:
        """The model's engine, loaded first if need be.

        Raises as `resolve`; NoSpaceError for what can never fit, OverloadedError while what is in use leaves
        no room; and whatever loading fails with, again without trying while it is too early for that.
        """
        resolved = self.resolve(name)
        adapter = resolved.adapter
        folder = None if adapter is None else self._names.adapters[adapter][1]
        slot = self._slots.setdefault(resolved.name, Slot(resolved.name))
        slot.users += 1
        try:
            engine = await self._ready(slot)
            if adapter is not None and folder is not None:
                await self._load_adapter(slot, engine, adapter, folder)
            slot.touch()
            yield Lease(engine, resolved.name, adapter)
        finally:
            slot.users -= 1
            slot.touch()
            if slot.is_idle and self.keep_alive_s == 0:
                self._begin_closing(slot)
            self._room.announce()

    async def load(self, name: str) -> None:
        """Have the model in memory. Raises as `lease`."""
        async with self.lease(name):
            pass

    async def unload(self, name: str, force: bool = False) -> None:
        """Give its memory back, and forget how it failed. force: even while it is used or loads.

        Raises UnknownModelError, UsageError for an adapter, ConflictError while it is used.
        """
        resolved = self.resolve(name)
        if resolved.adapter is not None:
            raise UsageError(f"{name} is an adapter of {resolved.name}.", "Unload the model itself.")
        slot = self._slots.get(resolved.name)
        if slot is None:
            return
        if not force and (slot.users or slot.load is not None):
            doing = "in use" if slot.load is None else "being loaded"
            raise ConflictError(f"{resolved.name} is {doing}.", "Wait until it is not, or use force.")
        slot.failures.forget()
        if slot.load is not None and slot.loading is not None:
            slot.loading.abort()
            self._room.announce()
            await _settled((slot.load,), CLOSE_WAIT_S)
        self._begin_closing(slot)
        if slot.closing is not None:
            await asyncio.shield(slot.closing)

    async def close(self) -> None:
        """End everything, loads included, and wait for it. Idempotent."""
        self._closed = True
        for slot in self._slots.values():
            if slot.loading is not None:
                slot.loading.abort()
        self._room.announce()
        if self._keeper is not None:
            self._keeper.cancel()
        await _settled((slot.load for slot in self._slots.values()), CLOSE_WAIT_S)
        for slot in self._slots.values():
            self._begin_closing(slot)
        await _settled((slot.closing for slot in self._slots.values()), CLOSE_WAIT_S)
        for task in self._background:
            task.cancel()

    async def _ready(self, slot: Slot) -> Engine:
        while True:
            if self._closed:
                raise EngineUnavailableError("The server is stopping.", "Send the request again later.")
            if slot.is_down:
                self._note_down(slot)
            if slot.closing is not None:
                await asyncio.shield(slot.closing)
                continue
            if slot.engine is not None:
                return slot.engine
            if slot.load is None:
                slot.failures.require_none()
                slot.load = asyncio.create_task(self._load(slot))
                self._keep_house()
            # Whoever waits may leave: the load goes on for the others, and for the next one.
            error = await asyncio.shield(slot.load)
            if error is not None:
                slot.failures.require_none()
                raise twin(error)

    async def _load(self, slot: Slot) -> AylluError | None:
        """Load, and return what went wrong: all who wait get an error of their own."""
        slot.loading = Loading()
        try:
            model = self._names.find(slot.name)
            if model is None:
                return EngineUnavailableError(f"{slot.name} was removed.", "Choose another model.")
            options = await self._room.take(slot, model)
            engine = await in_daemon_thread(slot.loading.open, self._opener, model.path, options, slot.name)
            self._take_in(slot, engine)
            await self._room.correct(slot)
            if slot.licence is None and model.licence == UNKNOWN_LICENCE:
                with suppress(OSError):
                    slot.licence = await asyncio.to_thread(stated_licence, model.path)
            return None
        except LoadAbortedError:
            return EngineUnavailableError(f"Loading {slot.name} was stopped.", "Ask again to load it.")
        except RoomError as refusal:
            return refusal.error
        except Exception as error:
            failure = load_error(slot.name, error)
            slot.failures.note(failure)
            return failure
        finally:
            slot.load = slot.loading = None
            if slot.engine is None and slot.closing is None:
                slot.reserved = 0
            slot.touch()
            self._room.announce()

    def _take_in(self, slot: Slot, engine: Engine) -> None:
        slot.engine, slot.info, slot.adapters = engine, engine.info, {}
        slot.loaded_at = time.time()
        slot.failures.error = None
        if self._closed:
            self._begin_closing(slot)

    def _note_down(self, slot: Slot) -> None:
        """An engine that stays down is a failure like one while loading."""
        if slot.closing is None and slot.engine is not None:
            _log.error("the engine of %s stays down", slot.name)
            slot.failures.note(
                EngineUnavailableError(
                    f"The engine of {slot.name} stays down after crashes.", "The server's log says why."
                )
            )
            self._begin_closing(slot)

    def _begin_closing(self, slot: Slot) -> None:
        if slot.engine is not None and slot.closing is None:
            engine, slot.engine = slot.engine, None
            slot.loaded_at, slot.adapters = None, {}
            slot.closing = asyncio.create_task(self._close_engine(slot, engine))

    async def _close_engine(self, slot: Slot, engine: Engine) -> None:
        try:
            await in_daemon_thread(engine.close)
        except Exception:
            _log.exception("closing the engine of %s failed", slot.name)
        finally:
            slot.reserved, slot.closing = 0, None
            self._room.announce()

    async def _load_adapter(self, slot: Slot, engine: Engine, name: str, folder: Path) -> None:
        """Once in an engine's life, unless the adapter has another folder since."""
        if _has_adapter(slot, engine, name, folder):
            return
        # Shielded: it goes on when whoever asked leaves, and nobody begins another beside it.
        await asyncio.shield(self._in_background(self._change_adapter(slot, engine, name, folder)))

    async def _change_adapter(self, slot: Slot, engine: Engine, name: str, folder: Path) -> None:
        async with slot.adapter_change:
            if slot.engine is not engine or _has_adapter(slot, engine, name, folder):
                return
            if slot.adapters.pop(name, None) is not None and name in engine.adapters():
                await in_daemon_thread(engine.unload_adapter, name)
            await in_daemon_thread(engine.load_adapter, name, folder)
            if slot.engine is engine:
                slot.adapters[name] = folder

    async def _unload_adapters(self, slot: Slot, names: Sequence[str]) -> None:
        async with slot.adapter_change:
            for name in names:
                if slot.engine is not None and name not in self._names.adapters and name in slot.adapters:
                    del slot.adapters[name]
                    await in_daemon_thread(slot.engine.unload_adapter, name)

    def _in_background(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background_ended)
        return task

    def _background_ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("an adapter could not be changed: %s", error)

    def _keep_house(self) -> None:
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._unload_idle())

    async def _unload_idle(self) -> None:
        while True:
            await asyncio.sleep(min(TICK_S, max(self.keep_alive_s / 2, SHORTEST_TICK_S)))
            now = time.monotonic()
            for slot in self._slots.values():
                if slot.is_down:
                    self._note_down(slot)
                elif slot.is_idle and (
                    now - slot.idle_since >= self.keep_alive_s or self._names.find(slot.name) is None
                ):
                    self._begin_closing(slot)

    def _status(self, model: KnownModel, slot: Slot | None) -> ModelStatus:
        slot = slot or Slot(model.name)
        info, entry, error = slot.info, model.entry, slot.failures.error
        encoder = None if entry is None else entry.pooling is not None
        needs = slot.needs_bytes
        return ModelStatus(
            name=model.name,
            status=slot.status,
            size_bytes=model.size_bytes,
            memory_bytes=slot.reserved,
            needs_bytes=model.size_bytes + FIXED_BYTES if needs is None else needs,
            context=(entry.context if entry else None) if info is None else info.context,
            reads_images=None if info is None else info.reads_images,
            embeds=None if info is None else info.embeds,
            generates=(None if encoder is None else not encoder) if info is None else info.generates,
            loaded_at=slot.loaded_at,
            last_used_at=slot.used_at,
            open_requests=slot.users,
            progress=None if slot.loading is None else slot.loading.progress,
            error=None if error is None else str(error),
            licence=slot.licence or model.licence,
            created=model.created,
            facts={} if info is None or slot.engine is None else dict(info.facts),
            adapters=self._names.adapters_of(model.name),
        )


def _has_adapter(slot: Slot, engine: Engine, name: str, folder: Path) -> bool:
    return slot.engine is engine and slot.adapters.get(name) == folder and name in engine.adapters()


async def _settled(tasks: Iterable[asyncio.Task[Any] | None], within_s: float) -> None:
    """Wait, a limited time, for those that there are; cancels none."""
    if known := [task for task in tasks if task is not None]:
        await asyncio.wait(known, timeout=within_s)
