"""What benchmarks that set contenders against each other share: options, running, printing, writing."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import RESULTS


def add_options(parser: argparse.ArgumentParser) -> None:
    """--rounds, --threads, --quick, --force, --patience."""
    parser.add_argument("--rounds", type=int, default=5, help="runs of each, in turn (5)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="less of everything, to see that it works")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine; marked as noisy")
    parser.add_argument("--patience", type=float, default=300, help="seconds to wait for a quiet machine")


def rule_of(options: argparse.Namespace) -> Any:
    """How noise is treated, from the options."""
    from ayllu.cli.bench.quiet import NoiseRule

    return NoiseRule(patience_s=options.patience, force=options.force)


def run_and_write(
    name: str, model: Path, plan: Any, contenders: Sequence[Any], absent: Sequence[Any], rule: Any
) -> dict[str, Any]:
    """A contest as `ayllu bench` runs it; printed, and written with its picture to benchmarks/results/."""
    from rich.console import Console

    from ayllu import __version__
    from ayllu.cli.bench.ceilings import measure_ceilings
    from ayllu.cli.bench.contest import run_contest
    from ayllu.cli.bench.cost import token_cost
    from ayllu.cli.bench.plot import draw
    from ayllu.cli.bench.quiet import NoiseTally, judged
    from ayllu.cli.bench.report import as_json, render

    cost, noise = token_cost(model), NoiseTally()
    ceilings = judged(lambda: measure_ceilings(plan.threads, cost.weight_bytes), rule, noise)
    contest = run_contest(
        model,
        cost.vocabulary,
        plan,
        contenders,
        absent,
        rule,
        noise,
        lambda line: print(line, file=sys.stderr),
    )
    about = {"name": model.stem, "path": str(model)}
    result = as_json(contest, about, cost, ceilings, rule, __version__)
    result["command"] = " ".join(["python", f"benchmarks/{name}.py", *sys.argv[1:]])
    console = Console()
    for part in render(contest, f"{name}: median of {plan.rounds}, lowest-highest", cost, ceilings):
        console.print(part, highlight=False)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}-{result['date'][:10]}{'-noisy' if noise.noisy else ''}.json"
    file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(result, file.with_suffix(".png"))
    print(f"written to {file}")
    return result
