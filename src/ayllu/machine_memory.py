"""How much memory this machine can still give: what is free, within the limits of the container and process.

A container's own limit (cgroup, version 1 or 2) is often far below what the machine has free, and going over
it ends the process without a word. Standard library only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class _Cgroup:
    """Where one version of cgroups keeps its numbers. Page cache in `given_back` counts as used, but the
    system drops it before it refuses memory."""

    mount: str
    limits: tuple[str, ...]
    used: str
    given_back: tuple[str, ...]


VERSION_1 = _Cgroup(
    "sys/fs/cgroup/memory",
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)
VERSION_2 = _Cgroup(
    "sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file")
)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken now, memory that the system would give back counted in; None where the system
    does not tell. `root` is where /proc and /sys are found."""
    known = [*_left_on_machine(root), *_left_by_cgroups(root), *_left_to_process(root)]
    return max(0, min(known)) if known else None


def _left_on_machine(root: Path) -> list[int]:
    # MemAvailable counts the page cache that would be given back; free pages alone would not.
    kilobytes = _numbers(root / "proc/meminfo").get("MemAvailable:")
    if kilobytes is not None:
        return [kilobytes * 1024]
    try:
        return [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, ValueError, OSError):
        return []


def _left_by_cgroups(root: Path) -> list[int]:
    """What the limits of this process's memory group leave, and those of every group above it."""
    left = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        # number:controllers:path; cgroup 2 has the number 0 and no controllers (cgroups(7)).
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        version = VERSION_1 if controllers else VERSION_2
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            left += _left_in_group(root.joinpath(version.mount, *parts[:depth]), version)
    return left


def _left_to_process(root: Path) -> list[int]:
    """What RLIMIT_DATA leaves this process (`ulimit -d`): memory of its own, files it maps not counted."""
    for line in _text(root / "proc/self/limits").splitlines():
        if line.startswith("Max data size"):
            soft = line.removeprefix("Max data size").split()[0]
            used = _numbers(root / "proc/self/status").get("VmData:")
            if soft.isdigit() and used is not None:
                return [int(soft) - used * 1024]
    return []


def _left_in_group(folder: Path, version: _Cgroup) -> list[int]:
    limits = [int(text) for name in version.limits if (text := _text(folder / name).strip()).isdigit()]
    used = _text(folder / version.used).strip()
    if not limits or not used.isdigit():
        return []
    state = _numbers(folder / "memory.stat")
    return [min(limits) - int(used) + sum(state.get(name, 0) for name in version.given_back)]


def _numbers(file: Path) -> dict[str, int]:
    """The first number of each line that begins with a name."""
    fields = (line.split() for line in _text(file).splitlines())
    return {words[0]: int(words[1]) for words in fields if len(words) > 1 and words[1].isdigit()}


def _text(file: Path) -> str:
    """The file's text; empty where there is none to be read."""
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
