"""Eight requests at once beside one: what continuous batching gives, and whether it is fair.

One engine process; first one stream alone, then eight together, in turn, on a quiet machine. Tokens count
when their event arrives here. Run: python benchmarks/concurrency.py
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from typing import Any

from machine import heading, wait_for_quiet, write_result

STREAMS = 8
NEW_TOKENS = 128
QUESTIONS = (
    "Write a long story about a ship.",
    "Explain how bread is made, step by step.",
    "Describe the city you would like to live in.",
    "What should a traveller know about mountains?",
    "Tell the history of the bicycle.",
    "Give advice to somebody who plants a garden.",
    "Explain the seasons to a child.",
    "Write a letter to an old friend.",
)


def run_together(engine: Any, count: int) -> dict[str, float]:
    """Start `count` requests and wait for all: tokens per second of all, of each, and first-token times."""
    from ayllu.chat.messages import Message
    from ayllu.engine.events import TextDelta
    from ayllu.engine.parameters import Sampling
    from ayllu.engine.requests import ChatPrompt, GenerateRequest

    firsts: list[float] = []
    rates: list[float] = []
    lock = threading.Lock()
    begin = time.perf_counter()

    def one(question: str, number: int) -> None:
        request = GenerateRequest(
            # The number keeps a prompt from being found in the prefix cache of an earlier run.
            prompt=ChatPrompt((Message("user", f"{time.time_ns()} {number}. {question}"),)),
            sampling=Sampling(temperature=0),
            max_new_tokens=NEW_TOKENS,
            ignore_stop_tokens=True,
        )
        tokens, first = 0, 0.0
        for event in engine.submit(request).results():
            if isinstance(event, TextDelta):
                first = first or time.perf_counter()
                tokens += len(event.token_ids)
        with lock:
            firsts.append(first - begin)
            rates.append(tokens / (time.perf_counter() - begin))

    threads = [
        threading.Thread(target=one, args=(QUESTIONS[number % len(QUESTIONS)], number))
        for number in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "tokens_per_s": count * NEW_TOKENS / (time.perf_counter() - begin),
        "slowest_of_mean": min(rates) / statistics.mean(rates),
        "first_token_median_s": statistics.median(firsts),
    }


def main() -> None:
    from ayllu.engine.native import open_engine
    from ayllu.engine.options import EngineOptions
    from ayllu.settings import load_settings
    from ayllu.weights.store import open_store

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    path = open_store(load_settings()).ensure(options.model).path
    samples: dict[str, list[dict[str, float]]] = {"one": [], "eight": []}
    with open_engine(path, EngineOptions(context=2048, slots=STREAMS)) as engine:
        run_together(engine, STREAMS)
        for _ in range(options.runs):
            for name, count in (("one", 1), ("eight", STREAMS)):
                wait_for_quiet()
                samples[name].append(run_together(engine, count))
    report = {
        **heading("concurrency", "ayllu", "torch", "numpy"),
        "model": options.model,
        "runs": options.runs,
    }
    for name, rows in samples.items():
        report[name] = {
            key: {
                "median": statistics.median(row[key] for row in rows),
                "min": min(row[key] for row in rows),
                "max": max(row[key] for row in rows),
            }
            for key in rows[0]
        }
        print(f"{name:<6}", "  ".join(f"{key} {value['median']:.2f}" for key, value in report[name].items()))
    pairs = zip(samples["eight"], samples["one"], strict=True)
    report["ratio"] = statistics.median(eight["tokens_per_s"] / one["tokens_per_s"] for eight, one in pairs)
    file = write_result("concurrency", report)
    print(f"eight streams together: {report['ratio']:.2f} x one; written to {file}")


if __name__ == "__main__":
    main()
