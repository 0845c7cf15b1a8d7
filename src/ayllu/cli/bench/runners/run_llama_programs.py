"""llama.cpp's own programs, as they are meant: llama-completion for the start, llama-bench for speed.

llama-bench draws its own random tokens, and runs everything once before to warm up.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def program(name: str) -> str:
    return str(Path(os.environ["AYLLU_BENCH_LLAMA_CPP"], name))


def first_token(task: dict[str, Any], job: dict[str, Any]) -> None:
    """The moment a program that says one token and exits has exited."""
    words = " a" * len(job["prompts"][0])
    start = time.perf_counter()
    subprocess.run(
        [
            program("llama-completion"), "-m", task["model"], "-t", str(task["threads"]), "-n", "1",
            "-p", words, "-no-cnv", "--no-warmup", "-c", str(max(task["context"], 256)), "--temp", "0",
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    moment = time.perf_counter()
    # As if its process had been started when this one was: this one only starts it.
    say(event="job", key=job["key"], runs=[{"start": start, "moments": [[moment, 1]]}], process_start=start)


def rate(task: dict[str, Any], job: dict[str, Any]) -> None:
    """llama-bench's own average of one repetition, in tokens per second."""
    if job["kind"] == "prefill":
        sizes = ["-p", str(len(job["prompts"][0])), "-n", "0"]
    else:
        sizes = ["-p", "0", "-n", str(job["new_tokens"]), "-d", str(job["depth"])]
    command = [
        program("llama-bench"),
        "-m",
        task["model"],
        "-t",
        str(task["threads"]),
        "-r",
        "1",
        "-o",
        "json",
    ]
    output = subprocess.run(
        [*command, "-r", "1", "-o", "json", *sizes],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    say(event="rate", key=job["key"], tokens_per_s=json.loads(output.stdout)[0]["avg_ts"])


def main() -> None:
    task = json.load(sys.stdin)
    for job in task["jobs"]:
        if job["kind"] == "first_token":
            first_token(task, job)
        else:
            rate(task, job)
    say(event="memory", peak_bytes=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
