"""`ayllu chat`: a conversation in the terminal, or one answer in a pipe."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ayllu.cli import engine_flags

if TYPE_CHECKING:
    from ayllu.engine.reply import Reply


def chat(
    run: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Name of a model, or a path. Default: the setting default_model.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Ask this once and exit. Piped input is put after it."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="Image file for the first message; may be repeated.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 0.9,
    top_k: Annotated[int, typer.Option(help="Keep this many likeliest tokens; 0 keeps all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repetition.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Context window in tokens. Default: 8192, or the model's own.")
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
    pull: Annotated[bool, typer.Option("--pull", help="Fetch the model first if it is not here.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object.")] = False,
    timing: Annotated[
        bool, typer.Option("--timing", help="Print times and memory to standard error.")
    ] = False,
) -> None:
    """Talk to a model.

    On a terminal this opens a conversation; /help lists its commands. In a pipe it answers once:
    cat report.txt | ayllu chat -p "Summarise this."
    """
    from ayllu.chat.messages import Message, user_message
    from ayllu.cli.measure import Timing
    from ayllu.cli.opening import find_or_pull
    from ayllu.cli.terminal import read_image
    from ayllu.engine.model_files import is_encoder
    from ayllu.engine.native import open_engine
    from ayllu.engine.parameters import Sampling
    from ayllu.engine.reply import Reply
    from ayllu.engine.requests import ChatPrompt, GenerateRequest
    from ayllu.errors import UsageError
    from ayllu.progress import TerminalProgress
    from ayllu.settings import load_settings

    clock = Timing()
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
    settings = load_settings(flags)
    one_answer = prompt is not None or as_json or not _at_terminal()
    question = _question(prompt) if one_answer else None
    images = [read_image(path) for path in image or ()]
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    installed = find_or_pull(model, pull, settings)
    if is_encoder(installed.path):
        raise UsageError(
            f"{installed.name} is an embedding model: it makes vectors of texts and cannot talk.",
            "Choose a model that generates (`ayllu list`).",
        )
    options = engine_flags.engine_options(
        settings,
        command=f"ayllu chat {shlex.quote(model or installed.name)}",
        pull=pull,
        context=context,
        slots=1,
    )
    # What `ayllu.cli.start` has begun, if this was started as a program.
    launched = run.obj
    with open_engine(
        installed.path, options, TerminalProgress(), installed.name, launched=launched
    ) as engine:
        for note in engine.notes:
            print(note, file=sys.stderr)
        if question is None:
            from ayllu.cli.conversation import Conversation

            Conversation(
                engine,
                system=system,
                images=images,
                sampling=sampling,
                max_tokens=max_tokens,
                clock=clock if timing else None,
            ).run()
            return
        messages = [*([Message("system", system)] if system else []), user_message(question, images)]
        request = GenerateRequest(
            prompt=ChatPrompt(tuple(messages)), sampling=sampling, max_new_tokens=max_tokens
        )
        reply = Reply(engine.submit(request))
        pieces = _stream(reply, silent=as_json)
        if as_json:
            result: dict[str, object] = {
                "model": installed.name,
                "text": "".join(pieces),
                "finish_reason": reply.finish_reason,
                "usage": {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.new_tokens},
            }
            if timing:
                result["timing"] = clock.facts(reply, engine)
            print(json.dumps(result, ensure_ascii=False))
        elif timing:
            clock.report(reply, engine)


def _at_terminal() -> bool:
    # Standard input can be closed altogether, then Python has no object for it.
    return sys.stdin is not None and sys.stdin.isatty()


def _question(prompt: str | None) -> str:
    from ayllu.cli.terminal import read_pipe
    from ayllu.cli.text_input import decode_text
    from ayllu.errors import UsageError

    piped = ""
    if sys.stdin is not None and not sys.stdin.isatty():
        piped, encoding = decode_text(read_pipe())
        if encoding != "utf-8":
            print(f"(read the input as {encoding})", file=sys.stderr)
    question = "\n\n".join(part for part in (prompt or "", piped.strip("\r\n")) if part.strip())
    if not question:
        raise UsageError("There is nothing to answer.", 'Give a prompt: ayllu chat -p "…", or pipe text in.')
    return question


def _stream(reply: Reply, *, silent: bool) -> list[str]:
    """The pieces of the answer, written as they come unless silent. Ctrl-C ends the program if it is not
    silent; otherwise the part that is there is the answer."""
    from ayllu.cli.terminal import write_answer

    pieces: list[str] = []
    try:
        for piece in reply:
            pieces.append(piece)
            if not silent:
                write_answer(piece)
    except KeyboardInterrupt:
        if not silent:
            print()
            raise typer.Exit(130) from None
        pieces.append(reply.stop())
    if not silent and not "".join(pieces[-1:]).endswith("\n"):
        print()
    return pieces
