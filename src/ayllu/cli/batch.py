"""`ayllu batch`: a file of requests answered into a file of answers, as fast as the engine can, resumable."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ayllu.cli import engine_flags

if TYPE_CHECKING:
    from ayllu.engine.batch.output import Output
    from ayllu.engine.batch.run import BatchRun, Tally
    from ayllu.engine.protocol import Engine

EXIT_SOME_FAILED = 1
EXIT_INTERRUPTED = 130


def batch(
    file: Annotated[
        Path,
        typer.Argument(help="Requests, one a line, in the format of OpenAI's batch API.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Answers. Default: FILE with .output.jsonl at its end."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name or path. Default: the model the requests name, or the setting default_model."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="LoRA adapter that requests may name; may be repeated."),
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Answers computed at the same time. Default: up to 8.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a prompt and its answer. Default: 8192, or less.")
    ] = None,
    device: engine_flags.Device = None,
    dtype: engine_flags.Dtype = None,
    runner: engine_flags.Runner = None,
    threads: engine_flags.Threads = None,
    cache_type: engine_flags.CacheType = None,
    weights: engine_flags.Weights = None,
    experts: engine_flags.Experts = None,
    speculate: engine_flags.Speculate = None,
    draft: engine_flags.Draft = None,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="The same answers to the bit, whatever runs beside; slower."),
    ] = False,
    pull: Annotated[bool, typer.Option("--pull", help="Fetch the model first if it is not here.")] = False,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Use an OpenAI-compatible server. Its key: AYLLU_API_KEY."),
    ] = None,
    remote_model: Annotated[
        str | None, typer.Option(help="The model's name on that server. Default: the one the requests name.")
    ] = None,
    dialect: Annotated[
        str, typer.Option(help="What the server is: openai, vllm, sglang, llama.cpp, azure or ayllu.")
    ] = "openai",
    api_version: Annotated[str | None, typer.Option(help="For Azure, such as 2024-10-21.")] = None,
    allow_plain_http: Annotated[
        bool, typer.Option("--allow-plain-http", help="Send prompts and key unencrypted over the network.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Run nothing unless every line is a valid request.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also run again what failed by the engine's fault.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Keep answers there to requests that changed or are gone.")
    ] = False,
) -> None:
    """Answer many requests from a file.

    Run it again to go on after an interruption: what the output holds is not computed again. Exit code 0:
    every request has an answer; 1: some were answered with an error, see their lines in the output.
    """
    from ayllu.engine.batch.file import Ids, survey
    from ayllu.engine.batch.output import Output

    flags = {
        "device": device,
        "dtype": dtype,
        "runner": runner,
        "threads": threads,
        "cache_type": cache_type,
        "weights": weights,
        "experts": experts,
        "speculate": speculate,
        "draft": draft,
    }
    native = {
        "--model": model,
        "--context": context,
        **{engine_flags.flag_of(name): value for name, value in flags.items()},
        "--deterministic": deterministic or None,
        "--pull": pull or None,
    }
    remote = {
        "--remote-model": remote_model,
        "--dialect": None if dialect == "openai" else dialect,
        "--api-version": api_version,
        "--allow-plain-http": allow_plain_http or None,
    }
    _refuse_useless(native if endpoint is not None else remote, endpoint is not None)
    folders = _adapters(adapter or [])
    target = output or file.with_name(f"{file.name.removesuffix('.jsonl')}.output.jsonl")
    ids = Ids()
    try:
        found = survey(file, ids, strict=strict)
        named = found.models - folders.keys()
        only = next(iter(named)) if len(named) == 1 else None
        with Output(target, file, ids, force=force, retry_failed=retry_failed) as answers:
            run = _Run(file, target, found.total, ids.done)
            if run.before == found.total:
                run.say(f"{_requests(found.total)}, all answered already: {target}")
                return

            def open_engine() -> tuple[Engine, list[str]]:
                if endpoint is None:
                    return _open_native(
                        file,
                        model or only,
                        pull=pull,
                        slots=slots,
                        context=context,
                        flags=flags,
                        deterministic=deterministic,
                    )
                return _open_remote(
                    endpoint,
                    remote_model or only,
                    dialect=dialect,
                    api_version=api_version,
                    allow_plain_http=allow_plain_http,
                    slots=slots,
                )

            run.go(open_engine, answers, folders, slots)
    finally:
        ids.close()


def _refuse_useless(options: Mapping[str, object], is_remote: bool) -> None:
    from ayllu.errors import UsageError

    for name, value in options.items():
        if value is not None:
            where = "has no meaning for a model on a server" if is_remote else "needs --endpoint"
            raise UsageError(
                f"{name} {where}.", f"Leave {name} out{'' if is_remote else ', or give a server'}."
            )


def _adapters(given: list[str]) -> dict[str, Path]:
    """NAME=FOLDER, as often as given."""
    from ayllu.errors import UsageError, clip
    from ayllu.paths import expanded

    folders: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder or name in folders:
            raise UsageError(
                f"--adapter {clip(text)} is no NAME=FOLDER, or its name is taken.",
                "Write --adapter NAME=FOLDER.",
            )
        folders[name] = expanded(folder)
    return folders


def _open_native(
    file: Path,
    model: str | None,
    *,
    pull: bool,
    slots: int | None,
    context: int | None,
    flags: Mapping[str, object],
    deterministic: bool,
) -> tuple[Engine, list[str]]:
    """The engine, and the names that requests may call its model by."""
    from ayllu.cli.opening import find_or_pull
    from ayllu.engine.native import open_engine
    from ayllu.progress import TerminalProgress
    from ayllu.settings import load_settings

    settings = load_settings(flags)
    installed = find_or_pull(model, pull, settings)
    options = engine_flags.engine_options(
        settings,
        command=shlex.join(["ayllu", "batch", str(file), *(["--model", model] if model else [])]),
        pull=pull,
        slots=slots,
        context=context,
        deterministic=deterministic,
    )
    engine = open_engine(installed.path, options, TerminalProgress(), installed.name)
    for note in engine.notes:
        print(note, file=sys.stderr)
    return engine, list(dict.fromkeys([installed.name, model or installed.name]))


def _open_remote(
    endpoint: str,
    model: str | None,
    *,
    dialect: str,
    api_version: str | None,
    allow_plain_http: bool,
    slots: int | None,
) -> tuple[Engine, list[str]]:
    from ayllu.cli.opening import open_remote
    from ayllu.engine.batch.run import most_in_flight
    from ayllu.engine.options import DEFAULT_SLOTS
    from ayllu.errors import UsageError

    if model is None:
        raise UsageError("The requests do not name one model on the server.", "Name it: --remote-model NAME.")
    engine = open_remote(
        endpoint,
        model,
        dialect=dialect,
        api_version=api_version,
        allow_plain_http=allow_plain_http,
        most_open=most_in_flight(slots or DEFAULT_SLOTS),
    )
    return engine, [model]


def _requests(count: int) -> str:
    return f"{count:,} request{'' if count == 1 else 's'}"


class _Run:
    """One run of a batch as a person sees it: the plan, what is going on, and how it ended."""

    def __init__(self, file: Path, target: Path, total: int, before: int) -> None:
        self.before = before
        self._file = file
        self._target = target
        self._total = total
        self._started = time.monotonic()

    def go(
        self,
        open_engine: Callable[[], tuple[Engine, list[str]]],
        answers: Output,
        folders: dict[str, Path],
        slots: int | None,
    ) -> None:
        """Open the engine, run what is left, and say what came of it. Raises typer.Exit with the exit code
        unless that is 0."""
        from ayllu.engine.batch.file import read_lines
        from ayllu.engine.batch.run import BatchRun, most_in_flight
        from ayllu.engine.options import DEFAULT_SLOTS
        from ayllu.errors import AylluError

        run: BatchRun | None = None
        try:
            engine, names = open_engine()
            try:
                for name, folder in folders.items():
                    engine.load_adapter(name, folder)
                facts = engine.info.facts
                self._show_plan(facts)
                planned = facts.get("slots")
                limit = slots or (planned if isinstance(planned, int) else DEFAULT_SLOTS)
                with self._live() as progress:
                    run = BatchRun(
                        engine,
                        answers,
                        models=names,
                        adapters=folders,
                        limit=most_in_flight(limit),
                        progress=progress,
                    )
                    lines = read_lines(self._file)
                    self._started = time.monotonic()
                    run.run(line for line in lines if not answers.ids.is_done(line.key))
            finally:
                engine.close()
        except KeyboardInterrupt:
            self._say_stopped(answers.ids.done, run)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except AylluError:
            if run is not None:
                self._say_stopped(answers.ids.done, run)
            raise
        self._say_finished(run.tally)
        if run.tally.failed:
            raise typer.Exit(EXIT_SOME_FAILED)

    def say(self, text: str) -> None:
        """To the person, beside whatever the output is."""
        print(text, file=sys.stderr)

    def _show_plan(self, facts: Mapping[str, str | int | float]) -> None:
        """What the engine says of itself in words, its memory plan among it; in a pipe nobody reads it."""
        if sys.stderr.isatty():
            for name, value in facts.items():
                if isinstance(value, str):
                    self.say(f"{name}: {value}")

    def _say_finished(self, tally: Tally) -> None:
        text = f"{_requests(tally.answered)} answered"
        if tally.failed:
            text += f", {tally.failed} of them with an error"
        if self.before:
            text += f"; {self.before} had their answers already"
        self.say(f"{text}. {self._amounts(tally)}. Answers: {self._target}")

    def _say_stopped(self, answered: int, run: BatchRun | None) -> None:
        amounts = f" {self._amounts(run.tally)}." if run else ""
        self.say(
            f"Stopped: {answered} of {_requests(self._total)} answered.{amounts} "
            "The same command goes on from here."
        )

    def _amounts(self, tally: Tally) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = tally.new_tokens / seconds
        return (
            f"{tally.prompt_tokens:,} tokens read, {tally.new_tokens:,} written in {seconds:,.1f} s "
            f"({rate:,.1f} a second)"
        )

    @contextmanager
    def _live(self) -> Iterator[Callable[[Tally], None]]:
        """What to call after each answer: on a terminal it shows how far the batch is."""
        if not sys.stderr.isatty():
            yield lambda tally: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=True,
        )
        task = bar.add_task("", total=self._total, completed=self.before)

        def show(tally: Tally) -> None:
            seconds = max(time.monotonic() - self._started, 1e-9)
            words = f"{tally.failed} failed, {tally.new_tokens / seconds:,.1f} tokens/s"
            bar.update(task, completed=self.before + tally.answered, description=words)

        with bar:
            yield show
