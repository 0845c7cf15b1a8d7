"""Tasks whose answers repeat their prompts: ayllu with and without speculation beside llama.cpp's server.

Twenty greedy requests to Qwen2.5-Coder-1.5B: summarise, edit code, answer over a passage, made of texts that
Python and installed packages bring along. Prompt by prompt, the three answer in turn. Speculation must not
change a token: that is checked, and a difference is reported. Run:
python benchmarks/speculation.py --llama-cpp FOLDER
"""

from __future__ import annotations

import argparse
import inspect
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from contests import add_options, rule_of
from machine import heading, write_result

NEW_TOKENS = 192
ENGINES = ("ayllu", "ayllu without speculation", "llama.cpp")


@dataclass(frozen=True)
class Task:
    kind: str
    name: str
    text: str


def tasks() -> list[Task]:
    """Twenty prompts, the same wherever the same versions are installed."""
    import argparse as argparse_module
    import colorsys
    import fnmatch
    import heapq
    import string
    import textwrap

    summarise = [
        Task(
            "summarise",
            module.__name__,
            f"Summarise this documentation in a few sentences:\n\n{_doc(module)}",
        )
        for module in (argparse_module, heapq, textwrap, inspect, statistics, string)
    ]
    edits = [
        ("Rename the variable `maxc` to `largest` everywhere in this function.", colorsys.rgb_to_hls),
        ("Rename the variable `v` to `value` everywhere in this function.", colorsys.rgb_to_hsv),
        ("Add type annotations to this function.", colorsys.hsv_to_rgb),
        ("Add a short docstring to this function.", colorsys.hls_to_rgb),
        ("Rename the parameter `pat` to `pattern` everywhere in this function.", fnmatch.filter),
        ("Add type annotations to this function.", textwrap.indent),
        ("Rename the variable `it` to `iterator` everywhere in this function.", heapq.nsmallest),
        ("Rename the variable `margin` to `indentation` everywhere in this function.", textwrap.dedent),
    ]
    edit = [
        Task("edit", function.__name__, _edit_prompt(order, inspect.getsource(function)))
        for order, function in edits
    ]
    passage = _licence()
    questions = (
        "What does the licence grant regarding patents? Quote the sentences.",
        "When does the patent licence end? Quote the sentence.",
        "What must somebody do who redistributes the work? Quote the list.",
        "What does the text say about trademarks? Quote it.",
        "What warranty does the licensor give? Quote the text.",
        "Who is a Contributor? Quote the definition.",
    )
    answer = [
        Task("answer", question, f"{_part(passage, number)}\n\nUsing the text above: {question}")
        for number, question in enumerate(questions)
    ]
    return [*summarise, *edit, *answer]


def _doc(module: Any) -> str:
    return (inspect.getdoc(module) or "")[:1800] + "\n" + _signatures(module)


def _signatures(module: Any) -> str:
    functions = [value for name, value in sorted(vars(module).items()) if inspect.isfunction(value)]
    shown = [f"{function.__name__}: {(inspect.getdoc(function) or '')[:160]}" for function in functions[:6]]
    return "\n".join(shown)


def _edit_prompt(order: str, source: str) -> str:
    return f"{order} Answer with the whole function in one code block.\n\n```python\n{source}```"


