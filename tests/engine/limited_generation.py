"""Opens a mixture under a limit of memory, in a process of its own, and prints its greedy tokens as JSON.

python -m tests.engine.limited_generation PATH PLACE BYTES GROUP [TOKENS]; PLACE: as in EngineOptions.experts.
BYTES: of private memory beyond what the interpreter and its libraries hold (RLIMIT_DATA; mapped files do not
count), 0 for no limit. GROUP: a cgroup to enter first, '-' for none. Needs no torch, so that the limit is
about the model.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

from ayllu.engine.open_native import open_native
from ayllu.engine.opened import OpenedRunner
from ayllu.engine.options import EngineOptions
from ayllu.engine.step_runner import RunnerPiece
from ayllu.errors import AylluError
from ayllu.progress import SILENT
from ayllu.weights.checkpoint import open_checkpoint

PROMPT = list(range(3, 35))


def main(path: Path, place: str, limit: int, group: str, count: int) -> None:
    checkpoint = open_checkpoint(path)
    if group != "-":
        Path(group, "cgroup.procs").write_text(str(os.getpid()), "ascii")
    if limit:
        most = _private_bytes() + limit
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    options = EngineOptions(context=256, slots=1, step_tokens=64, threads=1, experts=place)  # type: ignore[arg-type]
    try:
        opened = open_native(checkpoint, options, SILENT, path.name)
    except AylluError as error:
        print(json.dumps({"error": type(error).__name__, "problem": str(error)}))
        return
    tokens, first_seconds = greedy(opened, PROMPT, count)
    again, seconds = greedy(opened, PROMPT, count)
    assert again == tokens, "the same prompt, other tokens"
    print(
        json.dumps(
            {
                "tokens": tokens,
                "first_tokens_per_second": count / first_seconds,
                "tokens_per_second": count / seconds,
                "disk_bytes": opened.plan.disk_bytes,
                "private_bytes": _private_bytes(),
            }
        )
    )


def greedy(opened: OpenedRunner, prompt: list[int], count: int) -> tuple[list[int], float]:
    """The `count` likeliest tokens, one after the other, and the seconds from the end of the prompt on. The
    prompt is read in pieces of at most 32 tokens."""
    tables = [list(range(blocks)) for blocks in opened.plan.block_counts]
    tokens, done, read = list(prompt), 0, time.perf_counter()
    while len(tokens) < len(prompt) + count:
        piece = tokens[done : done + 32]
        (hidden,) = opened.runner.forward([RunnerPiece(piece, done, tables)])
        done += len(piece)
        if done == len(prompt):
            read = time.perf_counter()
        if done == len(tokens):
            tokens.append(int(np.argmax(opened.runner.logits([(hidden, len(piece) - 1)])[0])))
    return tokens[len(prompt) :], time.perf_counter() - read


def _private_bytes() -> int:
    """What RLIMIT_DATA counts: writable private memory (proc(5), VmData)."""
    status = Path("/proc/self/status").read_text("ascii", "replace")
    return int(status.partition("VmData:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
