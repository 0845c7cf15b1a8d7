"""From nothing to the first token: a fresh process opens the model and answers a short prompt.

In turn through `ayllu chat` (as a pipe uses it) and through the library, on a quiet machine with the file in
the page cache. Timed from outside, from before the process exists until the first text comes out of it. Peak
memory is VmHWM of the front and of the engine's process, added up: shared pages count twice.

Run: python benchmarks/start.py
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from machine import heading, wait_for_quiet, write_result

PROMPT = "What is a stone?"
LIBRARY = """
from ayllu.engine.launch import Launched, import_numpy
launched = Launched()
import_numpy()
import sys
from pathlib import Path
from ayllu.chat.messages import user_message
from ayllu.engine.native import open_engine
from ayllu.engine.reply import Reply
from ayllu.engine.requests import ChatPrompt, GenerateRequest
with open_engine(Path(sys.argv[1]), launched=launched) as engine:
    request = GenerateRequest(prompt=ChatPrompt((user_message(sys.argv[2]),)), max_new_tokens=16)
    for text in Reply(engine.submit(request)):
        print(text, end="", flush=True)
"""
SIMPLE_LIBRARY = "\n".join(LIBRARY.splitlines()[4:]).replace(", launched=launched", "")


def commands(model: str, path: Path) -> dict[str, list[str]]:
    """What is timed, by name."""
    python = [sys.executable, "-P"]
    return {
        "chat": [*python, "-m", "ayllu", "chat", model, "-p", PROMPT, "--max-tokens", "16"],
        "library": [*python, "-c", SIMPLE_LIBRARY, str(path), PROMPT],
        "library, process launched first": [*python, "-c", LIBRARY, str(path), PROMPT],
    }


def run_once(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds to the first byte of the answer and to the end; peak memory of both processes in MB."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None and process.stderr is not None
    peaks: dict[int, int] = {}
    watching = threading.Event()
    watcher = threading.Thread(target=_watch_memory, args=(process.pid, peaks, watching))
    first = process.stdout.read(1)
    first_token_s = time.perf_counter() - begin
    # Not before: looking costs time, and peaks are kept by the system until the end.
    watcher.start()
    process.stdout.read()
    said = process.stderr.read().decode()
    process.wait()
    total_s = time.perf_counter() - begin
    watching.set()
    watcher.join()
    process.stdout.close()
    process.stderr.close()
    if not first or process.returncode:
        sys.exit(f"No answer: {said}")
    front = peaks.pop(process.pid, 0)
    return {
        "first_token_s": first_token_s,
        "total_s": total_s,
        "front_peak_mb": front / 1e6,
        "engine_peak_mb": max(peaks.values(), default=0) / 1e6,
        "peak_mb": (front + max(peaks.values(), default=0)) / 1e6,
    }


def _watch_memory(process_id: int, peaks: dict[int, int], end: threading.Event) -> None:
    while not end.is_set():
        for number in (process_id, *_children(process_id)):
            peaks[number] = max(peaks.get(number, 0), _peak_bytes(number))
        time.sleep(0.005)


def _children(process_id: int) -> list[int]:
    found: list[int] = []
    try:
        for tasks in Path(f"/proc/{process_id}/task").glob("*/children"):
            found += map(int, tasks.read_text(encoding="ascii").split())
    except OSError:
        pass  # it, or a thread of it, has just ended
    return found


def _peak_bytes(process_id: int) -> int:
    try:
        status = Path(f"/proc/{process_id}/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


def phases(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """What `ayllu chat --timing` tells of one run: seconds after the process start."""
    result = subprocess.run(
        [*command, "--timing", "--json"], stdin=subprocess.DEVNULL, capture_output=True, check=True,
        env=environment,
    )  # fmt: skip
    told: dict[str, Any] = json.loads(result.stdout)["timing"]
    return {name: told[name] for name in ("loaded_s", "first_token_s", "load_peak_bytes")}


def main() -> None:
    from ayllu.cli.opening import find_or_pull
    from ayllu.settings import load_settings

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument(
        "--noisy", action="store_true", help="Do not wait for a quiet machine; write no result."
    )
    options = parser.parse_args()
    path = find_or_pull(options.model, False, load_settings()).path
    import ayllu

    with tempfile.TemporaryDirectory() as compiled:
        # As an installed package has it: compiled once, wherever this one lies.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = compiled
        sys.pycache_prefix = compiled
        compileall.compile_dir(Path(ayllu.__file__).parent, quiet=2)
        timed = commands(options.model, path)
        for command in timed.values():
            run_once(command, environment)  # fills the page cache
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in timed}
        for _ in range(options.runs):
            for name, command in timed.items():
                if not options.noisy:
                    wait_for_quiet()
                samples[name].append(run_once(command, environment))
        report: dict[str, Any] = {
            **heading("start", "ayllu", "numpy", "tokenizers"),
            "model": options.model,
            "prompt": PROMPT,
            "runs": options.runs,
            "peak": "VmHWM of both processes, added up",
            "phases_of_one_chat": phases(timed["chat"], environment),
        }
    for name, rows in samples.items():
        report[name] = {key: _spread([row[key] for row in rows]) for key in rows[0]}
        told = report[name]
        print(
            f"{name:<32} first token {told['first_token_s']['median']:.3f} s "
            f"[{told['first_token_s']['min']:.3f}-{told['first_token_s']['max']:.3f}]   "
            f"peak {told['peak_mb']['median']:.0f} MB = front {told['front_peak_mb']['median']:.0f} "
            f"+ engine {told['engine_peak_mb']['median']:.0f}"
        )
    if not options.noisy:
        print(f"written to {write_result('start', report)}")


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
