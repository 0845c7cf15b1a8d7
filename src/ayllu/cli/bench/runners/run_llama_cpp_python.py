"""llama-cpp-python, the binding most people install: its own `generate`, with an empty cache for each job."""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from typing import Any


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def main() -> None:
    task = json.load(sys.stdin)
    package: Any = importlib.import_module("llama_cpp")
    model = package.Llama(
        task["model"], n_ctx=task["context"], n_threads=task["threads"], n_threads_batch=task["threads"],
        verbose=False,
    )  # fmt: skip
    say(event="ready", at=time.perf_counter())
    for job in task["jobs"]:
        model.reset()
        moments: list[tuple[float, int]] = []
        start = time.perf_counter()
        for _ in model.generate(job["prompts"][0], temp=0.0):
            moments.append((time.perf_counter(), 1))
            if len(moments) == job["new_tokens"]:
                break
        say(event="job", key=job["key"], runs=[{"start": start, "moments": moments}])
    say(event="memory", peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
