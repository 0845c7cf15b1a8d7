"""What the machine can do at most: reading memory, and multiplying in each precision.

The native library measures both as its kernels would have them (huge pages, pinned threads, products in
registers). Without it numpy measures what it can, and the report says so.
"""

from __future__ import annotations

import mmap
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

LARGE_BYTES = 1 << 30
"""Far beyond any cache of today's processors."""

REPEATS = 5


@dataclass(frozen=True)
class Rate:
    """Median, lowest and highest of some measurements, per second."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Ceilings:
    """read: by number of threads, bytes per second of a large buffer. read_weights: of as many bytes as a
    token reads, with all threads: a small model partly stays in the cache. operations: by precision, with
    all threads, 2 per multiply-add. by: what measured it, 'native' or 'numpy'."""

    threads: int
    by: str
    read: dict[int, Rate] = field(default_factory=dict)
    read_weights: Rate | None = None
    operations: dict[str, Rate] = field(default_factory=dict)


def measure_ceilings(threads: int, weight_bytes: int, large_bytes: int = LARGE_BYTES) -> Ceilings:
    """Measure this machine, for a model that reads `weight_bytes` a token. Takes some seconds."""
    counts = sorted({1, threads})
    native = _native_measure()
    if native is None:
        read = {count: _rate(partial(_numpy_read, count, large_bytes)) for count in counts}
        return Ceilings(
            threads,
            "numpy",
            read,
            _rate(partial(_numpy_read, threads, weight_bytes)),
            {"float32": _rate(_numpy_product)},
        )
    precisions = ["float32", "int8"]
    if native.kernels_name() == "avx512":
        precisions.insert(1, "bfloat16")
    return Ceilings(
        threads,
        "native",
        {count: _rate(partial(native.measure, "read", count, large_bytes)) for count in counts},
        _rate(partial(native.measure, "read", threads, weight_bytes)),
        {name: _rate(partial(native.measure, name, threads)) for name in precisions},
    )


def _native_measure() -> Any:
    """The native library's module; None where it was not built."""
    from ayllu.kernels.native import library

    return library if library.native_is_built() else None


def _rate(once: Callable[[], float]) -> Rate:
    values = [once() for _ in range(REPEATS)]
    return Rate(statistics.median(values), min(values), max(values))


def _numpy_read(threads: int, size: int) -> float:
    """Bytes per second of summing `size` bytes, shared out among threads (numpy lets them run together)."""
    region = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    numbers = np.frombuffer(region, np.uint64, size // 8)
    numbers[:] = 1
    parts = np.array_split(numbers, threads)
    best = float("inf")
    for _ in range(3):
        workers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - start)
    return size / best


def _numpy_product(size: int = 1024) -> float:
    """Operations per second of a float32 matrix product, with the threads numpy takes."""
    left = np.ones((size, size), np.float32)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
