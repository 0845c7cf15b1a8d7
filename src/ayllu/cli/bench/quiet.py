"""Whether the machine was quiet: waits until it is, judges each run by what others used meanwhile.

A second busy process costs a factor of two to ten here, so a run beside one is no result. Linux tells what
is needed in /proc; elsewhere nothing can be judged, and that is said.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ayllu.errors import AylluError

LIMIT_CORES = 0.1
"""Cores that other processes may use, on average over a run, before it counts as noisy."""

TRIES = 3
"""Runs of the same thing before noise is taken for lasting."""

BUSY_COLUMNS = (0, 1, 2, 5, 6, 7)
"""user, nice, system, irq, softirq, steal of /proc/stat (proc(5)); guest time is already in user."""


class NoisyMachineError(AylluError):
    """Something else is using the machine, so that what was measured would be no result."""

    exit_code = 20
    http_status = 503


@dataclass(frozen=True)
class Snapshot:
    """CPU seconds since the system started: of all cores together, and of each process by its id."""

    moment: float
    busy_s: float
    processes: dict[int, tuple[str, float]]


@dataclass(frozen=True)
class Noise:
    """Cores that others used on average, and the busiest of them: (name and id, cores)."""

    other_cores: float
    busiest: tuple[tuple[str, float], ...] = ()

    def is_above(self, limit_cores: float) -> bool:
        return self.other_cores > limit_cores

    def text(self) -> str:
        """'0.83 cores in use by others: ffmpeg (12) 0.80'."""
        named = ", ".join(f"{name} {cores:.2f}" for name, cores in self.busiest)
        return f"{self.other_cores:.2f} cores in use by others: {named or 'processes that ended meanwhile'}"


def take_snapshot(root: Path = Path("/proc")) -> Snapshot:
    """How busy everything has been until now. Raises NoisyMachineError where the system does not tell."""
    ticks = os.sysconf("SC_CLK_TCK")
    try:
        values = [int(v) for v in (root / "stat").read_text(encoding="ascii").split("\n")[0].split()[1:]]
    except (OSError, ValueError):
        raise NoisyMachineError(
            "This system does not tell how busy it is (/proc/stat), so no run can be judged.",
            "Use --force; the results are then marked as noisy.",
        ) from None
    busy = sum(values[column] for column in BUSY_COLUMNS if column < len(values)) / ticks
    processes = {}
    for folder in root.iterdir():
        if folder.name.isdigit() and (found := _process(folder, ticks)):
            processes[int(folder.name)] = found
    return Snapshot(time.perf_counter(), busy, processes)


def _process(folder: Path, ticks: int) -> tuple[str, float] | None:
    """Name and CPU seconds; None when it has ended meanwhile."""
    try:
        text = (folder / "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    head, _, rest = text.rpartition(")")
    fields = rest.split()
    return head.partition("(")[2], (int(fields[11]) + int(fields[12])) / ticks


def noise_between(
    before: Snapshot, after: Snapshot, own_cpu_s: float, own_ids: Collection[int] = ()
) -> Noise:
    """What others used between two snapshots, when this benchmark itself used `own_cpu_s` CPU seconds.

    own_ids: processes of this benchmark that are still running, so that they are not named as others.
    """
    wall = max(after.moment - before.moment, 1e-9)
    others = max(0.0, after.busy_s - before.busy_s - own_cpu_s) / wall
    used = []
    for number, (name, seconds) in after.processes.items():
        earlier = before.processes.get(number, (name, 0.0))[1]
        if number not in own_ids and seconds > earlier:
            used.append((f"{name} ({number})", (seconds - earlier) / wall))
    used.sort(key=lambda item: -item[1])
    return Noise(others, tuple(item for item in used[:3] if item[1] >= 0.01))


def own_cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended and were waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def wait_for_quiet(
    patience_s: float,
    limit_cores: float = LIMIT_CORES,
    *,
    look: Callable[[], Snapshot] = take_snapshot,
    pause: Callable[[float], None] = time.sleep,
) -> float:
    """Return once others used less than `limit_cores` over a second; the seconds that took.

    Raises NoisyMachineError, naming what was busy, when the machine stays busy for `patience_s`.
    """
    first = before = look()
    while True:
        own = own_cpu_seconds()
        pause(1.0)
        after = look()
        noise = noise_between(before, after, own_cpu_seconds() - own, (os.getpid(),))
        if not noise.is_above(limit_cores):
            return after.moment - first.moment
        if after.moment - first.moment >= patience_s:
            raise NoisyMachineError(
                f"The machine stayed busy for {patience_s:.0f} s ({noise.text()}), so there is no result.",
                "Stop that work, wait longer with --patience SECONDS, or use --force: results are then "
                "marked as noisy.",
            )
        before = after


@dataclass(frozen=True)
class NoiseRule:
    """limit_cores: what others may use. patience_s: how long to wait for quiet. force: keep noisy runs."""

    limit_cores: float = LIMIT_CORES
    patience_s: float = 120.0
    force: bool = False


@dataclass
class NoiseTally:
    """Cores that others used in each run that was kept, runs kept though noisy, runs repeated."""

    other_cores: list[float] = field(default_factory=list)
    noisy_runs: int = 0
    repeated_runs: int = 0

    @property
    def noisy(self) -> bool:
        return self.noisy_runs > 0


Answer = TypeVar("Answer")


def judged(
    run: Callable[[], Answer], rule: NoiseRule, tally: NoiseTally, beside: Collection[int] = ()
) -> Answer:
    """What `run` gives, run while nothing else was busy; with `rule.force`, once, whatever else was.

    beside: processes that work for `run` and go on afterwards, so that their time is no noise.

    Raises NoisyMachineError when the machine does not become quiet, or does not stay so.
    """
    for attempt in range(TRIES):
        if not rule.force:
            wait_for_quiet(rule.patience_s, rule.limit_cores)
        answer, noise = _with_noise(run, rule, beside)
        noisy = noise is None or noise.is_above(rule.limit_cores)
        if not noisy or rule.force:
            tally.noisy_runs += noisy
            tally.other_cores += [] if noise is None else [noise.other_cores]
            return answer
        tally.repeated_runs += 1
        if attempt == TRIES - 1 and noise is not None:
            raise NoisyMachineError(
                f"{TRIES} runs in a row were disturbed ({noise.text()}), so there is no result.",
                "Stop that work, or use --force: results are then marked as noisy.",
            )
    raise AssertionError("the last try returns or raises")


def _with_noise(
    run: Callable[[], Answer], rule: NoiseRule, beside: Collection[int]
) -> tuple[Answer, Noise | None]:
    """What `run` gives, and what others used meanwhile; None where that is unknown (with force)."""
    try:
        before = take_snapshot()
    except NoisyMachineError:
        if not rule.force:
            raise
        return run(), None
    own = own_cpu_seconds()
    answer = run()
    # Processes that `run` started have ended and were waited for, so their time counts as ours.
    used = own_cpu_seconds() - own
    after = take_snapshot()
    for number in beside:
        if number in before.processes and number in after.processes:
            used += after.processes[number][1] - before.processes[number][1]
    return answer, noise_between(before, after, used, (os.getpid(), *beside))
