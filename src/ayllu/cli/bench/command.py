"""`ayllu bench`: a model's speed on this machine, beside other programs that can run it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ayllu.cli.bench.plan import BenchPlan


def bench(
    model: Annotated[
        str | None, typer.Argument(help="Name of a model, or a path. Default: the setting default_model.")
    ] = None,
    prefill: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="TOKENS", help="Prompt length; may be repeated. Default: 512."),
    ] = None,
    decode: Annotated[int, typer.Option(min=2, metavar="TOKENS", help="Tokens to generate.")] = 128,
    depth: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            metavar="TOKENS",
            help="Tokens before those; may be repeated. Default: 0, 512.",
        ),
    ] = None,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(min=1, max=1024, metavar="CLIENTS", help="Also this many at once; may be repeated."),
    ] = None,
    peers: Annotated[
        str, typer.Option(metavar="NAMES", help="Peers, with commas between them; 'all' or 'none'.")
    ] = "all",
    peer_python: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PYTHON", envvar="AYLLU_BENCH_PYTHON", help="Interpreter that has more peers; repeatable."
        ),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", envvar="AYLLU_BENCH_LLAMA_CPP", help="Folder of llama-bench. Default: PATH's."
        ),
    ] = None,
    peer_file: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="The model in another format: llama.cpp takes part with it too; repeatable."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each, in turn.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Default: all cores.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="PATH", help="Write everything measured.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PATH", help="Draw it: a .png, .svg or .pdf.")] = None,
    patience: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long to wait for a quiet machine.")
    ] = 120.0,
    force: Annotated[
        bool, typer.Option("--force", help="Measure on a busy machine; results are marked as noisy.")
    ] = False,
    pull: Annotated[bool, typer.Option("--pull", help="Fetch the model first if it is not here.")] = False,
) -> None:
    """Measure how fast a model answers here, beside other installed programs.

    Load, first token, prefill, decode, clients at once and memory; ayllu and its peers in turn on the same
    file, medians and spread, beside the machine's own limits. On a busy machine there is no result.
    """
    from ayllu.cli.bench.plan import BenchPlan
    from ayllu.kernels.native.library import default_threads

    plan = BenchPlan(
        threads=threads or default_threads(),
        prefill=tuple(prefill or (512,)),
        decode=decode,
        depths=tuple(depth if depth else (0, 512)),
        clients=tuple(concurrency or ()),
        rounds=rounds,
    )
    _run(
        model, plan, _names(peers), peer_python or [], llama_cpp, _existing(peer_file or []),
        json_path=json_path, plot_path=plot, patience_s=patience, force=force, pull=pull,
    )  # fmt: skip


def _names(peers: str) -> tuple[str, ...]:
    from ayllu.cli.bench.peers import PEERS, require_known

    if peers == "all":
        return PEERS
    if peers == "none":
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in peers.split(",") if name.strip()))
    require_known(names)
    return names


def _existing(files: list[Path]) -> list[Path]:
    from ayllu.errors import UsageError

    for file in files:
        if not file.is_file():
            raise UsageError(f"There is no file {file}.", "Check --peer-file.")
    return files


def _run(
    model: str | None,
    plan: BenchPlan,
    names: tuple[str, ...],
    interpreters: list[Path],
    llama_cpp: Path | None,
    peer_files: list[Path],
    *,
    json_path: Path | None,
    plot_path: Path | None,
    patience_s: float,
    force: bool,
    pull: bool,
) -> None:
    import json

    from rich.console import Console

    from ayllu import __version__
    from ayllu.cli.bench.ceilings import measure_ceilings
    from ayllu.cli.bench.contest import run_contest
    from ayllu.cli.bench.cost import token_cost
    from ayllu.cli.bench.peers import find_peers, ourselves
    from ayllu.cli.bench.quiet import NoiseRule, NoiseTally, judged
    from ayllu.cli.bench.report import as_json, render
    from ayllu.cli.opening import find_or_pull
    from ayllu.settings import load_settings

    if plot_path is not None:
        from ayllu.cli.bench.plot import require_drawable

        require_drawable(plot_path)
    installed = find_or_pull(model, pull, load_settings())
    cost = token_cost(installed.path)
    present, absent = find_peers(
        names, installed.path, interpreters=interpreters, llama_cpp=llama_cpp, other_files=peer_files
    )
    rule = NoiseRule(patience_s=patience_s, force=force)
    noise = NoiseTally()
    ceilings = judged(lambda: measure_ceilings(plan.threads, cost.weight_bytes), rule, noise)
    contest = run_contest(
        installed.path, cost.vocabulary, plan, [ourselves(__version__), *present], absent, rule, noise,
        lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    about = {"name": installed.name, "path": str(installed.path), "size_bytes": installed.size_bytes}
    result = as_json(contest, about, cost, ceilings, rule, __version__)
    title = f"{installed.name}, {plan.threads} threads, median of {plan.rounds} [lowest-highest]"
    console = Console()
    for part in render(contest, title, cost, ceilings):
        console.print(part, highlight=False)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written to {json_path}", file=sys.stderr)
    if plot_path is not None:
        from ayllu.cli.bench.plot import draw

        draw(result, plot_path)
        print(f"drawn to {plot_path}", file=sys.stderr)
