"""Ayllu itself: the ordinary engine, timed where its events arrive.

Without the prefix cache and without speculation: random prompts would make both look better or worse than
they are.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ayllu import process
from ayllu.engine.events import TextDelta
from ayllu.engine.native import open_engine
from ayllu.engine.options import EngineOptions
from ayllu.engine.parameters import Sampling
from ayllu.engine.protocol import Engine
from ayllu.engine.requests import GenerateRequest, TokenPrompt


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def generate(engine: Engine, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """When the request was made, and when how many of its tokens came."""
    request = GenerateRequest(
        prompt=TokenPrompt(tuple(prompt)),
        sampling=Sampling(temperature=0),
        max_new_tokens=new_tokens,
        ignore_stop_tokens=True,
    )
    start = time.perf_counter()
    moments = [
        (time.perf_counter(), len(event.token_ids))
        for event in engine.submit(request).results()
        if isinstance(event, TextDelta) and event.token_ids
    ]
    return {"start": start, "moments": moments}


def together(calls: Sequence[Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Run all calls at the same time; their answers."""
    answers: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda call=call: answers.append(call())) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def main() -> None:
    task = json.load(sys.stdin)
    most = max(len(job["prompts"]) for job in task["jobs"])
    options = EngineOptions(
        context=task["context"], slots=most, prefix_cache=False, speculate="off", threads=task["threads"]
    )
    with open_engine(Path(task["model"]), options) as engine:
        say(event="ready", at=engine.loaded_at)
        for job in task["jobs"]:
            calls = [partial(generate, engine, prompt, job["new_tokens"]) for prompt in job["prompts"]]
            say(event="job", key=job["key"], runs=together(calls))
        peak = process.peak_resident_bytes() + process.peak_resident_bytes(engine.process_id)
        say(event="memory", peak_bytes=peak)
        say(event="facts", **engine.info.facts)


if __name__ == "__main__":
    main()
