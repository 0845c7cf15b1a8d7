"""What every benchmark needs to know of the machine, and what every result says: when, where, by what."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BUSY_LIMIT = 0.15
"""Cores that other processes may use before a run counts as noisy."""


def heading(name: str, *packages: str) -> dict[str, Any]:
    """When, where, with what and by which command: the beginning of every result file."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {package: version(package) for package in packages},
    }


def write_result(name: str, report: dict[str, Any]) -> Path:
    """Write a report to the results folder; its path."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}-{report['date']}.json"
    file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def busy_cores() -> float:
    """Cores in use by anyone over one second (Linux)."""

    def ticks() -> tuple[int, int]:
        values = [int(v) for v in Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:]]
        return sum(values), values[3] + values[4]

    total, idle = ticks()
    time.sleep(1)
    total_after, idle_after = ticks()
    share = 1 - (idle_after - idle) / max(1, total_after - total)
    return share * (os.cpu_count() or 1)


def wait_for_quiet(patience_s: float = 120) -> None:
    """Return once the machine is quiet; refuse to measure otherwise."""
    end = time.monotonic() + patience_s
    while busy_cores() > BUSY_LIMIT:
        if time.monotonic() > end:
            sys.exit(
                f"The machine stayed busy for {patience_s:.0f} s: no result. Stop other work and run again."
            )


def read_bandwidth() -> float:
    """Bytes per second of reading 1 GiB with all threads: the ceiling of decoding one token at a time."""
    import torch

    data = torch.ones(1 << 28)
    data.sum()
    best = min(_timed(data.sum) for _ in range(5))
    return data.nbytes / best


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
