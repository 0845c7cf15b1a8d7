"""The models that a server has in memory: loaded when asked for, several at once, within a budget of bytes.

Room for one is made by unloading those that nobody uses, longest unused first; what is in use stays. A load
is shared by all who wait for it, and survives them. What fails to load is not tried again at every request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ayllu.engine.memory_plan import size_text
from ayllu.engine.native import open_engine
from ayllu.engine.options import EngineOptions
from ayllu.engine.protocol import Engine
from ayllu.errors import (
    AylluError,
    ConflictError,
    EngineUnavailableError,
    NoSpaceError,
    OverloadedError,
    UsageError,
)
from ayllu.server.model_memory import FIXED_BYTES, Estimate, MemoryEstimate, Needs
from ayllu.server.model_names import KnownModel, ModelNames, ResolvedModel
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

ROOM_WAIT_S = 30.0
"""Seconds that a load waits for models in use to come free."""

CLOSE_WAIT_S = 10.0
"""Seconds that `close` waits for a load to notice."""

TICK_S = 1.0
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
        self.budget_bytes = budget_bytes
        self.room_wait_s = ROOM_WAIT_S
        self._names = ModelNames(store, default_model, pinned)
        self._options = options
        self._opener = opener
        self._estimate = estimate or MemoryEstimate()
        self._slots: dict[str, Slot] = {}
        self._changed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def default_model(self) -> str | None:
        """What requests mean that name no model."""
        return self._names.default

    @property
    def reserved_bytes(self) -> int:
        """What is taken of the budget."""
        return sum(slot.reserved for slot in self._slots.values())

    def resolve(self, name: str | None) -> ResolvedModel:
        """What `name` means; loads nothing. Raises UnknownModelError, or UsageError where a name is needed."""
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
            self._announce()

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
            self._announce()
            await _settled((slot.load,), CLOSE_WAIT_S)
        self._begin_closing(slot)
        if slot.closing is not None:
            await asyncio.shield(slot.closing)

    async def close(self) -> None:
        """End everything, loads included, and wait for it. Idempotent."""
        self._closed = True
        self._announce()
        for slot in self._slots.values():
            if slot.loading is not None:
                slot.loading.abort()
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
                raise twin(error)

    async def _load(self, slot: Slot) -> AylluError | None:
        """Load, and return what went wrong: all who wait get an error of their own."""
        slot.loading = Loading()
        try:
            model = self._names.find(slot.name)
            if model is None:
                return EngineUnavailableError(f"{slot.name} was removed.", "Choose another model.")
            options = await self._make_room(slot, model)
            engine = await in_daemon_thread(slot.loading.open, self._opener, model.path, options, slot.name)
            self._take_in(slot, engine)
            await self._correct(slot)
            if slot.licence is None and model.licence == UNKNOWN_LICENCE:
                slot.licence = await asyncio.to_thread(stated_licence, model.path)
            return None
        except LoadAbortedError:
            return EngineUnavailableError(f"Loading {slot.name} was stopped.", "Ask again to load it.")
        except _RoomError as refusal:
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
            self._announce()

    def _take_in(self, slot: Slot, engine: Engine) -> None:
        slot.engine, slot.info, slot.adapters = engine, engine.info, {}
        slot.loaded_at = time.time()
        slot.failures.error = None
        if self._closed:
            self._begin_closing(slot)

    async def _make_room(self, slot: Slot, model: KnownModel) -> EngineOptions:
        """Take the bytes that the model needs out of the budget; the options to open it with.

        Nobody else runs between a look at the budget and what follows from it. Raises _RoomError.
        """
        needs = await self._needs(slot, model, self.budget_bytes)
        slot.needs_bytes = needs.total_bytes
        if needs.total_bytes > self.budget_bytes:
            raise _RoomError(
                NoSpaceError(
                    f"{slot.name} needs {size_text(needs.total_bytes)} of memory; the server's models may "
                    f"take {size_text(self.budget_bytes)}.",
                    "Raise the server's memory, or use a smaller model.",
                )
            )
        smaller: Needs | None = None
        until = time.monotonic() + self.room_wait_s
        while True:
            if slot.loading is not None:
                slot.loading.require_wanted()
            for choice in (needs, smaller):
                if choice is not None and self.reserved_bytes + choice.total_bytes <= self.budget_bytes:
                    slot.reserved = choice.total_bytes
                    return choice.options
            changed = self._changed
            in_use = self._in_use_bytes(slot)
            left = self.budget_bytes - in_use
            if needs.total_bytes <= left:
                self._evict(self.reserved_bytes + needs.total_bytes - self.budget_bytes)
            elif smaller is not None and smaller.total_bytes <= left:
                self._evict(self.reserved_bytes + smaller.total_bytes - self.budget_bytes)
            else:
                smaller = await self._fewer_slots(slot, model, needs, left)
                if smaller is not None and smaller.total_bytes <= self.budget_bytes - self._in_use_bytes(
                    slot
                ):
                    continue
            if time.monotonic() >= until:
                raise _RoomError(self._no_room(slot, needs))
            await _first_change(changed, until - time.monotonic())

    async def _needs(self, slot: Slot, model: KnownModel, available_bytes: int) -> Needs:
        try:
            return await asyncio.to_thread(
                self._estimate,
                model.path,
                self._options(slot.name),
                available_bytes=available_bytes,
                model_name=slot.name,
            )
        except NoSpaceError as error:
            raise _RoomError(error) from error

    async def _fewer_slots(self, slot: Slot, model: KnownModel, needs: Needs, left: int) -> Needs | None:
        """What it needs where it shall fit beside those in use: no shorter context, but fewer at a time."""
        if left <= 0:
            return None
        try:
            smaller = await self._needs(slot, model, left)
        except _RoomError:
            return None
        return smaller if smaller.context == needs.context and smaller.total_bytes <= left else None

    def _in_use_bytes(self, besides: Slot) -> int:
        """What cannot be had by unloading: engines in use, and loads under way."""
        return sum(
            slot.reserved
            for slot in self._slots.values()
            if slot is not besides and slot.closing is None and not slot.is_idle
        )

    def _evict(self, missing: int) -> None:
        """Begin to close idle models, longest unused first, until so many bytes will be free."""
        missing -= sum(slot.reserved for slot in self._slots.values() if slot.closing is not None)
        idle = sorted((s for s in self._slots.values() if s.is_idle), key=lambda s: s.idle_since)
        for slot in idle:
            if missing <= 0:
                return
            missing -= slot.reserved
            self._begin_closing(slot)

    def _no_room(self, slot: Slot, needs: Needs) -> OverloadedError:
        users = ", ".join(
            f"{other.name} ({size_text(other.reserved)})"
            for other in self._slots.values()
            if other is not slot and other.reserved
        )
        free = self.budget_bytes - self.reserved_bytes
        return OverloadedError(
            f"{slot.name} needs {size_text(needs.total_bytes)} of memory; {size_text(free)} of "
            f"{size_text(self.budget_bytes)} is free, the rest is in use by {users}.",
            "Try again later, or raise the server's memory.",
            retry_after_s=ROOM_WAIT_S,
        )

    async def _correct(self, slot: Slot) -> None:
        """Reserve what the engine says it takes. Raises NoSpaceError, and closes it, when that is too much."""
        total = _total_bytes(slot)
        if total is None:
            return
        slot.needs_bytes = total
        while (missing := self.reserved_bytes - slot.reserved + total - self.budget_bytes) > 0:
            changed = self._changed
            self._evict(missing)
            if not any(other.closing for other in self._slots.values()):
                self._begin_closing(slot)
                raise NoSpaceError(
                    f"{slot.name} takes {size_text(total)} of memory, {size_text(missing)} more than there is.",
                    "Raise the server's memory, or lower its slots or context.",
                )
            await _first_change(changed, self.room_wait_s)
        if slot.engine is not None:
            slot.reserved = total

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
            self._announce()

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

    def _announce(self) -> None:
        """Wake whoever waits for room."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _keep_house(self) -> None:
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._unload_idle())

    async def _unload_idle(self) -> None:
        while True:
            await asyncio.sleep(
                min(TICK_S, max(self.keep_alive_s / 2, 0.02) if self.keep_alive_s else TICK_S)
            )
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


class _RoomError(Exception):
    """There is no room: nothing was tried, so nothing is remembered of it."""

    def __init__(self, error: AylluError) -> None:
        self.error = error
        super().__init__(error)


def _has_adapter(slot: Slot, engine: Engine, name: str, folder: Path) -> bool:
    return slot.engine is engine and slot.adapters.get(name) == folder and name in engine.adapters()


def _total_bytes(slot: Slot) -> int | None:
    """What the engine says it takes of this machine's memory; of a GPU's, nothing here."""
    facts = {} if slot.info is None else slot.info.facts
    total = facts.get("total_bytes")
    return None if total is None or str(facts.get("device", "")).startswith("cuda") else int(total)


async def _first_change(changed: asyncio.Event, within_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(changed.wait(), max(within_s, 0.0))


async def _settled(tasks: Iterable[asyncio.Task[Any] | None], within_s: float) -> None:
    """Wait, a limited time, for those that there are; cancels none."""
    if known := [task for task in tasks if task is not None]:
        await asyncio.wait(known, timeout=within_s)