def _licence() -> str:
    """The Apache licence as this project ships it."""
    return (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")


def _part(passage: str, number: int) -> str:
    """A piece of the licence in which the answer to this question stands."""
    headings = (
        "3. Grant of Patent", "3. Grant of Patent", "4. Redistribution", "6. Trademarks", "7. Disclaimer",
        '"Work" shall mean',
    )  # fmt: skip
    start = max(0, passage.find(headings[number]) - 200)
    return " ".join(passage[start : start + 2400].split())


@dataclass
class Answer:
    """Tokens of one answer, seconds to its first and to its last."""

    tokens: list[int]
    first_s: float
    total_s: float

    @property
    def rates(self) -> dict[str, float]:
        decoding = max(self.total_s - self.first_s, 1e-9)
        return {
            "tokens_per_s": len(self.tokens) / self.total_s,
            "decode_tokens_per_s": (len(self.tokens) - 1) / decoding,
        }


def collected(start: float, parts: Any) -> Answer:
    """An answer from (moment, tokens) pairs."""
    tokens: list[int] = []
    first = last = start
    for moment, some in parts:
        first = moment if not tokens else first
        last = moment
        tokens += some
    return Answer(tokens, first - start, last - start)


def asker_of(engine: Any, new_tokens: int) -> Callable[[list[int]], Answer]:
    """Asks an ayllu engine."""
    from ayllu.engine.events import TextDelta
    from ayllu.engine.parameters import Sampling
    from ayllu.engine.requests import GenerateRequest, TokenPrompt

    def ask(prompt: list[int]) -> Answer:
        request = GenerateRequest(
            prompt=TokenPrompt(tuple(prompt)), sampling=Sampling(temperature=0), max_new_tokens=new_tokens
        )
        start = time.perf_counter()
        events = engine.submit(request).results()
        return collected(
            start,
            ((time.perf_counter(), event.token_ids) for event in events if isinstance(event, TextDelta)),
        )

    return ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama-server (default: without llama.cpp)")
    add_options(parser)
    parser.set_defaults(rounds=1)
    options = parser.parse_args()

    from ayllu.chat.messages import user_message
    from ayllu.cli.bench.quiet import NoiseTally, judged
    from ayllu.cli.bench.runners import run_llama_server
    from ayllu.engine.model_files import open_model_files
    from ayllu.engine.native import open_engine
    from ayllu.engine.options import EngineOptions
    from ayllu.settings import load_settings
    from ayllu.weights.store import open_store

    path = open_store(load_settings()).ensure(options.model).path
    new_tokens = 24 if options.quick else NEW_TOKENS
    chosen = tasks()[::7] if options.quick else tasks()
    chat_format = open_model_files(path).chat_format
    prompts = [list(chat_format.render([user_message(task.text)]).token_ids) for task in chosen]
    rule, noise = rule_of(options), NoiseTally()
    answers: dict[str, list[list[Answer]]] = {}
    with ExitStack() as stack:
        common = {"context": 4096, "slots": 1, "prefix_cache": False, "threads": options.threads}
        asks: dict[str, Callable[[list[int]], Answer]] = {}
        beside: list[int] = []
        for name, speculate in ((ENGINES[0], None), (ENGINES[1], "off")):
            engine = stack.enter_context(open_engine(path, EngineOptions(**common, speculate=speculate)))
            asks[name] = asker_of(engine, new_tokens)
            beside.append(engine.process_id)
        if options.llama_cpp:
            os.environ["AYLLU_BENCH_LLAMA_CPP"] = str(options.llama_cpp)
            task = {"model": str(path), "threads": options.threads, "context": 4096}
            address, server = stack.enter_context(run_llama_server.own_program(task, 1))
            beside.append(server)
            asks[ENGINES[2]] = lambda prompt: collected(
                time.perf_counter(), run_llama_server.stream(address, prompt, new_tokens, ignore_stop=False)
            )
        for ask in asks.values():
            ask(prompts[0][:64])
        for number, prompt in enumerate(prompts):
            for name, ask in asks.items():
                runs = [judged(partial(ask, prompt), rule, noise, beside) for _ in range(options.rounds)]
                answers.setdefault(name, []).append(runs)
            print(_line(chosen[number], {name: rows[-1] for name, rows in answers.items()}), file=sys.stderr)
    report = {
        **heading("speculation", "ayllu", "numpy"),
        "model": options.model,
        "new_tokens_at_most": new_tokens,
        "noisy": noise.noisy,
        **_report(chosen, prompts, answers),
    }
    for name, ratio in report["ratios"].items():
        print(f"ayllu against {name}: " + ", ".join(f"{key} x {value:.2f}" for key, value in ratio.items()))
    print(f"answers changed by speculation: {report['changed_by_speculation'] or 'none'}")
    if noise.noisy:
        print(f"NOISY: {noise.noisy_runs} answers were disturbed; these figures are no result")
    print(f"written to {write_result('speculation-noisy' if noise.noisy else 'speculation', report)}")


def _line(task: Task, runs: dict[str, list[Answer]]) -> str:
    cells = [f"{name} {_median(rows, 'tokens_per_s'):.1f}" for name, rows in runs.items()]
    return f"{task.kind:<10} {task.name[:40]:<40} tokens/s: {', '.join(cells)}"


def _median(runs: list[Answer], key: str) -> float:
    return statistics.median(answer.rates[key] for answer in runs)


def _report(
    chosen: list[Task], prompts: list[list[int]], answers: dict[str, list[list[Answer]]]
) -> dict[str, Any]:
    """Every task's figures, then medians over tasks of the ratio, task by task."""
    rows = []
    for number, task in enumerate(chosen):
        row: dict[str, Any] = {"kind": task.kind, "name": task.name, "prompt_tokens": len(prompts[number])}
        for name, found in answers.items():
            runs = found[number]
            row[name] = {key: _median(runs, key) for key in ("tokens_per_s", "decode_tokens_per_s")}
            row[name] |= {
                "new_tokens": len(runs[0].tokens),
                "first_s": statistics.median(r.first_s for r in runs),
            }
        rows.append(row)
    ours = ENGINES[0]
    ratios = {
        name: {
            key: statistics.median(row[ours][key] / row[name][key] for row in rows)
            for key in ("tokens_per_s", "decode_tokens_per_s")
        }
        | {
            f"{kind}_tokens_per_s": statistics.median(
                row[ours]["tokens_per_s"] / row[name]["tokens_per_s"] for row in rows if row["kind"] == kind
            )
            for kind in dict.fromkeys(task.kind for task in chosen)
        }
        for name in answers
        if name != ours
    }
    plain = answers[ENGINES[1]]
    changed = [
        chosen[number].name
        for number, runs in enumerate(answers[ours])
        if any(run.tokens != plain[number][0].tokens for run in runs)
    ]
    return {"ratios": ratios, "changed_by_speculation": changed, "tasks": rows}


if __name__ == "__main__":
    main()
