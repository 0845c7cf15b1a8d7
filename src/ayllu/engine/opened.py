"""Opening a model in two steps: what it will need is known, and planned, before anything of it is loaded.

An `Opening` is a model with the runner that will compute it; `planned` finds what fits, for two of them
where one drafts for the other; loading gives something that computes, and what is known of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ayllu.engine.memory_plan import MemoryPlan, plan_memory
from ayllu.engine.options import EngineOptions
from ayllu.engine.runner_needs import ModelNeeds
from ayllu.engine.step_runner import Adapters, StepRunner
from ayllu.errors import NoSpaceError
from ayllu.machine_memory import available_memory
from ayllu.progress import Progress

UNKNOWN_MEMORY = 1 << 50
"""Where the system does not tell what is free, nothing is refused."""


@dataclass(frozen=True)
class OpenedRunner:
    """device, dtype: for people. load_peak_bytes: the most that loading took at a time, beyond what was."""

    runner: StepRunner
    adapters: Adapters
    plan: MemoryPlan
    device: str
    dtype: str
    load_peak_bytes: int
    reads_images: bool


class Opening(Protocol):
    """A model and the runner that will compute it, not loaded yet."""

    @property
    def needs(self) -> tuple[ModelNeeds, ...]:
        """What it may take of memory, the preferred way first."""

    @property
    def available_bytes(self) -> int:
        """What is free where it will be."""

    def load(self, plan: MemoryPlan, progress: Progress) -> OpenedRunner:
        """Load it as planned. Raises NoSpaceError where memory or a disk has less than was said."""


def planned(
    opening: Opening, options: EngineOptions, model_name: str, draft: Opening | None = None
) -> MemoryPlan:
    """The plan of the first way that fits. draft: a model beside it, which has the same memory.

    Raises NoSpaceError or UsageError, see `plan_memory`.
    """
    *preferred, last = opening.needs
    available = opening.available_bytes
    beside = None if draft is None else draft.needs[0]
    for needs in preferred:
        try:
            return plan_memory(
                needs, available_bytes=available, options=options, model_name=model_name, draft=beside
            )
        except NoSpaceError:
            continue
    return plan_memory(last, available_bytes=available, options=options, model_name=model_name, draft=beside)


def free_memory() -> int:
    """Bytes that may be taken now."""
    free = available_memory()
    return UNKNOWN_MEMORY if free is None else free
