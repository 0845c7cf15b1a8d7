"""What the server costs and bears: overhead over its engine, floods, slow readers, and a long soak.

Each part starts `ayllu serve` as a process of its own, with a folder of its own, and loads it over loopback.
Run: python benchmarks/server_load.py overhead | overload | readers | soak [--minutes 30]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from machine import heading, write_result

PROMPT = "Write about the mountains of Peru, number {number}, in long sentences."


@dataclass
class Server:
    """A running `ayllu serve`."""

    host: str
    port: int
    key: str
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> bytes:
        request = urllib.request.Request(
            f"http://{self.host}:{self.port}{path}", headers={"authorization": f"Bearer {self.key}"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            data: bytes = response.read()
            return data


@contextlib.contextmanager
def serving(model: str, *flags: str, **environment: str) -> Iterator[Server]:
    """`ayllu serve model` until it is ready; stopped afterwards."""
    from ayllu.server.state import keys, users
    from ayllu.server.state.database import Database

    with tempfile.TemporaryDirectory(prefix="ayllu-load-") as folder:
        database = Database.open(None, Path(folder))

        def account(db: Any) -> str:
            admin = users.create(db, "admin", "admin")
            return keys.create(db, admin.id, "load", ("inference", "metrics"))[1]

        key = database.now(account)
        database.close()
        with contextlib.closing(__import__("socket").create_server(("127.0.0.1", 0))) as free:
            port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "ayllu",
            "serve",
            model,
            "--port",
            str(port),
            "--data",
            folder,
            *flags,
        ]
        generous = {
            "AYLLU_REQUESTS_PER_MINUTE": "1000000",
            "AYLLU_TOKENS_PER_MINUTE": "1000000000",
            "AYLLU_CONCURRENT_REQUESTS": "100000",
        }
        process = subprocess.Popen(
            command,
            env={**os.environ, **generous, **environment},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        server = Server("127.0.0.1", port, key, process)
        try:
            for _ in range(600):
                with contextlib.suppress(OSError):
                    server.get("/ready")
                    break
                time.sleep(0.1)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@dataclass
class Outcome:
    """One request: its status, tokens, and when its first text and its end came (seconds after sending)."""

    status: int = 0
    tokens: int = 0
    first: float = 0.0
    end: float = 0.0
    retry_after: bool = False


class Connections:
    """Open connections, used again as every client library does."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def take(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
        return await asyncio.open_connection(self._server.host, self._server.port)

    def give_back(self, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self._idle.append(connection)


async def ask(
    server: Server, number: int, tokens: int, *, pause: float = 0.0, connections: Connections | None = None
) -> Outcome:
    """Stream one answer with as little work on this side as can be."""
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": PROMPT.format(number=number)}],
            "max_tokens": tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "temperature": 0,
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {server.host}\r\nauthorization: Bearer {server.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode()
    outcome = Outcome()
    pool = connections or Connections(server)
    sent = time.perf_counter()
    connection = reader, writer = await pool.take()
    whole = False
    try:
        writer.write(head + body)
        last = piece = b""
        while not whole:
            last = piece if outcome.status else last + piece
            piece = await reader.read(1 << 16 if not pause else 10)
            if not piece:
                break
            now = time.perf_counter() - sent
            if not outcome.status and b"\r\n\r\n" in (start := last + piece):
                outcome.status = int(start.split(b" ", 2)[1])
                outcome.retry_after = b"\r\nretry-after: " in start.lower()
            if not outcome.first and b'"delta":{"content":"' in piece:
                outcome.first = now
            whole = piece.endswith(b"0\r\n\r\n" if outcome.status == 200 else b"}")
            if pause:
                await asyncio.sleep(pause)
        outcome.end = time.perf_counter() - sent
        seen = last + piece
        if (at := seen.rfind(b'"completion_tokens":')) >= 0:
            outcome.tokens = int(seen[at + 20 :].split(b",")[0].split(b"}")[0])
    finally:
        if whole and connections is not None:
            pool.give_back(connection)
        else:
            writer.close()
    return outcome


async def together(server: Server, clients: int, tokens: int, start: int = 0) -> tuple[float, list[Outcome]]:
    """`clients` at once; tokens per second of all, and what each got."""
    began = time.perf_counter()
    outcomes = await asyncio.gather(*(ask(server, start + number, tokens) for number in range(clients)))
    return sum(one.tokens for one in outcomes) / (time.perf_counter() - began), list(outcomes)


def engine_together(engine: Any, clients: int, tokens: int, start: int = 0) -> tuple[float, list[float]]:
    """The same, asked of the engine itself."""
    from ayllu.chat.messages import user_message
    from ayllu.engine.events import Done, TextDelta
    from ayllu.engine.parameters import Sampling
    from ayllu.engine.requests import ChatPrompt, GenerateRequest

    made: list[int] = []
    firsts: list[float] = []
    ended = threading.Semaphore(0)

    def deliver(sent: float) -> Any:
        told = []

        def take(event: Any) -> None:
            if isinstance(event, TextDelta) and not told:
                told.append(1)
                firsts.append(time.perf_counter() - sent)
            if isinstance(event, Done):
                made.append(event.new_tokens)
                ended.release()

        return take

    began = time.perf_counter()
    for number in range(clients):
        request = GenerateRequest(
            prompt=ChatPrompt((user_message(PROMPT.format(number=start + number)),)),
            max_new_tokens=tokens,
            ignore_stop_tokens=True,
            sampling=Sampling(temperature=0.0),
        )
        engine.submit(request, deliver(time.perf_counter()))
    for _ in range(clients):
        ended.acquire()
    return sum(made) / (time.perf_counter() - began), firsts


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds in turn: the engine alone, then behind the server. Both are loaded all the time, one works."""
    from ayllu.engine.native import open_engine
    from ayllu.engine.options import EngineOptions
    from ayllu.settings import load_settings
    from ayllu.weights.store import open_store

    path = open_store(load_settings()).ensure(options.model).path
    rounds: list[dict[str, float]] = []
    with serving(options.model) as server, open_engine(path, EngineOptions(slots=8, context=1024)) as engine:
        run_loop(together(server, 8, 32))
        engine_together(engine, 8, 32)
        for number in range(options.rounds):
            start = 1000 * number + 100
            direct, _ = engine_together(engine, 8, options.tokens, start)
            began, used = time.perf_counter(), time.process_time()
            served, _ = run_loop(together(server, 8, options.tokens, start))
            # What the clients themselves take of the processors is not the server's doing.
            clients = (time.process_time() - used) / (time.perf_counter() - began) / (os.cpu_count() or 1)
            alone = [engine_together(engine, 1, 4, start + 20 + n)[1][0] for n in range(5)]
            behind = [run_loop(ask(server, start + 20 + n, 4)).first for n in range(5)]
            rounds.append(
                {
                    "engine_tokens_per_s": direct,
                    "server_tokens_per_s": served,
                    "ratio": served / direct,
                    "clients_share_of_processors": clients,
                    "engine_first_token_ms": 1000 * statistics.median(alone),
                    "server_first_token_ms": 1000 * statistics.median(behind),
                }
            )
            print({name: round(value, 3) for name, value in rounds[-1].items()})
    medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    added = medians["server_first_token_ms"] - medians["engine_first_token_ms"]
    print(f"throughput {medians['ratio']:.3f} of the engine's; first token {added:+.1f} ms")
    return {"rounds": rounds, "medians": medians, "added_first_token_ms": added}


@dataclass
class Flood:
    """Requests that come whether or not earlier ones have ended."""

    outcomes: list[Outcome] = field(default_factory=list)
    failures: int = 0


async def _flood(server: Server, per_second: float, seconds: float, tokens: int) -> Flood:
    flood = Flood()
    connections = Connections(server)

    async def one(number: int) -> None:
        try:
            flood.outcomes.append(await ask(server, number, tokens, connections=connections))
        except OSError:
            flood.failures += 1

    tasks = []
    began = time.perf_counter()
    number = 0
    while (now := time.perf_counter() - began) < seconds:
        while number < now * per_second:
            tasks.append(asyncio.create_task(one(number)))
            number += 1
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks)
    return flood


async def _steady(server: Server, clients: int, seconds: float, tokens: int) -> float:
    """Tokens per second of clients who wait for their answers."""
    connections = Connections(server)
    until = time.perf_counter() + seconds

    async def one(number: int) -> int:
        made = 0
        while time.perf_counter() < until:
            number += clients
            made += (await ask(server, number, tokens, connections=connections)).tokens
        return made

    began = time.perf_counter()
    made = await asyncio.gather(*(one(20_000 + number) for number in range(clients)))
    return sum(made) / (time.perf_counter() - began)


def overload(options: argparse.Namespace) -> dict[str, Any]:
    """Ten times what the server can do, for a while."""
    with serving(options.model, "--slots", "8", AYLLU_QUEUE_REQUESTS="16") as server:
        run_loop(together(server, 8, 32))
        # As many as it takes, each asking again as soon as it is answered: what the server can do for long.
        peak = run_loop(_steady(server, 16, options.seconds / 3, options.tokens))
        capacity = peak / options.tokens
        # Those who flood a server are on machines of their own, and take none of its processors.
        os.nice(10)
        began = time.perf_counter()
        flood = run_loop(_flood(server, 10 * capacity, options.seconds, options.tokens))
        elapsed = time.perf_counter() - began
        after, _ = run_loop(together(server, 8, options.tokens, 9000))
        resident = psutil.Process(server.process.pid).memory_info().rss
    taken = [one for one in flood.outcomes if one.status == 200]
    refused = sorted(one.end for one in flood.outcomes if one.status == 429)
    goodput = sum(one.tokens for one in taken) / elapsed
    result = {
        "peak_tokens_per_s": peak,
        "goodput_tokens_per_s": goodput,
        "goodput_of_peak": goodput / peak,
        "asked": len(flood.outcomes) + flood.failures,
        "answered": len(taken),
        "refused": len(refused),
        "refusal_ms_p50": 1000 * refused[len(refused) // 2] if refused else None,
        "refusal_ms_p99": 1000 * refused[int(len(refused) * 0.99)] if refused else None,
        "without_retry_after": sum(not one.retry_after for one in flood.outcomes if one.status == 429),
        "other_statuses": sorted({one.status for one in flood.outcomes} - {200, 429}),
        "resets": flood.failures,
        "first_token_s_p99": sorted(one.first for one in taken)[int(len(taken) * 0.99)] if taken else None,
        "tokens_per_s_after": after,
        "resident_bytes": resident,
    }
    print(json.dumps(result, indent=1))
    return result


def readers(options: argparse.Namespace) -> dict[str, Any]:
    """64 clients that read ten bytes a second beside a normal one."""

    async def measured(server: Server, slow: int) -> float:
        crawling = [asyncio.create_task(ask(server, 500 + n, 200, pause=1.0)) for n in range(slow)]
        # Their answers are made first: what is measured is what unread answers cost, not shared computing.
        await asyncio.sleep(options.settle if slow else 0)
        outcomes = [await ask(server, n, options.tokens) for n in range(3)]
        for task in crawling:
            task.cancel()
        await asyncio.gather(*crawling, return_exceptions=True)
        return statistics.median(one.tokens / one.end for one in outcomes)

    with serving(options.model, "--slots", "8") as server:
        run_loop(together(server, 8, 32))
        alone = run_loop(measured(server, 0))
        beside = run_loop(measured(server, 64))
    result = {"alone_tokens_per_s": alone, "beside_64_slow": beside, "ratio": beside / alone}
    print(result)
    return result


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Mixed load for long; memory, threads and files of the server's process at every minute."""
    samples: list[dict[str, float]] = []

    async def load(server: Server, until: float) -> int:
        asked = 0
        while time.perf_counter() < until:
            tasks = [asyncio.create_task(ask(server, asked + n, 24)) for n in range(6)]
            leaving = asyncio.create_task(ask(server, asked + 7, 400))
            await asyncio.gather(*tasks)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            asked += 7
        return asked

    with serving(options.model, "--slots", "8") as server:
        process = psutil.Process(server.process.pid)
        began = time.perf_counter()
        asked = 0
        while (now := time.perf_counter() - began) < options.minutes * 60:
            asked += run_loop(load(server, time.perf_counter() + options.sample))
            server.get("/metrics")
            samples.append(
                {
                    "minute": now / 60,
                    "resident_mb": process.memory_info().rss / 1e6,
                    "threads": process.num_threads(),
                    "files": process.num_fds(),
                }
            )
            print(samples[-1], flush=True)
    warm = samples[len(samples) // 4 :]
    minutes = [one["minute"] for one in warm]
    memory = [one["resident_mb"] for one in warm]
    slope = statistics.linear_regression(minutes, memory).slope if len(warm) > 1 else 0.0
    result = {"asked": asked, "mb_per_10_minutes": 10 * slope, "samples": samples}
    print(f"{asked} requests, {10 * slope:+.2f} MB per 10 minutes")
    return result


PARTS = {"overhead": overhead, "overload": overload, "readers": readers, "soak": soak}


def run_loop(work: Any) -> Any:
    """On the same loop as the server, which takes less of the machine."""
    import uvloop

    return uvloop.run(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--settle", type=float, default=30.0)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--sample", type=float, default=30.0)
    options = parser.parse_args()
    report = heading("server_load", "ayllu", "uvicorn", "fastapi")
    report["result"] = PARTS[options.part](options)
    print(f"written to {write_result(f'server-{options.part}', report)}")


if __name__ == "__main__":
    main()
