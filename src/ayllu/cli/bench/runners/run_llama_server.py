"""llama.cpp's server over HTTP on this machine: its own program, or the same server out of xllamacpp."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


@contextmanager
def own_program(task: dict[str, Any], slots: int) -> Iterator[tuple[str, int]]:
    """llama-server as a process: its address and id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [
            str(Path(os.environ["AYLLU_BENCH_LLAMA_CPP"], "llama-server")), "-m", task["model"],
            "-t", str(task["threads"]), "-np", str(slots), "-c", str(slots * task["context"]),
            "--host", "127.0.0.1", "--port", str(port),
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        while not _is_ready(address):
            if server.poll() is not None:
                raise SystemExit(f"llama-server ended with {server.returncode}")
            time.sleep(0.01)
        yield address, server.pid
    finally:
        server.terminate()
        server.wait()


@contextmanager
def of_package(task: dict[str, Any], slots: int) -> Iterator[tuple[str, int]]:
    """The server of xllamacpp, in this process."""
    package: Any = importlib.import_module("xllamacpp")
    parameters = package.CommonParams()
    parameters.model.path = task["model"]
    parameters.port = 0
    parameters.n_parallel = slots
    parameters.n_ctx = slots * task["context"]
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = task["threads"]
    server = package.Server(parameters)
    yield server.listening_address, os.getpid()


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def stream(
    address: str, prompt: list[int], new_tokens: int, *, ignore_stop: bool
) -> Iterator[tuple[float, list[int]]]:
    """One greedy request: the moments its tokens come at, with the tokens. The server never sends some tokens
    that end in the middle of a character: the last moment has as many ids of -1."""
    body = {
        "prompt": prompt, "n_predict": new_tokens, "stream": True, "cache_prompt": False,
        "ignore_eos": ignore_stop, "temperature": 0, "return_tokens": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    sent = 0
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            part = json.loads(line[6:])
            tokens = part.get("tokens") or []
            sent += len(tokens)
            if part.get("stop"):
                tokens = [*tokens, *[-1] * max(0, part.get("tokens_predicted", sent) - sent)]
            if tokens:
                yield time.perf_counter(), tokens


def ask(address: str, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """One request for `new_tokens` tokens: when it was made and when how many of them came."""
    start = time.perf_counter()
    parts = stream(address, prompt, new_tokens, ignore_stop=True)
    return {"start": start, "moments": [(moment, len(tokens)) for moment, tokens in parts]}


def ask_together(address: str, prompts: list[list[int]], new_tokens: int) -> list[dict[str, Any]]:
    """All prompts at the same time, each from a thread of its own."""
    runs: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda prompt=prompt: runs.append(ask(address, prompt, new_tokens)))
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return runs


def _peak_bytes(process_id: int) -> int:
    status = Path(f"/proc/{process_id}/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main() -> None:
    task = json.load(sys.stdin)
    open_server = of_package if sys.argv[1:] == ["xllamacpp"] else own_program
    slots = max(len(job["prompts"]) for job in task["jobs"])
    with open_server(task, slots) as (address, process_id):
        say(event="ready", at=time.perf_counter())
        for job in task["jobs"]:
            say(event="job", key=job["key"], runs=ask_together(address, job["prompts"], job["new_tokens"]))
        say(event="memory", peak_bytes=_peak_bytes(process_id))


if __name__ == "__main__":
    main()
