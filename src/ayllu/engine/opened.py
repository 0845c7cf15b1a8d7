"""What opening a model with one of the runners gives: something that computes, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass

from ayllu.engine.memory_plan import MemoryPlan
from ayllu.engine.step_runner import Adapters, StepRunner
from ayllu.machine_memory import available_memory

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


def free_memory() -> int:
    """Bytes that may be taken now."""
    free = available_memory()
    return UNKNOWN_MEMORY if free is None else free
