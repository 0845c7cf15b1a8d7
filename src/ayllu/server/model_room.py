"""The budget of memory that loaded models share: who has how much of it, and how room is made.

Every loaded or loading model has its bytes reserved before anything of it is loaded. Those that nobody uses
give way, longest unused first; those in use never do.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping

from ayllu.engine.memory_plan import size_text
from ayllu.engine.opened import free_memory
from ayllu.engine.options import EngineOptions
from ayllu.errors import AylluError, NoSpaceError, OverloadedError
from ayllu.server.model_memory import Estimate, Needs
from ayllu.server.model_names import KnownModel
from ayllu.server.model_slot import Slot

ROOM_WAIT_S = 30.0
"""Seconds that a load waits for models in use to come free."""


class MemoryRoom:
    """Shares `budget_bytes` out among `slots`. close: begins to close the engine of a slot."""

    def __init__(
        self,
        budget_bytes: int,
        slots: Mapping[str, Slot],
        options: Callable[[str], EngineOptions],
        estimate: Estimate,
        close: Callable[[Slot], None],
    ) -> None:
        self.budget_bytes = budget_bytes
        self.wait_s = ROOM_WAIT_S
        self._slots = slots
        self._options = options
        self._estimate = estimate
        self._close = close
        self._changed = asyncio.Event()

    @property
    def reserved_bytes(self) -> int:
        """What is taken."""
        return sum(slot.reserved for slot in self._slots.values())

    def announce(self) -> None:
        """Wake whoever waits for room: something ended."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def take(self, slot: Slot, model: KnownModel) -> EngineOptions:
        """Take the bytes that the model needs out of the budget; the options to open it with.

        Nobody else runs between a look at the budget and what follows from it. Raises RoomError.
        """
        needs = await self._needs(slot, model, self.budget_bytes)
        slot.needs_bytes = needs.total_bytes
        if needs.total_bytes > self.budget_bytes:
            raise RoomError(
                NoSpaceError(
                    f"{slot.name} needs {size_text(needs.total_bytes)} of memory; the server's models may "
                    f"take {size_text(self.budget_bytes)}.",
                    "Raise the server's memory, or use a smaller model.",
                )
            )
        smaller: Needs | None = None
        until = time.monotonic() + self.wait_s
        while True:
            if slot.loading is not None:
                slot.loading.require_wanted()
            for choice in (needs, smaller):
                if choice is not None and self.reserved_bytes + choice.total_bytes <= self.budget_bytes:
                    slot.reserved = choice.total_bytes
                    return choice.options
            changed = self._changed
            left = self._left_by_users(slot)
            if needs.total_bytes > left and (smaller is None or smaller.total_bytes > left):
                smaller = await self._fewer_slots(slot, model, needs, left)
                left = self._left_by_users(slot)
            wanted = needs if needs.total_bytes <= left else smaller
            if wanted is not None and wanted.total_bytes <= left:
                self._evict(self.reserved_bytes + wanted.total_bytes - self.budget_bytes)
                if self.reserved_bytes + wanted.total_bytes <= self.budget_bytes:
                    continue
            if time.monotonic() >= until:
                raise RoomError(self._no_room(slot, needs))
            await first_change(changed, until - time.monotonic())

    async def _needs(self, slot: Slot, model: KnownModel, available_bytes: int) -> Needs:
        try:
            return await asyncio.to_thread(
                self._estimate,
                model.path,
                self._options(slot.name),
                available_bytes=min(available_bytes, free_memory() + self.reserved_bytes),
                model_name=slot.name,
            )
        except NoSpaceError as error:
            raise RoomError(error) from error

    async def _fewer_slots(self, slot: Slot, model: KnownModel, needs: Needs, left: int) -> Needs | None:
        """What it needs where it shall fit beside those in use: no shorter context, but fewer at a time."""
        if left <= 0:
            return None
        try:
            smaller = await self._needs(slot, model, left)
        except RoomError:
            return None
        return smaller if smaller.context == needs.context and smaller.total_bytes <= left else None

    def _left_by_users(self, besides: Slot) -> int:
        """What there is beside engines in use and loads under way: all that unloading can give."""
        return self.budget_bytes - sum(
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
            self._close(slot)

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

    async def correct(self, slot: Slot) -> None:
        """Reserve what the engine says it takes. Raises NoSpaceError, and closes it, for too much."""
        total = _total_bytes(slot)
        if total is None:
            return
        slot.needs_bytes = total
        while (missing := self.reserved_bytes - slot.reserved + total - self.budget_bytes) > 0:
            changed = self._changed
            self._evict(missing)
            if not any(other.closing for other in self._slots.values()):
                self._close(slot)
                raise NoSpaceError(
                    f"{slot.name} takes {size_text(total)} of memory, {size_text(missing)} too much.",
                    "Raise the server's memory, or lower its slots or context.",
                )
            await first_change(changed, self.wait_s)
        if slot.engine is not None:
            slot.reserved = total


class RoomError(Exception):
    """There is no room: nothing was tried, so nothing is remembered of it."""

    def __init__(self, error: AylluError) -> None:
        self.error = error
        super().__init__(error)


def _total_bytes(slot: Slot) -> int | None:
    """What the engine says it takes of this machine's memory; of a GPU's, nothing here."""
    facts = {} if slot.info is None else slot.info.facts
    total = facts.get("total_bytes")
    return None if total is None or str(facts.get("device", "")).startswith("cuda") else int(total)


async def first_change(changed: asyncio.Event, within_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(changed.wait(), max(within_s, 0.0))
